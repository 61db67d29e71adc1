"""What all commands share: global options, the chosen host, JSON and people's output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vfiotool.cli.declare import Context
from vfiotool.host import Host
from vfiotool.values import dataclass

if TYPE_CHECKING:
    from rich.console import Console

FORMAT_VERSION = "1.0"
# Select Graphic Rendition, ECMA-48 8.3.117.
_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


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
    from vfiotool.snapshot import open_root

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
    colour = _coloured()
    sys.stdout.write("".join(_part(part, colour) for part in parts) + "\n")


def _coloured() -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _part(part: str | tuple[str, str], colour: bool) -> str:
    if isinstance(part, str):
        return escape_line(part)
    text, style = escape_line(part[0]), part[1]
    if not (colour and style and text):
        return text
    codes = ";".join(str(_CODES[word]) for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m"


def say(text: str) -> None:
    """A line for people on standard error: warnings and notes, so that JSON stays alone."""
    sys.stderr.write(escape(text) + "\n")


def escape(text: str) -> str:
    """`text` with control characters and other unprintables as escapes; newlines are kept.

    Names come from devices and may hold terminal escape sequences.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def escape_line(text: str) -> str:
    """As `escape`, newlines too: for a name that stands within a line or a table."""
    return escape(text).replace("\n", "\\n")
