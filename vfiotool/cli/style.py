"""Text for terminals: escaped, and styled where styles are wanted. Imports next to nothing."""

from __future__ import annotations

import os
import sys

# Select Graphic Rendition, ECMA-48 8.3.117.
_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


def coloured() -> bool:
    """Whether standard output takes styles: a terminal, or as NO_COLOR and FORCE_COLOR have it."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, colour: bool) -> str:
    """`text` escaped, and if `colour` in a style such as `bold red`."""
    text = escape_line(text)
    if not (colour and style and text):
        return text
    codes = ";".join(str(_CODES[word]) for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m"


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
