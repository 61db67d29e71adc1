"""How commands declare their options and arguments: what typer would be told, without typer.

Importing typer costs more than most commands do. So commands are declared in these words; a
command line that is as it should be is taken apart by `lean`, and typer is only imported (by
`typer_app`) to print help and to say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfiotool.cli.output import State

Function = Callable[..., Any]


class Context:
    """What a command is called with besides its own parameters: the global options."""

    def __init__(self, state: State) -> None:
        self.state = state


class Parameter:
    """What stands in the `Annotated` of a command's parameter; settings are typer's."""

    def __init__(self, *names: str, **settings: Any) -> None:
        self.names = names
        self.settings = settings


class Option(Parameter):
    """A parameter by name: `--parameter` where no other is given, and `--no-…` for a flag."""


class Argument(Parameter):
    """A parameter by position."""


class Commands:
    """A command's subcommands, or all commands: functions and further `Commands`, by name."""

    def __init__(self, *, help: str = "", **settings: Any) -> None:
        self.help = help
        self.settings = settings
        self.functions: dict[str, tuple[Function, dict[str, Any]]] = {}
        self.groups: dict[str, Any] = {}

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Add a function under `name`; settings (help, short_help, …) are typer's."""

        def add(function: Function) -> Function:
            own = name or function.__name__.replace("_", "-")
            self.functions[own] = function, settings
            return function

        return add

    def add_typer(self, group: Any, *, name: str) -> None:
        """Add a group of commands, declared here or with typer itself."""
        self.groups[name] = group
