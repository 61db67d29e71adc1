"""What each command imports: its time is mostly its imports, and those can be held in a test."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from vfiotool.cli.commands import COMMANDS

ROOT = str(Path(__file__).resolve().parents[2] / "fixtures" / "hosts" / "shared-group")
# The command line itself.
FRAME = {
    "candidates",
    "commands",
    "globals",
    "main",
    "output",
    "paging",
    "program",
    "style",
}


def told(code: str, *arguments: str) -> list[str]:
    """The JSON list that this code prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    found: list[str] = json.loads(done.stdout)
    return found


def imported(*arguments: str) -> set[str]:
    """The modules that a run of vfiotool has imported at its end."""
    code = (
        "import contextlib, io, json, sys\n"
        "from vfiotool.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(sys.argv[1:])\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    return set(told(code, *arguments))


def of_cli(modules: set[str]) -> set[str]:
    below = "vfiotool.cli."
    return {name.removeprefix(below) for name in modules if name.startswith(below)}


@pytest.mark.parametrize("line", ["--version", "-V", "version"])
def test_the_version_needs_no_typer(line: str) -> None:
    modules = imported(line)
    assert not {"typer", "rich", "dataclasses", "inspect"} & modules
    assert of_cli(modules) == {"main"}


def test_help_of_the_whole_program_imports_no_command() -> None:
    modules = imported("--help")
    assert of_cli(modules) == FRAME
    assert not {"rich", "vfiotool.devices", "vfiotool.usage", "vfiotool.change"} & modules


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("groups", {"context", "look", "look.groups", "look.roles"}),
        ("groups --json", {"context", "look", "look.groups", "look.roles"}),
        ("devices", {"context", "look", "look.devices", "look.roles"}),
        ("devices --json", {"context", "look", "look.devices"}),
        ("why 02:01.0", {"context", "look", "look.why", "look.roles"}),
        ("bind 02:02.0 --dry-run", {"context", "change", "change.bind", "change.changing"}),
    ],
)
def test_only_the_module_of_the_command_typed_is_imported(line: str, own: set[str]) -> None:
    modules = imported("--root", ROOT, *line.split())
    assert of_cli(modules) == FRAME | own
    packages = {"rich", "cffi", "pyudev", "vfiotool.lab", "vfiotool.native", "vfiotool.policy"}
    assert not packages & modules
    if line.startswith(("groups", "devices", "why")):
        assert "vfiotool.change" not in modules
    if line == "groups --json":
        assert not {"vfiotool.usage", "vfiotool.devices.config"} & modules


@cache
def importing_rich() -> list[str]:
    """The commands whose --help imports rich, from one process that forgets it each time."""
    code = (
        "import contextlib, io, json, sys\n"
        "from vfiotool.cli.main import main\n"
        "found = []\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        assert main([name, '--help']) == 0, name\n"
        "    if sys.modules.pop('rich', None):\n"
        "        found.append(name)\n"
        "print(json.dumps(found))\n"
    )
    return told(code, *COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_needs_no_rich(name: str) -> None:
    assert name not in importing_rich()
