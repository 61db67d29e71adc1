"""The command line's frame: exit codes, error shapes, option placement."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vfiotool import __version__
from vfiotool.cli import program
from vfiotool.cli.commands import COMMANDS, SYNONYMS, sections
from vfiotool.cli.globals import Globals
from vfiotool.cli.main import main
from vfiotool.doctor import examine

FIXTURE = str(Path(__file__).resolve().parents[2] / "fixtures" / "hosts" / "shared-group")
CONTRACT_COMMANDS = [
    "groups",
    "devices",
    "show",
    "why",
    "doctor",
    "tree",
    "watch",
    "snapshot",
    "bind",
    "release",
    "vf",
    "mdev",
    "plan",
    "apply",
    "confirm",
    "status",
    "undo",
    "history",
    "recover",
    "export",
    "import",
    "boot",
    "vdpa",
    "vm",
    "device",
    "demo",
    "lab",
]


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vfiotool {__version__}\n"


@pytest.mark.parametrize("name", CONTRACT_COMMANDS)
def test_every_command_of_the_contract_has_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in COMMANDS
    assert main([name, "--help"]) == 0
    assert "Usage: vfiotool" in capsys.readouterr().out


@pytest.mark.parametrize("area", [[], *([name] for name in ("vf", "device", "nvme", "lab", "vm"))])
def test_no_help_is_cut_off_on_a_narrow_terminal(
    area: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*area, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert [line for line in lines[1:] if line.endswith("...") or len(line) > 80] == []


def test_help_lists_every_command_in_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for section, rows in sections():
        lines = text.partition(f"{section}:\n")[2].partition("\n\n")[0].splitlines()
        assert [line.split()[0] for line in lines] == [name for name, _ in rows]


def test_an_unknown_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bogus"]) == 2
    assert "bogus" in capsys.readouterr().err


def test_an_unknown_option_with_json_has_the_error_shape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["devices", "--bogus", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["format_version"] == "1.0"
    assert set(answer["error"]) == {"kind", "message", "hint", "device", "errno"}


@pytest.mark.parametrize(
    "line",
    [
        "--root {} --json show 02:01.0",
        "show --root {} 02:01.0 --json",
        "show 02:01.0 --json --root={}",
        "--json show --root {} -- 02:01.0",
    ],
)
def test_global_options_are_taken_before_and_after_the_command(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.format(FIXTURE).split()) == 0
    assert json.loads(capsys.readouterr().out)["address"] == "0000:02:01.0"


def test_global_options_are_taken_within_a_group_of_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for line in (
        "vf --json list --root {}",
        "vf --root {} list --json",
        "--json vf list --root {}",
    ):
        assert main(line.format(FIXTURE).split()) == 0
        assert json.loads(capsys.readouterr().out)["vfs"] == []


@pytest.mark.parametrize(
    ("line", "command", "as_json"),
    [
        ("lab run vfiotool groups --json -q", "vfiotool groups --json -q", False),
        ("lab run --json vfiotool groups --root x", "vfiotool groups --root x", True),
        ("lab run --kernel 6.1 -- vfiotool groups --json", "vfiotool groups --json", False),
        ("lab run -- -1 --help", "-1 --help", False),
    ],
)
def test_what_lab_run_starts_keeps_its_own_options(
    line: str, command: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfiotool.cli import lab

    seen: list[list[str]] = []

    class Seen(Exception):
        pass

    def exec(self: object, words: list[str], **_: object) -> None:
        seen.append(words)
        raise Seen

    guest = type("Guest", (), {"__enter__": lambda self: self, "__exit__": lambda *_: None})
    guest.exec, guest.describe, guest.missing_models = exec, lambda _: "", lambda _: ()
    monkeypatch.setattr(lab, "_guest", lambda *_: guest())
    monkeypatch.setattr(lab, "end_on_sigterm", lambda: None)
    chosen = Globals()
    with pytest.raises(Seen):
        program.run(line.split(), chosen)
    assert seen == [command.split()]
    assert chosen.json is as_json


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("unbind 01:00.0", "release"),
        ("detach 01:00.0", "release"),
        ("list", "devices"),
        ("devcies", "devices"),
        ("rollback", "undo"),
    ],
)
def test_words_of_other_tools_get_the_right_suggestion(
    words: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert f"did you mean {meant} (" in capsys.readouterr().err


def test_every_synonym_is_no_command_and_means_one() -> None:
    assert not SYNONYMS.keys() & COMMANDS.keys()
    assert {name for names in SYNONYMS.values() for name in names} <= COMMANDS.keys()


@pytest.mark.parametrize("line", ["--version", "-V", "version"])
def test_the_version_is_told_in_every_usual_way(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([line]) == 0
    assert capsys.readouterr().out == f"vfiotool {__version__}\n"


@pytest.mark.parametrize("line", ["vf set -h", "vf set --help", "help vf set", "vf set x -h"])
def test_help_is_given_in_every_usual_way(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: vfiotool vf set [OPTIONS] PF COUNT\n")
    assert "Examples:" in out and "--root PATH" in out


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        ("bind --no-such", "vfiotool bind [OPTIONS] DEVICE…"),
        ("bind", "vfiotool bind [OPTIONS] DEVICE…"),
        ("vf set x", "vfiotool vf set [OPTIONS] PF COUNT"),
        ("vf nothing", "vfiotool vf [OPTIONS] COMMAND [ARGS]..."),
        ("groups --no", "vfiotool groups [OPTIONS] [ID…]"),
    ],
)
def test_a_usage_error_shows_that_commands_usage(
    line: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert f"usage: {usage}\n" in error


def test_a_negative_number_is_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vf", "set", "02:01.0", "-1"]) == 2
    assert "-1 is not in the range" in capsys.readouterr().err
    assert main(["device", "write", "x", "bar0", "0", "-5"]) == 2
    assert "'-5' is not a value: it is negative" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["groups x --json", "bogus --json", "vf --json", "vf x --json"])
def test_usage_errors_are_json_wherever_the_option_stands(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    out = capsys.readouterr().out
    if line != "vf --json":
        assert json.loads(out)["error"]["kind"] == "usage"


@pytest.mark.parametrize(
    "line",
    [
        ["bind", "0000:02:01.0"],
        ["release", "0000:02:01.0"],
        ["vf", "set", "0000:02:01.0", "1"],
        ["mdev", "create", "mtty", "mtty-1"],
    ],
    ids=" ".join,
)
def test_changing_another_root_is_bad_usage(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", FIXTURE, "--json", *line]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_a_root_that_is_none_is_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", str(tmp_path), "groups"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_an_unknown_device_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", FIXTURE, "show", "0000:7f:1f.7"]) == 3
    assert "0000:7f:1f.7" in capsys.readouterr().err


def test_a_reader_that_leaves_early_makes_no_noise() -> None:
    line = f"{sys.executable} -m vfiotool --root {FIXTURE} devices --json | head -c 1"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise ValueError("never meant to happen")

    monkeypatch.setattr(examine, "examine", fail)


@pytest.mark.usefixtures("faulty")
def test_a_fault_of_our_own_is_one_line_and_no_answer_of_the_contract(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 70
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "ValueError: never meant to happen" in printed.err
    assert "--debug" in printed.err and "Traceback" not in printed.err
    assert main(["doctor", "--json"]) == 70
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "internal"


@pytest.mark.usefixtures("faulty")
def test_debug_shows_where_a_fault_is_and_keeps_the_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--debug", "doctor"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_debug_keeps_the_exit_code_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "--root", FIXTURE, "show", "0000:7f:1f.7"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_no_fault_of_vfiotools() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vfiotool", "--root", FIXTURE, "devices"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 5
    assert done.stderr == "vfiotool: the output cannot be written: No space left on device\n"


def test_an_error_that_cannot_be_told_for_lack_of_descriptors_ends_without_a_traceback() -> None:
    """No file can be opened any more, not even the one that output is thrown away to."""
    program = (
        "import errno, resource, sys\n"
        "from vfiotool.cli import main as at, output\n"
        "from vfiotool.cli.globals import Globals\n"
        "from vfiotool.errors import NotFound\n"
        "def fails(*_, **__): raise OSError(errno.EMFILE, 'Too many open files')\n"
        "output.report = fails\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "sys.exit(at._report(NotFound('no such device'), Globals()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_closed_standard_file_is_no_fault_and_takes_no_other_files_place(closed: str) -> None:
    root = Path(__file__).parents[2] / "fixtures/hosts/storage-in-use"
    command = f'"{sys.executable}" -m vfiotool --root "{root}" devices {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("to", [">&-", ">/dev/full", "<&- >&-", ">&- 2>&-"])
@pytest.mark.parametrize(
    "command", ["--version", "--help", "bind --help", "devices", "devices --json", "export"]
)
def test_an_answer_that_nobody_gets_is_an_error(command: str, to: str) -> None:
    """Seen: 0 and not a word where it was closed, 120 for the version where it was full."""
    words = f'"{sys.executable}" -m vfiotool {command}'
    if not command.startswith("-") and "help" not in command:
        words += f' --root "{FIXTURE}"'
    done = subprocess.run(["sh", "-c", f"{words} {to}"], capture_output=True, text=True)
    why = "No space left on device" if "full" in to else "Bad file descriptor"
    told = "" if "2>" in to else f"vfiotool: the output cannot be written: {why}\n"
    assert (done.returncode, done.stderr) == (5, told)


def test_a_caller_that_ignores_its_children_does_not_make_failures_look_well() -> None:
    """As under perl's or a supervisor's SIGCHLD ignored: waitpid has no status to give then."""
    program = (
        "import signal, subprocess, sys\n"
        "from vfiotool.cli.main import main\n"
        "main(['--version'])\n"
        "print(subprocess.run(['false']).returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "1", done.stderr
