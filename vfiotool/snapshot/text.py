"""The snapshot's text form: one diffable file that holds a tree, written and strictly parsed.

A file is a header, then one section a directory, sorted; within it one entry a name, sorted:

    vfiotool snapshot 1
    kernel: 6.12.38

    [/sys/devices/pci0000:00/0000:00:01.0]
    class = 0x00ff00              text that ends in a newline
    label ~ slot 3                text that does not
    uevent |                      several lines, each after "| "
    | DRIVER=edu
    | PCI_ID=1234:11E8
    config # 256                  bytes: the length, then hexadecimal lines; zero lines left out
    # 000: 3412e811030110001000ff00000000000000800000000000 0000000000000000
    driver -> ../../../bus/pci/drivers/edu
    vpd ! EIO                     reading it fails
    rom ?                         it is there, its content was not captured
    [end 12]                      the number of lines above; a file without it was cut off

Everything unprintable and the backslash stand as ``\\xNN`` and ``\\\\``; in names the space too.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NoReturn

from vfiotool.errors import UsageError, errno_name

MAGIC = "vfiotool snapshot 1"
# A content that was not captured reads as this.
NOT_CAPTURED = errno.ENODATA

MAX_TEXT_BYTES = 64 << 20
MAX_FILE_BYTES = 4 << 20
MAX_ENTRIES = 1 << 20
_MAX_LINE = 1 << 20
_MAX_PATH = 4096
_HEX_BYTES = 32
_HEADER = re.compile(r"([a-z][a-z-]{0,30}):(?: (.*))?")
_ENTRY = re.compile(r"(\S+) (->|[=~|#!?])(?: (.*))?")
_HEX_LINE = re.compile(r"# ([0-9a-f]{3,8}): ([0-9a-f]{2,64})")
_END = re.compile(r"\[end ([0-9]{1,9})\]")
# A name that begins like another kind of line has its first character escaped.
_LINE_STARTS = ("[", "|", "#")
_BACKSLASH = re.compile(r"\\(x[0-9a-f]{2}|\\|)")


@dataclass(frozen=True)
class Snapshot:
    """A captured tree and where it came from.

    `files` maps an absolute path to its bytes, or to the errno that reading it gives; `links` to
    the target as `readlink` gives it. `cut_off` says where a truncated file ended, else None.
    """

    header: Mapping[str, str]
    files: Mapping[str, bytes | int]
    links: Mapping[str, str]
    directories: frozenset[str] = frozenset()
    cut_off: str | None = None


def escape(data: bytes, *, is_name: bool = False) -> str:
    """Bytes as printable text on one line; `unescape` gives them back."""
    text = data.decode("utf-8", "surrogateescape")
    if is_name and text[:1] in _LINE_STARTS:
        return f"\\x{ord(text[0]):02x}{escape(data[1:], is_name=True)}"
    if text.isprintable() and "\\" not in text and not text.endswith(" "):
        return text.replace(" ", "\\x20") if is_name else text
    parts = []
    for index, char in enumerate(text):
        if char == "\\":
            parts.append("\\\\")
        elif char == " " and (is_name or index == len(text) - 1):
            parts.append("\\x20")
        elif char.isprintable():
            parts.append(char)
        else:
            raw = char.encode("utf-8", "surrogateescape")
            parts.append("".join(f"\\x{byte:02x}" for byte in raw))
    return "".join(parts)


def unescape(text: str) -> bytes:
    """The bytes that `escape` was given. Raises ValueError for any other use of a backslash."""
    data = text.encode()
    if b"\\" not in data:
        return data

    def plain(match: re.Match[str]) -> str:
        code = match.group(1)
        if not code:
            raise ValueError("a backslash that starts no \\xNN or \\\\")
        # Latin-1 stand-ins would clash with real text, so escapes go through surrogates.
        if code == "\\":
            return "\\"
        return bytes([int(code[1:], 16)]).decode("utf-8", "surrogateescape")

    return _BACKSLASH.sub(plain, text).encode("utf-8", "surrogateescape")


def format_snapshot(snapshot: Snapshot) -> str:
    """The text of a snapshot; the same for the same tree, in whatever order it was captured."""
    lines = [MAGIC]
    for key, value in sorted(snapshot.header.items()):
        lines.append(f"{key}: {escape(value.encode())}".rstrip())
    sections: dict[str, list[str]] = {path: [] for path in snapshot.directories if path != "/"}
    for path in (*snapshot.files, *snapshot.links):
        parent, _, name = path.rpartition("/")
        sections.setdefault(parent or "/", []).append(name)
    # A directory that only leads to others is implied by them.
    leading = {path.rpartition("/")[0] for path in sections}
    for path in sorted(sections):
        if not sections[path] and path in leading:
            continue
        lines += ["", f"[{escape(path.encode('utf-8', 'surrogateescape'), is_name=True)}]"]
        prefix = "" if path == "/" else path
        for name in sorted(sections[path]):
            lines += _entry_lines(snapshot, name, f"{prefix}/{name}")
    if not sections:
        lines.append("")
    lines.append(f"[end {len(lines)}]")
    return "\n".join(lines) + "\n"


def _entry_lines(snapshot: Snapshot, name: str, path: str) -> Iterator[str]:
    name = escape(name.encode("utf-8", "surrogateescape"), is_name=True)
    target = snapshot.links.get(path)
    if target is not None:
        yield f"{name} -> {escape(target.encode('utf-8', 'surrogateescape'))}"
        return
    content = snapshot.files[path]
    if content == NOT_CAPTURED:
        yield f"{name} ?"
    elif isinstance(content, int):
        yield f"{name} ! {errno_name(content)}"
    elif not _is_text(content):
        yield f"{name} # {len(content)}"
        for offset in range(0, len(content), _HEX_BYTES):
            piece = content[offset : offset + _HEX_BYTES]
            if any(piece):
                yield f"# {offset:03x}: {piece.hex()}"
    elif not content.endswith(b"\n"):
        yield from _text_lines(name, "~", content)
    else:
        yield from _text_lines(name, "=", content[:-1])


def _text_lines(name: str, sign: str, content: bytes) -> Iterator[str]:
    if b"\n" not in content:
        yield f"{name} {sign} {escape(content)}".rstrip()
        return
    yield f"{name} |" if sign == "=" else f"{name} | ~"
    for line in content.split(b"\n"):
        yield f"| {escape(line)}".rstrip()


def _is_text(content: bytes) -> bool:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        # A line of text with a few stray bytes reads better escaped than in hexadecimal.
        text = content.decode("utf-8", "surrogateescape")
    odd = sum(not char.isprintable() and char not in "\n\t" for char in text[:4096])
    return "\0" not in text and odd * 8 <= min(len(text), 4096)


def parse_snapshot(data: bytes, name: str) -> Snapshot:
    """Parse a snapshot's text (unpacked).

    A file that was cut off gives what came before the cut, and `cut_off` says so. Anything else
    that is not of the form raises UsageError with `name` and the line's number.
    """
    return _Parser(name).parse(data)


@dataclass
class _Parser:
    name: str
    header: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes | int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    directories: dict[str, int] = field(default_factory=dict)
    number: int = 0
    held_bytes: int = 0
    unfinished: str | None = None

    def parse(self, data: bytes) -> Snapshot:
        if len(data) > MAX_TEXT_BYTES:
            self._fail(f"a snapshot has at most {MAX_TEXT_BYTES} bytes, this has {len(data)}")
        lines = data.split(b"\n")
        whole = lines.pop() == b""
        if not lines or lines[0] != MAGIC.encode():
            self.number = 1
            self._fail(f"a snapshot begins with {MAGIC!r}")
        index = self._parse_header(lines)
        section = ""
        while index < len(lines):
            self.number = index + 1
            line = self._decode(lines[index])
            index += 1
            if not line:
                continue
            if line.startswith("["):
                end = _END.fullmatch(line)
                if end is not None:
                    self._check_end(int(end.group(1)), index - 1, len(lines), whole)
                    return self._result(None)
                section = self._section(line)
                continue
            if not section:
                self._fail("an entry before the first section")
            index = self._entry(section, line, lines, index)
        return self._result(f"{self.name} was cut off after line {len(lines)}")

    def _fail(self, reason: str) -> NoReturn:
        raise UsageError(
            f"{self.name}:{self.number}: {reason}",
            hint="take the snapshot again: vfiotool snapshot FILE",
        )

    def _decode(self, line: bytes) -> str:
        if len(line) > _MAX_LINE:
            self._fail(f"a line has at most {_MAX_LINE} bytes, this has {len(line)}")
        try:
            return line.decode()
        except UnicodeDecodeError:
            self._fail("not UTF-8 text")

    def _unescape(self, text: str) -> bytes:
        try:
            return unescape(text)
        except ValueError as error:
            self._fail(str(error))

    def _parse_header(self, lines: list[bytes]) -> int:
        index = 1
        while index < len(lines) and lines[index]:
            self.number = index + 1
            match = _HEADER.fullmatch(self._decode(lines[index]))
            if match is None:
                self._fail("not a header line `key: value`")
            value = self._unescape(match.group(2) or "").decode("utf-8", "backslashreplace")
            if self.header.setdefault(match.group(1), value) is not value:
                self._fail(f"the header {match.group(1)} stands twice")
            index += 1
        return index

    def _section(self, line: str) -> str:
        if not line.endswith("]"):
            self._fail("a section is written [/path]")
        raw = self._unescape(line[1:-1])
        path = raw.decode("utf-8", "surrogateescape")
        parts = path.split("/")
        clean = path == "/" or (
            parts[0] == "" and len(parts) > 1 and all(p not in ("", ".", "..") for p in parts[1:])
        )
        if not clean or "\0" in path or len(raw) > _MAX_PATH:
            self._fail("a section's path is absolute and without `.`, `..` or empty parts")
        if path in self.directories:
            self._fail(f"the section {path[:200]!r} stands twice")
        self.directories[path] = self.number
        self._count()
        return path

    def _count(self) -> None:
        if len(self.files) + len(self.links) + len(self.directories) > MAX_ENTRIES:
            self._fail(f"a snapshot has at most {MAX_ENTRIES} entries")

    def _entry(self, section: str, line: str, lines: list[bytes], index: int) -> int:
        match = _ENTRY.fullmatch(line)
        if match is None:
            self._fail("not an entry `name = text`")
        raw_name, sign, rest = match.groups()
        name = self._unescape(raw_name).decode("utf-8", "surrogateescape")
        if "/" in name or "\0" in name or name in (".", "..") or len(name) > 255:
            self._fail("a name is one path component of at most 255 characters")
        path = f"/{name}" if section == "/" else f"{section}/{name}"
        if path in self.files or path in self.links:
            self._fail(f"{path[:200]!r} stands twice")
        if sign == "->":
            target = self._unescape(rest or "")
            if not target or len(target) > _MAX_PATH or b"\0" in target:
                self._fail(f"a link's target has 1 to {_MAX_PATH} bytes")
            self.links[path] = target.decode("utf-8", "surrogateescape")
        elif sign == "|":
            index = self._block(path, rest, lines, index)
        elif sign == "#":
            index = self._bytes(path, rest, lines, index)
        else:
            self.files[path] = self._one_line(sign, rest)
        self._count()
        return index

    def _one_line(self, sign: str, rest: str | None) -> bytes | int:
        if sign == "?":
            if rest is not None:
                self._fail("nothing follows `?`")
            return NOT_CAPTURED
        if sign == "!":
            number = _errno_of(rest or "")
            if number is None:
                self._fail("`!` is followed by the name of an errno")
            return number
        return self._unescape(rest or "") + (b"\n" if sign == "=" else b"")

    def _block(self, path: str, rest: str | None, lines: list[bytes], index: int) -> int:
        if rest not in (None, "~"):
            self._fail("nothing or `~` follows `|`")
        found: list[bytes] = []
        size = 0
        while index < len(lines) and lines[index][:1] == b"|":
            self.number = index + 1
            line = self._decode(lines[index])
            if line not in ("|", "| ") and not line.startswith("| "):
                self._fail("a line of text begins with `| `")
            found.append(self._unescape(line[2:]))
            size += len(found[-1]) + 1
            if size > MAX_FILE_BYTES:
                self._fail(f"a file has at most {MAX_FILE_BYTES} bytes")
            index += 1
        self._hold(path, size, at_end=index == len(lines))
        self.files[path] = b"\n".join(found) + (b"" if rest == "~" else b"\n")
        return index

    def _bytes(self, path: str, rest: str | None, lines: list[bytes], index: int) -> int:
        if rest is None or not rest.isascii() or not rest.isdecimal() or len(rest) > 9:
            self._fail("`#` is followed by the number of bytes")
        size = int(rest)
        if size > MAX_FILE_BYTES:
            self._fail(f"a file has at most {MAX_FILE_BYTES} bytes")
        self._hold(path, size, at_end=False)
        content = bytearray(size)
        filled = 0
        while index < len(lines) and lines[index][:1] == b"#":
            self.number = index + 1
            match = _HEX_LINE.fullmatch(self._decode(lines[index]))
            if match is None or len(match.group(2)) % 2:
                self._fail("not a line `# offset: hexadecimal bytes`")
            offset, piece = int(match.group(1), 16), bytes.fromhex(match.group(2))
            if offset < filled or offset + len(piece) > size:
                self._fail("bytes out of order or beyond the file's size")
            content[offset : offset + len(piece)] = piece
            filled = offset + len(piece)
            index += 1
        self._hold(path, 0, at_end=index == len(lines))
        self.files[path] = bytes(content)
        return index

    def _hold(self, path: str, size: int, *, at_end: bool) -> None:
        # A length is a few bytes of text and may ask for millions: count what is asked for.
        self.held_bytes += size
        if self.held_bytes > MAX_TEXT_BYTES:
            self._fail(f"a snapshot holds at most {MAX_TEXT_BYTES} bytes")
        if at_end:
            self.unfinished = path

    def _check_end(self, counted: int, lines_above: int, total: int, whole: bool) -> None:
        if counted != lines_above:
            self._fail(f"the end counts {counted} lines, there are {lines_above}")
        if total != lines_above + 1 or not whole:
            self.number += 1
            self._fail("text after the end")

    def _result(self, cut_off: str | None) -> Snapshot:
        for path, number in self.directories.items():
            above = path
            while above:
                if above in self.files or above in self.links:
                    self.number = number
                    self._fail(f"{above[:200]!r} is a directory and something else as well")
                above = above.rpartition("/")[0]
        if self.unfinished is not None:
            # It may lack lines: better unreadable than wrong.
            self.files[self.unfinished] = errno.EIO
        return Snapshot(self.header, self.files, self.links, frozenset(self.directories), cut_off)


@cache
def _errno_of(name: str) -> int | None:
    """An errno by its name, or by its number where libc has no name for it (ENOTSUPP, 524)."""
    names = {name: number for number, name in errno.errorcode.items()}
    if name in names:
        return names[name]
    number = int(name) if name.isdecimal() and name.isascii() and len(name) < 5 else 0
    named = number in errno.errorcode or name != str(number)
    return number if 0 < number < 4096 and not named else None
