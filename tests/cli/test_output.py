"""The one way out: escaped, coloured alike, in ASCII where it must be, paged; and no other way."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.cli.terminal import on_terminal
from vfiotool.cli import output
from vfiotool.cli.commands import COMMANDS
from vfiotool.cli.main import main
from vfiotool.cli.style import encodable

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / "fixtures" / "hosts"
VFS = str(HOSTS / "vfs-enabled")
SHARED = str(HOSTS / "shared-group")
PRINTS = {"print", "sys.stdout.write", "sys.stderr.write", "stdout.buffer.write"}


def prints(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "print" or (name.endswith(".write") and "std" in name):
                found.append(f"{path.name}:{node.lineno} {name}")
    return found


def test_nothing_in_cli_prints_but_output() -> None:
    folder = ROOT / "vfiotool" / "cli"
    # `paging` hands on what `output` has written, `main --version` needs no imports.
    allowed = {folder / "output.py", folder / "paging.py", folder / "main.py"}
    found = [line for path in folder.rglob("*.py") if path not in allowed for line in prints(path)]
    assert found == []
    assert len(prints(folder / "main.py")) == 1
    assert prints(folder / "output.py")


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    return subprocess.run(
        [sys.executable, "-m", "vfiotool", *arguments],
        capture_output=True,
        check=False,
        env={**kept, **env},
    )


@pytest.mark.parametrize(
    "env",
    [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "iso-8859-1"}],
    ids=lambda env: "=".join(*env.items()),
)
@pytest.mark.parametrize(
    "line",
    [f"--root {VFS} tree", f"--root {VFS} show 02:00.0", "--help", "no-such-command"],
    ids=lambda line: line.rpartition("/")[2],
)
def test_where_the_encoding_has_no_more_all_is_ascii(line: str, env: dict[str, str]) -> None:
    done = run(*line.split(), **env)
    assert done.returncode == (2 if "no-such" in line else 0), done.stderr
    assert done.stdout.isascii() and done.stderr.isascii()


@cache
def pages_in_ascii() -> dict[str, tuple[str, str]]:
    """Exit code and page of each command's --help, from one process whose output is ASCII."""
    code = """
import sys
from vfiotool.cli.main import main
for name in sys.argv[1:]:
    code = main([name, "--help"])
    print(f"\\0{code}", end="\\0")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    parts = done.stdout.decode("ascii").split("\0")
    return dict(zip(COMMANDS, zip(parts[1::2], parts[::2], strict=False), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_page_can_be_read_in_ascii(name: str) -> None:
    code, page = pages_in_ascii()[name]
    assert code == "0"
    assert f"Usage: vfiotool {name}" in page


def test_an_encoding_keeps_what_it_has() -> None:
    class Stream:
        encoding = "iso-8859-1"

    class Whole:
        encoding = "utf-8"

    assert encodable("Größe", Stream()) == "Größe"  # type: ignore[arg-type]
    assert encodable("a…✓ →\u4e2d", Stream()) == "a...ok ->\\u4e2d"  # type: ignore[arg-type]
    assert encodable("\udc80", Whole()) == "\\udc80"  # type: ignore[arg-type]


def test_a_terminal_gets_colours_and_a_pipe_does_not() -> None:
    for line in ("groups", "devices", "why 02:10.0", "tree", "doctor", "vf list"):
        arguments = ("--root", VFS, *line.split())
        assert "\x1b[" in on_terminal(*arguments, env={"PAGER": "cat"})[1], line
        assert b"\x1b" not in run(*arguments).stdout, line
        assert b"\x1b[" in run(*arguments, FORCE_COLOR="1").stdout, line


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
@pytest.mark.parametrize("line", ["tree", "groups", "devices", "doctor", "show 01:00.0", "-h"])
def test_no_escape_sequence_where_none_is_wanted(line: str, env: dict[str, str]) -> None:
    _, seen = on_terminal("--root", VFS, *line.split(), env={"PAGER": "", **env})
    assert "\x1b" not in seen
    assert seen


def test_a_table_fits_the_terminal_and_a_pipe_gets_all_of_it() -> None:
    arguments = ("--root", VFS, "devices")
    _, seen = on_terminal(*arguments, columns=60, env={"PAGER": "cat", "NO_COLOR": "1"})
    assert max(map(len, seen.splitlines())) <= 60
    assert seen.startswith("ADDRESS")
    lines = run(*arguments).stdout.decode().splitlines()
    assert any(line.endswith("82576 Virtual Function") for line in lines)
    assert lines[0].split()[:4] == ["ADDRESS", "ID", "GROUP", "VERDICT"]


@pytest.mark.skipif(not os.access("/usr/bin/less", os.X_OK), reason="there is no less here")
def test_long_output_is_paged_on_a_terminal_and_short_output_is_not() -> None:
    code, seen = on_terminal("--root", VFS, "groups", lines=10, typed=b"q")
    assert code == 0
    assert "group 0" in seen and "group 25" not in seen
    code, seen = on_terminal("--root", VFS, "groups", lines=200)
    assert code == 0 and "group 11" in seen


def test_a_pager_that_is_switched_off_is_not_used() -> None:
    for pager in ("", "cat"):
        code, seen = on_terminal("--root", VFS, "groups", lines=5, env={"PAGER": pager})
        assert code == 0 and "group 11" in seen


def test_root_runs_no_pager_that_its_caller_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from vfiotool.cli import paging

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PAGER", "evil --now")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert paging._command() in (None, ["/usr/bin/less"], ["/bin/less"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert paging._command() == ["evil", "--now"]


HOSTILE = "\x1b[2J\x1b]0;title\x07"


def test_a_foreign_trace_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.jsonl"
    event = {"t": 1.0, "event": f"read{HOSTILE}", "device": "x", f"key{HOSTILE}": HOSTILE}
    file.write_text(json.dumps(event) + "\n")
    assert main(["device", "trace", str(file)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["--json", "device", "trace", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["trace"] == [event]


@pytest.mark.parametrize("text", [b"\xff\xfe\n", b"[" * 100_000, b"[]\n", b"5\n", b"{}\n"])
def test_what_is_no_trace_is_refused(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(text)
    assert main(["device", "trace", str(file)]) == 2
    assert "trace" in capsys.readouterr().err


def test_messages_and_hints_are_escaped_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", SHARED, "show", f"net:{HOSTILE}"]) in (2, 3)
    assert main([f"x{HOSTILE}"]) == 2
    shown = capsys.readouterr()
    assert "\x1b" not in shown.err + shown.out


def test_quiet_leaves_notes_out_and_errors_in(capsys: pytest.CaptureFixture[str]) -> None:
    host = str(HOSTS / "no-iommu")
    assert main(["--root", host, "mdev", "list"]) == 0
    assert capsys.readouterr().err
    for line in (["-q", "mdev", "list"], ["mdev", "list", "--quiet"]):
        assert main(["--root", host, *line]) == 0
        assert capsys.readouterr().err == ""
    assert main(["-q", "show", "nonsense"]) == 2
    assert capsys.readouterr().err
    assert main(["--root", host, "mdev", "list"]) == 0
    assert capsys.readouterr().err


def test_a_dash_is_standard_output_and_input(tmp_path: Path) -> None:
    done = run("--root", VFS, "tree", "--svg", "-")
    assert done.stdout.startswith(b"<svg")
    done = run("--root", VFS, "snapshot", "-")
    (tmp_path / "s.gz").write_bytes(done.stdout)
    again = run("--root", str(tmp_path / "s.gz"), "groups", "--json")
    assert again.stdout == run("--root", VFS, "groups", "--json").stdout
    policy = (ROOT / "fixtures/plans/whole-group/policy.toml").read_bytes()
    line = [sys.executable, "-m", "vfiotool", "--root", SHARED, "--json"]
    for command, code in (("plan", 0), ("status", 1)):
        plain = subprocess.run(
            [*line, command, "-"], input=policy, capture_output=True, check=False
        )
        assert plain.returncode == code, plain.stderr
        assert json.loads(plain.stdout)["steps"]
    saved = subprocess.run(
        [*line[:-1], "plan", "-", "--out", "-"], input=policy, capture_output=True, check=False
    )
    assert json.loads(saved.stdout)["kind"] == "vfiotool-plan"
    assert list(Path().glob("-")) == []


def test_data_and_json_do_not_share_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["tree", "--svg", "-"], ["snapshot", "-"]):
        assert main(["--root", VFS, "--json", *line]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_the_words_for_qemu_are_one_line_for_a_substitution() -> None:
    done = run("--root", SHARED, "vm", "qemu", "02:01.0", "02:02.0")
    assert done.stdout.count(b"\n") == 1
    assert b"\\" not in done.stdout
    shell = shutil.which("bash") or "sh"
    program = f"{sys.executable} -m vfiotool --root {SHARED} vm qemu 02:01.0"
    printed = subprocess.run(
        [shell, "-c", f"printf '%s\\n' $({program})"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines()[0] == "-device"


def test_a_note_on_progress_never_waits_for_a_terminal() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    before = sys.stderr
    sys.stderr = os.fdopen(writer, "w")
    try:
        output.progress("step 1 of 2")  # would wait for ever for a reader
    finally:
        os.close(reader)
        sys.stderr = before
