"""Text for terminals: escaped, styled, in ASCII where that is wanted. Imports next to nothing."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

# Select Graphic Rendition, ECMA-48 8.3.117.
_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "magenta": 35, "cyan": 36}
# What we print ourselves beyond ASCII; what devices are called is escaped instead.
_ASCII = str.maketrans(
    {
        "…": "...",
        "–": "-",
        "—": "-",
        "×": "x",
        "·": "|",
        "µ": "u",
        "→": "->",
        "✓": "ok",
        "✗": "no",
        "└": "`",
        "├": "|",
        "│": "|",
        "─": "-",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
    }
)


def coloured(stream: TextIO) -> bool:
    """Whether a stream takes styles: a terminal, or as NO_COLOR and FORCE_COLOR have it."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def encoding_of(stream: TextIO) -> str:
    """`utf-8`, or what else a stream takes; `ascii` in a C locale, which Python calls UTF-8."""
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
    chosen = os.environ.get("PYTHONIOENCODING") or os.environ.get("PYTHONUTF8") == "1"
    if encoding.replace("-", "") == "utf8":
        return "ascii" if os.environ.get("LC_ALL") in ("C", "POSIX") and not chosen else "utf-8"
    return encoding


def encodable(text: str, stream: TextIO) -> str:
    """`text` with what a stream's encoding lacks in ASCII, or as an escape."""
    if text.isascii():
        return text
    encoding = encoding_of(stream)
    if encoding == "utf-8":
        # A lone surrogate (a file name that is not UTF-8) is the one thing that UTF-8 lacks.
        return text.encode("utf-8", "backslashreplace").decode()
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode()
    return text


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
