"""Where each key of a TOML document stands: tomllib gives values, errors need lines and columns.

The scanner takes text that tomllib has accepted, so it follows the grammar (toml.io/en/v1.0.0)
without checking it again.
"""

from __future__ import annotations

import re

Place = tuple[int, int]
Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*"{3,5}|'
    r"'''(?:[^']|'(?!''))*'{3,5}|"
    r'"(?:[^"\\]|\\.)*"|'
    r"'[^']*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}\n#]*")


def key_places(text: str) -> dict[Path, Place]:
    """Each key's and array element's line and column, both from 1.

    A path is the keys and indices that lead to it: `("device", 0, "match", "id")`.
    """
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places: dict[Path, Place] = {}
        self.counts: dict[Path, int] = {}
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def run(self) -> dict[Path, Place]:
        table: Path = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)
        return self.places

    def _place(self) -> Place:
        from bisect import bisect_right

        line = bisect_right(self.line_starts, self.at)
        return line, self.at - self.line_starts[line - 1] + 1

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return match[0]

    def _header(self) -> Path:
        place = self._place()
        array = self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        names = self._key()
        self.at += 2 if array else 1
        path: Path = ()
        for index, name in enumerate(names):
            path = (*path, name)
            last = index == len(names) - 1
            if last and array:
                self.counts[path] = self.counts.get(path, 0) + 1
            if path in self.counts:
                path = (*path, self.counts[path] - 1)
            self.places.setdefault(path, place)
        return path

    def _key(self) -> list[str]:
        """A dotted key; leaves the position after it and the spaces that follow."""
        names = []
        while True:
            self._skip(_SPACE)
            if self.text[self.at] in "\"'":
                names.append(_unquote(self._skip(_STRING)))
            else:
                names.append(self._skip(_BARE))
            self._skip(_SPACE)
            if self.text[self.at] != ".":
                return names
            self.at += 1

    def _pair(self, table: Path) -> None:
        self._skip(_SPACE)
        place = self._place()
        path: Path = table
        for name in self._key():
            path = (*path, name)
            self.places.setdefault(path, place)
        self.at += 1
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        char = self.text[self.at]
        if char in "\"'":
            self._skip(_STRING)
        elif char == "[":
            self._array(path)
        elif char == "{":
            self._inline_table(path)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        self.at += 1
        index = 0
        self._skip(_BLANK)
        while self.text[self.at] != "]":
            self.places[(*path, index)] = self._place()
            self._value((*path, index))
            index += 1
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(_BLANK)
        self.at += 1

    def _inline_table(self, path: Path) -> None:
        self.at += 1
        self._skip(_BLANK)
        while self.text[self.at] != "}":
            self._pair(path)
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(_BLANK)
        self.at += 1


def _unquote(text: str) -> str:
    """The name of a quoted key; escapes are rare enough to be left to tomllib."""
    if "\\" not in text:
        return text[1:-1]
    import tomllib

    return str(tomllib.loads(f"x = {text}")["x"])
