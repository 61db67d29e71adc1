"""What all commands share: global options, the chosen host, JSON and people's output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfiotool.cli.declare import Context
from vfiotool.cli.style import coloured, escape, escape_line, paint
from vfiotool.errors import UsageError
from vfiotool.host.host import Host

if TYPE_CHECKING:
    from rich.console import Console

FORMAT_VERSION = "1.0"


@dataclass(frozen=True)
class State:
    """The global options."""

    root: str | None = None
    json: bool = False
    debug: bool = False


def state(context: Context) -> State:
    """The global options that the command was called with."""
    return context.state


def host(context: Context) -> Host:
    """The host that `--root` names: this machine, a directory, or a snapshot file."""
    return open_host(state(context).root)


def open_host(root: str | None) -> Host:
    """As `host`, from the option's text. Raises UsageError for a root that cannot be used."""
    if root is None:
        return Host.local()
    from vfiotool.snapshot.capture import open_root

    return open_root(root)


def emit(payload: Mapping[str, object]) -> None:
    """Print one JSON object, `format_version` first, on standard output."""
    whole = {"format_version": FORMAT_VERSION, **payload}
    sys.stdout.write(json.dumps(whole, indent=2) + "\n")


def console() -> Console:
    """A rich console, for what is more than lines: importing rich costs more than most commands."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def write(*parts: str | tuple[str, str]) -> None:
    """A line on standard output. A part is text, or text and its style, such as `bold red`.

    What could steer a terminal is escaped. Styles are shown on terminals alone, or as NO_COLOR
    and FORCE_COLOR have it.
    """
    colour = coloured()
    texts = [
        paint(part, "", colour) if isinstance(part, str) else paint(*part, colour) for part in parts
    ]
    sys.stdout.write("".join(texts) + "\n")


def uuid_of(option: str, text: str) -> str:
    """A UUID in its usual spelling. Raises UsageError, which names the option."""
    from uuid import UUID

    try:
        return str(UUID(text))
    except ValueError as error:
        raise UsageError(f"{option} {text[:40]!r} is no UUID", hint="uuidgen") from error


def say(text: str) -> None:
    """A line for people on standard error: warnings and notes, so that JSON stays alone."""
    sys.stderr.write(escape(text) + "\n")


__all__ = [
    "FORMAT_VERSION",
    "State",
    "console",
    "emit",
    "escape",
    "escape_line",
    "host",
    "open_host",
    "say",
    "state",
    "write",
]
