"""What commands are called with: the global options, and the host that `--root` names.

Each module of commands has an `app`; `commands.py` names the module, `program.py` puts them
together. Options that several commands take are declared here, once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vfiotool.cli import candidates
from vfiotool.cli.globals import Globals, open_host
from vfiotool.errors import UsageError
from vfiotool.host.host import Host

SELECTORS = (
    "A PCI address (0000:05:01.0, 05:01.0), net:eth0, block:nvme0n1, id:10de:2684, serial:…, "
    "slot:…, path:…, vf:PF/INDEX, class:…, driver:…, group:…, or an mdev's UUID."
)
DeviceArgument = Annotated[
    str, typer.Argument(metavar="DEVICE", help=SELECTORS, autocompletion=candidates.devices)
]
DevicesArgument = Annotated[
    list[str], typer.Argument(metavar="DEVICE…", help=SELECTORS, autocompletion=candidates.devices)
]


def area(help: str = "") -> typer.Typer:
    """The commands of a module; of a group of subcommands with the group's help."""
    return typer.Typer(help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def examples(*lines: str) -> str:
    """The end of a help page: what one types."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def options(context: typer.Context) -> Globals:
    """The global options that the command was called with."""
    found = context.find_object(Globals)
    return Globals() if found is None else found


def wants_json(context: typer.Context) -> bool:
    """Whether one JSON object is wanted."""
    return options(context).json


def remember_done(context: typer.Context, what: str, code: int = 0) -> None:
    """Note what stands now, before it is reported: a report that is lost does not undo it, and the
    exit code is then this one."""
    chosen = options(context)
    chosen.stands, chosen.code = what, code


def host_of(context: typer.Context) -> Host:
    """The host that `--root` names: this machine, a directory, or a snapshot file."""
    return open_host(options(context).root)


def uuid_of(option: str, text: str) -> str:
    """A UUID in its usual spelling. Raises UsageError, which names the option."""
    from uuid import UUID

    try:
        return str(UUID(text))
    except ValueError as error:
        raise UsageError(f"{option} {text[:40]!r} is not a valid UUID", hint="uuidgen") from error
