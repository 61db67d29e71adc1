"""The typer program: commands loaded on demand, global options anywhere, errors with a usage line.

A command declares its options in its own function. What all have in common is here: the global
options are added to every command and group, `-1` is a value, and an error carries the usage line
of the command that it is about.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer._click.core import Command as _Click
from typer._click.core import Context, Parameter
from typer._click.formatting import HelpFormatter
from typer._click.parser import _OptionParser, _ParsingState
from typer._click.shell_completion import CompletionItem
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import (
    get_command_from_info,
    get_group_from_info,
    get_params_convertors_ctx_param_name_from_function,
)
from typer.models import TyperInfo

from vfiotool import __version__
from vfiotool.cli import candidates, output, paging
from vfiotool.cli.commands import COMMANDS, SYNONYMS, sections
from vfiotool.cli.globals import Globals
from vfiotool.errors import UsageError

_HELP = "Detach Linux devices for passthrough to virtual machines and user-space drivers (VFIO)."
_EPILOG = (
    "\b\n"
    "Start with:\n"
    "  vfiotool doctor                  is this host ready?\n"
    "  vfiotool devices                 what is there, and who has it\n"
    "  vfiotool why net:eth1            can this one be passed through?\n"
    "  vfiotool bind net:eth1           take it from the host\n"
    "  vfiotool vm libvirt 0000:05:01.0 its hostdev element\n"
    "\n"
    "Exit codes: 1 the answer is no, 2 usage, 3 no such device, 4 refused, 5 the kernel failed, "
    "6 stuck, 7 not permitted, 8 no such facility."
)
_NEGATIVE = re.compile(r"-\.?[0-9]")


def _globals(
    root: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Look at a directory laid out like /, or at a snapshot file, not at this host.",
            autocompletion=candidates.files,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no notes and no progress.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """The global options, which every command and group takes."""


def _remember(context: Context, parameter: Parameter, value: Any) -> Any:
    """Note a global option where it is given; where it is not, what stood before is kept."""
    found = context.find_object(Globals)
    if value and found is not None and parameter.name is not None:
        setattr(found, parameter.name, value)
        output.begin(quiet=found.quiet)
    return value


def _declare() -> list[Parameter]:
    declared = get_params_convertors_ctx_param_name_from_function(_globals)[0]
    for parameter in declared:
        parameter.expose_value = False
        parameter.callback = _remember
    return [*declared]


_GLOBALS = _declare()


class _Parser(_OptionParser):
    """Takes a negative number for a value: no option begins with a digit."""

    def _process_opts(self, arg: str, state: _ParsingState) -> None:
        if _NEGATIVE.match(arg) and self.allow_interspersed_args:
            state.largs.append(arg)
        else:
            super()._process_opts(arg, state)


class _Common(_Click):
    """What commands and groups share."""

    def get_params(self, ctx: Context) -> list[Parameter]:
        return [*super().get_params(ctx), *_GLOBALS]

    def make_parser(self, ctx: Context) -> _OptionParser:
        parser = _Parser(ctx)
        for parameter in self.get_params(ctx):
            parameter.add_to_parser(parser, ctx)
        return parser

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            _note_rest(ctx, words)
            # What the parser raises of itself names no command, and the usage line is of one.
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def get_help_option(self, ctx: Context) -> TyperOption | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
            option.opts = sorted(option.opts, key=len)
            option.help = "Show this help."
        return option

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        pieces = [self.options_metavar] if self.options_metavar else []
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and not parameter.hidden:
                name = parameter.make_metavar(ctx)
                pieces.append(name if parameter.required else f"[{name}]")
        return pieces

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        own, common = [], []
        arguments = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(parameter, TyperArgument):
                arguments.append(record)
            elif parameter in _GLOBALS or parameter is self._help_option:
                common.append(record)
            else:
                own.append(record)
        for title, rows in (
            ("Arguments", arguments),
            ("Options", own),
            ("Global options, before or after the command", common),
        ):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _note_rest(ctx: Context, words: list[str]) -> None:
    """Of a line that cannot be parsed, find how its error is to be shown."""
    found = ctx.find_object(Globals)
    if found is None:
        return
    for word in words:
        if word == "--" or not (ctx.allow_interspersed_args or word.startswith("-")):
            break
        found.json |= word == "--json"
        found.debug |= word == "--debug"


def _show_help(ctx: Context, parameter: Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        output.text(ctx.get_help())
        ctx.exit()


class _Command(_Common, TyperCommand):
    """One command."""


class _Group(_Common, TyperGroup):
    """A command's subcommands."""

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), self.subcommand_metavar]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        super().format_options(ctx, formatter)

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            raise _HelpWanted(ctx.get_help(), ctx)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: Context, args: list[str]
    ) -> tuple[str | None, _Click | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except typer.TyperException:
            for word in args:
                if word == "--":
                    break
                if word in ("--json", "--debug"):
                    _note_rest(ctx, ["--json"] if word == "--json" else ["--debug"])
            raise

    def rows(self) -> list[tuple[str, str]]:
        """Each subcommand with one line of help."""
        return [(name, _first_sentence(command)) for name, command in self.commands.items()]

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(self.rows())

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=help) for name, help in self.rows()]
        options = super(TyperGroup, self).shell_complete(ctx, incomplete)
        return [item for item in found if item.value.startswith(incomplete)] + options


class _HelpWanted(typer.TyperException):
    """A group without a command: its help is the answer, and the exit code is 2."""

    def __init__(self, text: str, ctx: Context) -> None:
        super().__init__(text)
        self.text = text


def _first_sentence(command: _Click) -> str:
    text = " ".join((command.help or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".") + "."


class Program(_Group):
    """All commands. Help needs the table alone; a command's module is imported when it is typed."""

    def list_commands(self, ctx: Context) -> list[str]:
        return list(COMMANDS)

    def rows(self) -> list[tuple[str, str]]:
        return [(name, row[2]) for name, row in COMMANDS.items()]

    def get_command(self, ctx: Context, cmd_name: str) -> _Click | None:
        if cmd_name not in self.commands and cmd_name in COMMANDS:
            self.commands[cmd_name] = load(cmd_name)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        for section, rows in sections():
            with formatter.section(section):
                formatter.write_dl(rows, col_max=16)

    def resolve_command(
        self, ctx: Context, args: list[str]
    ) -> tuple[str | None, _Click | None, list[str]]:
        try:
            found = super().resolve_command(ctx, args)
        except typer.TyperException as error:
            raise _unknown(args[0], ctx) from error
        # What goes on for as long as somebody watches is shown as it comes.
        if args[0] in COMMANDS and COMMANDS[args[0]][1] == "Look" and args[0] != "watch":
            paging.begin()
        return found


def _unknown(name: str, ctx: Context) -> typer.TyperException:
    from difflib import get_close_matches

    from typer._click.exceptions import UsageError as ClickUsageError

    meant = SYNONYMS.get(name) or get_close_matches(name, COMMANDS, n=2)
    text = f"there is no command {name[:40]!r}"
    if meant:
        text += "; did you mean " + ", or ".join(f"{one} ({COMMANDS[one][2]})" for one in meant)
        text = text.replace(".)", ")") + "?"
    return ClickUsageError(text, ctx)


@cache
def load(name: str) -> _Click:
    """A command of the table, from its module: a command of that name there, or all that is there
    as subcommands. Made once: that takes longer than most commands, and nothing of a run stays."""
    module, _, help = COMMANDS[name]
    app = import_module(f"vfiotool.cli.{module}").app
    _furnish(app)
    for info in app.registered_commands:
        if info.name == name:
            return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)
    group = get_group_from_info(
        TyperInfo(app, cls=_Group, name=name, help=app.info.help or help),
        pretty_exceptions_short=False,
        suggest_commands=True,
        rich_markup_mode=None,
    )
    group.no_args_is_help = True
    return group


def _furnish(app: typer.Typer) -> None:
    for info in app.registered_commands:
        info.cls = _Command
    for below in app.registered_groups:
        below.cls = _Group
        if below.typer_instance is not None:
            below.typer_instance.info.cls = _Group
            _furnish(below.typer_instance)


def _version(ctx: Context, parameter: Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        output.write(f"vfiotool {__version__}")
        ctx.exit()


def program() -> Program:
    """The whole program."""
    version = TyperOption(
        param_decls=["-V", "--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_version,
        help="Print the version.",
    )
    return Program(
        name="vfiotool",
        params=[version],
        help=_HELP,
        epilog=_EPILOG,
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run(arguments: list[str], chosen: Globals) -> int:
    """Run the command; returns its exit code. What the global options were goes to `chosen`.

    Raises UsageError for arguments that the command does not take, with its usage line as hint.
    """
    whole = program()
    # Not `main` of typer's, which has its own ideas of signals and of pipes that close.
    try:
        with whole.make_context("vfiotool", list(arguments), obj=chosen) as context:
            outcome = whole.invoke(context)
    except _HelpWanted as wanted:
        output.warn(wanted.text)
        return 2
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        raise _as_usage_error(error) from error
    return outcome if isinstance(outcome, int) else 0


def _as_usage_error(error: typer.TyperException) -> UsageError:
    """What typer found wrong, with how the command is used."""
    context: Context | None = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".")
    hint = "vfiotool --help"
    if context is not None:
        usage = " ".join(context.get_usage().split()).removeprefix("Usage: ")
        hint = f"usage: {usage}\n{context.command_path} --help"
    return UsageError(message[:1].lower() + message[1:], hint=hint)
