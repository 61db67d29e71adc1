"""The typer application: help, and what is wrong with a command line."""

from __future__ import annotations

import inspect
import sys
import typing
from typing import Annotated, Any

import typer

from vfiotool import __version__
from vfiotool.cli.declare import Argument, Commands, Context, Function, Parameter
from vfiotool.cli.output import State
from vfiotool.errors import UsageError

EPILOG = (
    "Exit codes: 1 the answer is no, 2 usage, 3 no such device, 4 refused, 5 the kernel failed, "
    "6 stuck, 7 not permitted, 8 no such facility."
)


class _InOrder(typer.core.TyperGroup):
    """Lists the commands as the contract groups them."""

    def list_commands(self, ctx: Any) -> list[str]:
        from vfiotool.cli.main import COMMANDS

        return [name for name in COMMANDS if name in self.commands]


def application(commands: Commands) -> typer.Typer:
    """The application that has these commands."""
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
    _fill(app, commands)
    return app


def run(commands: Commands, arguments: list[str]) -> Any:
    """What the command returned. Raises UsageError for arguments that it does not take."""
    command = typer.main.get_command(application(commands))
    try:
        return command.main(arguments, "vfiotool", standalone_mode=False)
    except typer.Abort:
        return 130
    except typer.TyperException as error:
        text = error.format_message()
        if text.startswith("Usage:"):
            # `no_args_is_help`: the message is the help itself.
            sys.stderr.write(text + "\n")
            return 2
        raise UsageError(text, hint="vfiotool --help, or the command's own --help") from error


def _fill(app: typer.Typer, commands: Commands) -> None:
    for name, (function, settings) in commands.functions.items():
        app.command(name, **settings)(_for_typer(function))
    for name, group in commands.groups.items():
        if isinstance(group, Commands):
            below = typer.Typer(
                help=group.help, no_args_is_help=True, rich_markup_mode=None, **group.settings
            )
            _fill(below, group)
            group = below
        app.add_typer(group, name=name)


def _for_typer(function: Function) -> Function:
    """`function` with its parameters declared as typer has them."""
    hints = typing.get_type_hints(function, include_extras=True)
    context: str | None = None
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if hint is Context:
            context, hint = name, typer.Context
        elif typing.get_origin(hint) is Annotated:
            kind, *more = typing.get_args(hint)
            hint = Annotated[(kind, *(_of_typer(item) for item in more))]
        parameters.append(parameter.replace(annotation=hint))

    def call(**values: Any) -> Any:
        if context is None:
            return function(**values)
        own = values.pop(context)
        return function(Context(own.find_object(State) or State()), **values)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__annotations__ = {item.name: item.annotation for item in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _of_typer(item: Any) -> Any:
    if not isinstance(item, Parameter):
        return item
    make = typer.Argument if isinstance(item, Argument) else typer.Option
    return make(*item.names, **item.settings) if make is typer.Option else make(**item.settings)


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
