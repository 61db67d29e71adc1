"""A plain command line is understood without typer exactly as typer understands it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest

from vfiotool.cli import typer_app
from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.cli.lean import parse
from vfiotool.errors import UsageError

Call = tuple[Any, ...]


def take(
    context: Context,
    first: Annotated[str, Argument(metavar="FIRST")],
    count: Annotated[int, Argument()] = 1,
    others: Annotated[list[str] | None, Argument()] = None,
    plain: str | None = None,
    seconds: Annotated[float, Option("--timeout", min=0.5, max=9.0)] = 2.0,
    file: Annotated[Path | None, Option("--output", metavar="FILE")] = None,
    allow: Annotated[list[str] | None, Option("--allow")] = None,
    dry_run: Annotated[bool, Option("--dry-run")] = False,
    auto_probe: Annotated[bool | None, Option(help="three ways")] = None,
    follow: Annotated[bool, Option("--follow/--once", "-f")] = True,
) -> Any:
    state = context.state
    told = (state.root, state.json, state.debug)
    named = (plain, seconds, file, allow, dry_run, auto_probe, follow)
    return "take", told, first, count, others or None, named


def without_context(devices: Annotated[list[str], Argument()], width: int = 4) -> Any:
    return "many", tuple(devices), width


def commands() -> Commands:
    top = Commands()
    top.command("take")(take)
    group = Commands(help="A group.")
    group.command()(without_context)
    top.add_typer(group, name="group")
    top.command("raw", context_settings={"ignore_unknown_options": True})(without_context)
    return top


PLAIN = [
    "take a",
    "take a 7",
    "take a 7 b c",
    "--json --root /r take a",
    "--root=/r --debug take a",
    "take a --plain x --timeout 3",
    "take --plain=x a --timeout=0.5 2",
    "take a --plain= --output f/g",
    "take a --allow one --allow two=3",
    "take a --dry-run --auto-probe",
    "take a --no-auto-probe --once",
    "take a --plain x --plain y",
    "take ü --plain 'two words'",
    "group without-context x y",
    "group without-context x --width 8",
]
FOR_TYPER = [
    "",
    "take",
    "take --help",
    "--help",
    "nothing",
    "group",
    "group nothing",
    "take a b",
    "take a --timeout 10",
    "take a --timeout nan-ish",
    "take a --unknown",
    "take a --plai x",
    "take a --plain",
    "take a --plain -x",
    "take a --dry-run=yes",
    "take a -f",
    "take -- -a",
    "take a -1",
    "group without-context",
    "group without-context --width x y",
    "raw --whatever x",
    "--root",
    "--version",
    "take a --json",
]


@pytest.mark.parametrize("line", PLAIN)
def test_plain_lines_are_taken_as_typer_takes_them(line: str) -> None:
    import shlex

    call = parse(commands(), shlex.split(line))
    assert call is not None
    ours: Call = call()
    theirs: Call = typer_app.run(commands(), shlex.split(line))
    assert ours == theirs


@pytest.mark.parametrize("line", FOR_TYPER)
def test_all_else_is_left_to_typer(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.split()
    assert parse(commands(), words) is None
    try:
        typer_app.run(commands(), words)
    except UsageError as error:
        assert error.message
