"""From a command line to the command's function."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from vfiotool.cli.declare import Commands
from vfiotool.cli.lean import parse


def commands_of(modules: Iterable[ModuleType]) -> Commands:
    """The commands of the given area modules (each has `register(app)`)."""
    commands = Commands()
    for module in modules:
        module.register(commands)
    return commands


def run(modules: Iterable[ModuleType], arguments: list[str]) -> int:
    """Run one command of the given area modules; returns its code.

    Raises UsageError for arguments that the command does not take.
    """
    commands = commands_of(modules)
    call = parse(commands, arguments)
    if call is None:
        from vfiotool.cli import typer_app

        outcome = typer_app.run(commands, arguments)
    else:
        outcome = call()
    return outcome if isinstance(outcome, int) else 0
