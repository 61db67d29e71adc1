"""Lines that are longer than the terminal is wide, folded between words."""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

# Text and its style.
Run = tuple[str, str]
# What is meant to be typed or pasted is left to the terminal to wrap: copied, it is one line.
_TO_TYPE = "cyan"
_HANGING = 4
_NARROWEST = 6


def width_of(stream: TextIO) -> int | None:
    """The columns of a terminal; None of a stream that is none, or that does not tell."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def fold(runs: list[Run], width: int | None) -> list[list[Run]]:
    """The line as lines of at most `width` columns, the later ones four columns further in.

    A word that is longer stays whole. Lines that end in what is to be typed are not folded.
    """
    whole = "".join(text for text, _ in runs)
    last = next((style for text, style in reversed(runs) if text.strip()), "")
    if width is None or len(whole) <= width or _TO_TYPE in last.split():
        return [runs]
    indent = len(whole) - len(whole.lstrip(" "))
    hanging = " " * (indent + _HANGING if indent + _HANGING <= width // 2 else indent)
    lines: list[list[Run]] = [[]]
    used, space = 0, ""
    for word in _words(runs):
        size = sum(len(text) for text, _ in word)
        if word[0][0].isspace():
            space += word[0][0]
            continue
        if used + len(space) + size > width and used > len(hanging):
            lines.append([(hanging, "")] if hanging else [])
            used, space = len(hanging), ""
        if space:
            before = lines[-1][-1][1] if lines[-1] else word[0][1]
            lines[-1].append((space, before if before == word[0][1] else ""))
        lines[-1] += word
        used, space = used + len(space) + size, ""
    return [_joined(line) for line in lines]


def _joined(line: list[Run]) -> list[Run]:
    """With runs of one style as one."""
    found: list[Run] = []
    for text, style in line:
        if found and found[-1][1] == style:
            found[-1] = (found[-1][0] + text, style)
        else:
            found.append((text, style))
    return found


def cut(widths: list[int], most: int | None, gap: int = 2) -> list[int]:
    """Widths of a table's first columns, as many as `most` columns of a terminal hold.

    The first column, which names the row, keeps its width. The one that does not fit is made
    narrower, down to six; what is left out then stands in the JSON, and on a wider terminal.
    """
    if most is None:
        return widths
    fitted, left = widths[:1], most - widths[0]
    for width in widths[1:]:
        left -= gap
        if left < min(width, _NARROWEST):
            break
        fitted.append(min(width, left))
        left -= width
    return fitted


def _words(runs: list[Run]) -> list[list[Run]]:
    """Spaces, and what stands between them: a word may be of several styles."""
    found: list[list[Run]] = []
    for text, style in runs:
        for piece in re.findall(r" +|[^ ]+", text):
            if found and not piece.isspace() and not found[-1][-1][0].isspace():
                found[-1].append((piece, style))
            else:
                found.append([(piece, style)])
    return found
