"""The typer application around the commands: global options and help."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Annotated, Any

import typer

from vfiotool import __version__
from vfiotool.cli.render import State
from vfiotool.errors import UsageError

EPILOG = (
    "Exit codes: 1 the answer is no, 2 usage, 3 no such device, 4 refused, 5 the kernel failed, "
    "6 stuck, 7 not permitted, 8 no such facility."
)


class _InOrder(typer.core.TyperGroup):
    """Lists the commands as the contract groups them."""

    def list_commands(self, ctx: Any) -> list[str]:
        from vfiotool.cli.app import COMMANDS

        return [name for name in COMMANDS if name in self.commands]


def application(modules: Iterable[ModuleType]) -> typer.Typer:
    """The application with the commands of the given area modules (each has `register(app)`)."""
    app = typer.Typer(
        name="vfiotool",
        cls=_InOrder,
        help="Hand Linux devices to virtual machines and user-space drivers.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_globals)
    for module in modules:
        module.register(app)
    return app


def run(modules: Iterable[ModuleType], arguments: list[str]) -> int:
    """Run one command of the given area modules; returns its code.

    Raises UsageError for arguments that the command does not take.
    """
    command = typer.main.get_command(application(modules))
    try:
        outcome = command.main(arguments, "vfiotool", standalone_mode=False)
    except typer.Abort:
        return 130
    except typer.TyperException as error:
        text = error.format_message()
        if text.startswith("Usage:"):
            # `no_args_is_help`: the message is the help itself.
            sys.stderr.write(text + "\n")
            return 2
        raise UsageError(text, hint="vfiotool --help, or the command's own --help") from error
    return outcome if isinstance(outcome, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vfiotool {__version__}")
        raise typer.Exit


def _globals(
    context: typer.Context,
    root: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A directory laid out like /, or a snapshot file."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    context.obj = State(root=root, json=json, debug=debug)
