"""Help: what every page has, and that its examples are what the command takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.core import TyperArgument

from vfiotool.cli.commands import COMMANDS, SECTIONS
from vfiotool.cli.globals import Globals
from vfiotool.cli.main import main
from vfiotool.cli.program import load, program

OPERATORS = {"|", ">", "<", ";", "&&"}


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for below, inner in command.commands.items():
        yield from leaves(inner, f"{name} {below}")


LEAVES = [leaf for name in COMMANDS for leaf in leaves(load(name), name)]


def examples_of(command: Any) -> list[str]:
    text = (command.epilog or "").partition("Examples:")[2]
    return [line.strip() for line in text.splitlines() if line.strip()]


def check(words: list[str]) -> None:
    """Parse a line down to its command, as it would be run; raises what is wrong with it."""
    context = program().make_context("vfiotool", words, obj=Globals())
    while hasattr(context.command, "commands"):
        group: Any = context.command
        name, command, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert command is not None
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize(("name", "command"), LEAVES, ids=[name for name, _ in LEAVES])
def test_a_page_says_what_it_does_and_shows_examples_that_parse(name: str, command: Any) -> None:
    assert command.help
    lines = examples_of(command)
    assert lines or name == "version"
    seen = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        while "vfiotool" in words:
            words = words[words.index("vfiotool") + 1 :]
            end = next((i for i, word in enumerate(words) if word in OPERATORS), len(words))
            # `a; b`: the semicolon stands at the word before it.
            here = words[:end]
            here = [word.rstrip(";") for word in here]
            stop = next((i for i, word in enumerate(words[:end]) if word.endswith(";")), end)
            check(here[: stop + 1] if stop < end else here)
            seen += 1
    assert seen or name == "version" or any("$(vfiotool" in line for line in lines)


@pytest.mark.parametrize(("name", "command"), LEAVES, ids=[name for name, _ in LEAVES])
def test_every_argument_and_option_is_explained(name: str, command: Any) -> None:
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        assert parameter.help, f"{name}: {parameter.name}"
        if isinstance(parameter, TyperArgument):
            assert parameter.metavar and "{" not in parameter.metavar


def test_each_section_has_its_commands_in_the_tables_order() -> None:
    used = [row[1] for row in COMMANDS.values()]
    assert list(dict.fromkeys(used)) == [section for section in SECTIONS if section in used]


def test_help_has_the_words_that_people_search_for(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for line in (["--help"], ["bind", "--help"], ["release", "--help"], ["vm", "--help"]):
        assert main(line) == 0
        pages.append(capsys.readouterr().out)
    text = " ".join(" ".join(pages).lower().split())
    for word in ("detach", "unbind", "hostdev", "passthrough", "vfio", "until reboot"):
        assert word in text, word


def test_a_line_of_the_whole_help_fits_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
