"""All that vfiotool prints: escaped, coloured on terminals, paged there, in ASCII where it must be.

Text for people and the one JSON object go to standard output, notes and errors to standard error.
Nothing else in the package prints (tests/cli/test_output.py). Importing this imports next to
nothing; rich is imported where a terminal shows a table or where a tree is drawn.
"""

from __future__ import annotations

import os
import sys
from itertools import islice

from vfiotool.cli import paging
from vfiotool.cli.style import coloured, encodable, encoding_of, escape, escape_line, paint
from vfiotool.errors import UsageError, from_oserror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, BinaryIO, TextIO

    from rich.console import Console
    from rich.tree import Tree

    # Text, or text and its style, such as ("no", "bold red").
    Part = str | tuple[str, str]

FORMAT_VERSION = "1.0"
# A file or a pipe has no edge to cut lines at.
_FILE_WIDTH = 200

_ROWS_AT_ONCE = 32
# Characters of a line that a pipe takes without anybody waiting.
_AT_ONCE = 1000

_quiet = False
_aside = False


def begin(*, quiet: bool = False) -> None:
    """Say at the start of a command whether notes are wanted."""
    global _quiet, _aside
    _quiet, _aside = quiet, False


def step_aside() -> None:
    """Have text for people go to standard error from here on, as standard output carries a stream
    that a program reads."""
    global _aside
    _aside = True


def _stream() -> TextIO:
    return sys.stderr if _aside else sys.stdout


def quiet() -> bool:
    """Whether notes and progress are to be left out."""
    return _quiet


def _send(text: str) -> None:
    pipe = paging.target()
    if _aside or pipe is None:
        _stream().write(encodable(text, _stream()))
    else:
        pipe(encodable(text, sys.stdout))


def flush() -> None:
    """Have what was printed leave this process now: for what is printed as it happens."""
    _stream().flush()


def emit(payload: Mapping[str, object]) -> None:
    """Print one JSON object, `format_version` first."""
    import json

    whole = {"format_version": FORMAT_VERSION, **payload}
    _send(json.dumps(whole, indent=2) + "\n")


def emit_rows(key: str, rows: Iterable[str]) -> None:
    """Print one JSON object of a list, a row a line: `jq` and `diff` like that, and a long listing
    is printed while it is read. Each row is JSON text."""
    _send(f'{{"format_version": "{FORMAT_VERSION}", "{key}": [')
    pending = iter(rows)
    separator = "\n"
    while some := list(islice(pending, _ROWS_AT_ONCE)):
        _send(separator)
        _send(",\n".join(some))
        separator = ",\n"
    _send("\n]}\n")


def emit_line(payload: Mapping[str, object]) -> None:
    """Print one JSON object on one line: for what has no end, such as `watch`."""
    import json

    _send(json.dumps(payload) + "\n")


def write(*parts: Part) -> None:
    """A line, on a terminal folded to its width. What could steer a terminal is escaped, newlines
    too."""
    colour = coloured(_stream())
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    lines = [[(escape_line(text), style) for text, style in pairs]]
    if _stream().isatty():
        from vfiotool.cli.fold import fold, width_of

        lines = fold(lines[0], width_of(_stream()))
    for line in lines:
        texts = [paint(text, style, colour) for text, style in line]
        _send(("".join(texts) if colour else "".join(texts).rstrip()) + "\n")


def text(block: str) -> None:
    """Lines of text as they are, such as a policy; control characters are escaped."""
    _send(escape(block) if block.endswith("\n") else escape(block) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[Part]]) -> None:
    """A header and rows in columns; on a terminal as many columns as fit (`cut`).

    Prints nothing for no rows.
    """
    cells = [[part if isinstance(part, tuple) else (part, "") for part in row] for row in rows]
    if not cells:
        return
    lines = [[(escape_line(text), style) for text, style in row] for row in cells]
    lines.insert(0, [(name, "bold") for name in header])
    widths = [max(len(line[number][0]) for line in lines) for number in range(len(header))]
    if _stream().isatty():
        from vfiotool.cli.fold import cut, width_of

        widths = cut(widths, width_of(_stream()))
    ellipsis = "…" if encoding_of(_stream()) == "utf-8" else "..."
    for line in lines:
        joined: list[Part] = []
        for (text, style), width in zip(line, widths):  # noqa: B905
            shown = text if len(text) <= width else text[: width - len(ellipsis)] + ellipsis
            joined += [(shown, style), " " * (width - len(shown) + 2)]
        write(*joined[:-1])


class _Sink:
    """What rich writes to: our own way out."""

    @property
    def encoding(self) -> str:
        return encoding_of(sys.stdout)

    def write(self, text: str) -> int:
        _send(text)
        return len(text)

    def flush(self) -> None:
        return None

    def isatty(self) -> bool:
        return sys.stdout.isatty()


def console() -> Console:
    """A rich console on standard output. What is handed to it has to be escaped before."""
    from typing import IO, cast

    from rich.console import Console

    colour = coloured(sys.stdout)
    return Console(
        file=cast("IO[str]", _Sink()),
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        width=None if sys.stdout.isatty() else _FILE_WIDTH,
        highlight=False,
        soft_wrap=False,
        emoji=False,
        markup=False,
    )


def trees(roots: Iterable[Tree]) -> None:
    """Draw trees whose labels are escaped already."""
    out = console()
    for root in roots:
        out.print(root)


def say(text: str) -> None:
    """A note for people on standard error; -q leaves it out."""
    if not _quiet:
        warn(text)


def warn(text: str) -> None:
    """As `say`, for what -q does not leave out."""
    _aside_send(escape(text) + "\n")


def _aside_send(text: str) -> None:
    """Write to standard error. Where that is full or its reader gone, the command goes on: its
    exit code counts, and a change that stands or was rolled back is told by that."""
    try:
        sys.stderr.write(encodable(text, sys.stderr))
        sys.stderr.flush()
    except (OSError, ValueError):
        # Nothing more is tried, nor by the interpreter at its end.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def log(text: str) -> None:
    """As `warn`, of a program that serves others: they are not to wait for who reads this. What
    standard error would not take at once is left out."""
    for line in text.splitlines():
        try:
            _offer(sys.stderr, escape_line(line))
        except (OSError, ValueError):
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def offer(text: str) -> bool:
    """Print a line if standard output takes it at once; whether it did. Raises OSError where its
    reader has gone or there is no room."""
    return _offer(sys.stdout, escape_line(text))


def _offer(stream: TextIO, line: str) -> bool:
    from select import POLLOUT, poll

    looked = poll()
    try:
        looked.register(stream.fileno(), POLLOUT)
    except ValueError:
        pass  # in memory, which takes everything
    else:
        if not looked.poll(0):
            return False
    # A pipe that is ready takes PIPE_BUF bytes (pipe(7)); a character has four at most.
    stream.write(encodable(line[:_AT_ONCE] + "\n", stream))
    stream.flush()
    return True


def progress(text: str) -> None:
    """A note on what runs now, left out where the terminal would not take it at once: what is under
    way holds locks, and a terminal that is stopped or gone must not hold it up."""
    from contextlib import suppress
    from select import select

    with suppress(OSError, ValueError):
        if select([], [sys.stderr], [], 0)[1]:
            say(text)


def error(message: str, hint: str | None) -> None:
    """An error and what to type next, on standard error."""
    colour = coloured(sys.stderr)
    _aside_send(paint("vfiotool:", "bold red", colour))
    warn(f" {message}")
    for line in (hint or "").split("\n"):
        if line:
            warn(f"  {line}")


def traceback() -> None:
    """The traceback of the exception in hand, for --debug."""
    from traceback import format_exc

    warn(format_exc().rstrip("\n"))


def forward(data: bytes, *, error: bool = False) -> None:
    """Bytes of another program's output, as they are."""
    stream = sys.stderr if error else sys.stdout
    stream.buffer.write(data)
    stream.buffer.flush()


def opened(path: str) -> AbstractContextManager[BinaryIO]:
    """A file to write bytes to, or standard output for `-`. Raises UsageError, NotPermitted."""
    from contextlib import nullcontext

    if path == "-":
        sys.stdout.flush()
        return nullcontext(sys.stdout.buffer)
    try:
        return open(path, "wb")
    except OSError as error:
        raise cannot("write", path, error) from error


def save(path: str, content: str) -> None:
    """Write text to a file, or to standard output for `-`. Raises OSError."""
    if path == "-":
        sys.stdout.write(content)
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(content)


def cannot(what: str, path: str, error: OSError) -> Exception:
    """The error for a file that the user named and that cannot be read or written."""
    if error.errno in (1, 13):
        return from_oserror(f"{what} {path}", error)
    return UsageError(f"cannot {what} {path}: {error.strerror}")


def is_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def interactive() -> bool:
    """Whether notes on progress reach a person: standard error is a terminal."""
    return not _quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def report(payload: Any, *, as_json: bool) -> None:
    """An error's own shape: JSON on standard output, or its message and hint."""
    if as_json:
        import json

        _send(json.dumps(payload.as_json(), indent=2) + "\n")
    else:
        error(payload.message, payload.hint)


__all__ = [
    "FORMAT_VERSION",
    "begin",
    "cannot",
    "console",
    "emit",
    "emit_line",
    "emit_rows",
    "error",
    "escape",
    "escape_line",
    "flush",
    "forward",
    "interactive",
    "is_terminal",
    "opened",
    "progress",
    "quiet",
    "report",
    "save",
    "say",
    "table",
    "text",
    "traceback",
    "trees",
    "warn",
    "write",
]
