"""The command line's frame: exit codes, error shapes, option placement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vfiotool import __version__
from vfiotool.cli import main as app
from vfiotool.cli.main import COMMANDS, _hoist_globals, main

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
    lines = capsys.readouterr().out.partition("COMMAND [ARGS]...\n")[2].splitlines()
    assert lines
    assert [line for line in lines if line.endswith("...") or len(line) > 80] == []


def test_help_lists_every_command_in_the_contracts_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--help"])
    shown = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    names = [line.split()[0] for line in shown if line.startswith("  ") and line[2] != " "]
    assert [name for name in names if name in COMMANDS] == list(COMMANDS)


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


def test_json_is_taken_after_the_command_too() -> None:
    assert _hoist_globals(["devices", "--json"]) == ["--json", "devices"]


def test_what_lab_run_starts_keeps_its_own_options() -> None:
    line = ["lab", "run", "vfiotool", "groups", "--json"]
    assert _hoist_globals(line) == line
    assert _hoist_globals(["lab", "run", "--json", *line[2:]]) == ["--json", *line]
    line = ["lab", "run", "--kernel", "6.1", "--", "vfiotool", "groups", "--json"]
    assert _hoist_globals(line) == line


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

    monkeypatch.setattr(app, "_run_command", fail)


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
