"""The part of YAML that netplan and Kubernetes objects are written in: no dependency reads it here.

Block and flow mappings and lists, plain and quoted scalars (all as text), comments, several
documents. Anchors, tags, block scalars and complex keys are refused, never misread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.errors import UsageError

Node = str | list["Node"] | dict[str, "Node"]
_DEEPEST = 40
_KEY = re.compile(
    r"""("[^"]*"|'[^']*'|[^\s\[\]{}&*!|>'"%@`#,-][^:#]*?|-[^\s:][^:#]*?)\s*:(?:\s+|$)"""
)
_REFUSED = re.compile(r"^[&*!|>%@`?](\s|\S|$)")


@dataclass(frozen=True)
class _Line:
    number: int
    depth: int
    text: str


def parse_yaml(text: str, where: str) -> list[Node]:
    """The documents of a text. Raises UsageError, with the line, for what is not understood."""
    documents: list[list[_Line]] = [[]]
    for number, raw in enumerate(text.splitlines(), 1):
        stripped = _without_comment(raw)
        if stripped.startswith("---"):
            documents.append([])
            stripped = " " * 3 + stripped[3:]
        elif stripped.startswith("..."):
            continue
        if not stripped.strip():
            continue
        if "\t" in stripped[: len(stripped) - len(stripped.lstrip())]:
            raise _wrong(where, number, "a tab indents it")
        depth = len(stripped) - len(stripped.lstrip(" "))
        documents[-1].append(_Line(number, depth, stripped.strip()))
    found = []
    for lines in documents:
        if lines:
            reader = _Reader(lines, where)
            found.append(reader.block(lines[0].depth, 0))
            reader.end()
    return found


def _wrong(where: str, number: int, what: str) -> UsageError:
    return UsageError(
        f"{where}:{number}: {what}: this YAML is not understood",
        hint="write the settings as plain keys and values, then import again",
    )


def _without_comment(line: str) -> str:
    quote = ""
    for index, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and (index == 0 or line[index - 1] in " [{,:-"):
            quote = char
        elif char == "#" and (index == 0 or line[index - 1] in " \t"):
            return line[:index].rstrip()
    return line.rstrip()


class _Reader:
    def __init__(self, lines: list[_Line], where: str) -> None:
        self.lines, self.where, self.at = lines, where, 0

    def end(self) -> None:
        if self.at < len(self.lines):
            raise _wrong(self.where, self.lines[self.at].number, "its indentation fits nothing")

    def block(self, depth: int, level: int) -> Node:
        line = self.lines[self.at]
        if level > _DEEPEST:
            raise _wrong(self.where, line.number, "it is nested too deeply")
        if line.text == "-" or line.text.startswith("- "):
            return self.sequence(depth, level)
        if _KEY.match(line.text):
            return self.mapping(depth, level)
        self.at += 1
        return self.value(line, line.text)

    def sequence(self, depth: int, level: int) -> Node:
        items: list[Node] = []
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if line.depth != depth or not (line.text == "-" or line.text.startswith("- ")):
                break
            rest = line.text[1:].lstrip()
            if not rest:
                self.at += 1
                items.append(self.below(depth, level))
                continue
            # `- key: value` opens a mapping at the key's own column.
            inner = depth + len(line.text) - len(rest)
            self.lines[self.at] = _Line(line.number, inner, rest)
            items.append(self.block(inner, level + 1))
        return items

    def mapping(self, depth: int, level: int) -> Node:
        found: dict[str, Node] = {}
        while self.at < len(self.lines) and self.lines[self.at].depth == depth:
            line = self.lines[self.at]
            match = _KEY.match(line.text)
            if match is None:
                break
            key, rest = _plain(match[1]), line.text[match.end() :].strip()
            if key in found:
                raise _wrong(self.where, line.number, f"the key {key[:60]!r} stands twice")
            self.at += 1
            found[key] = self.value(line, rest) if rest else self.below(depth, level, lists=True)
        return found

    def below(self, depth: int, level: int, *, lists: bool = False) -> Node:
        """What stands deeper than `depth`; a list may stand at its key's own depth."""
        if self.at >= len(self.lines):
            return ""
        line = self.lines[self.at]
        flat = lists and line.depth == depth and (line.text == "-" or line.text.startswith("- "))
        if line.depth > depth or flat:
            return self.block(line.depth, level + 1)
        return ""

    def value(self, line: _Line, text: str) -> Node:
        if _REFUSED.match(text):
            raise _wrong(self.where, line.number, f"{text[:40]!r} begins with a sign of its own")
        if text[:1] not in "[{":
            return _plain(text)
        # A flow collection may go on over several lines.
        while text.count("[") + text.count("{") > text.count("]") + text.count("}"):
            if self.at >= len(self.lines):
                raise _wrong(self.where, line.number, "a bracket is not closed")
            text += " " + self.lines[self.at].text
            self.at += 1
        node, rest = self.flow(line, text, 0)
        if rest.strip():
            raise _wrong(self.where, line.number, f"{rest.strip()[:40]!r} follows a bracket")
        return node

    def flow(self, line: _Line, text: str, level: int) -> tuple[Node, str]:
        text = text.lstrip()
        if level > _DEEPEST:
            raise _wrong(self.where, line.number, "it is nested too deeply")
        if text[:1] == "[":
            return self.flow_items(line, text[1:], level, "]")
        if text[:1] == "{":
            return self.flow_items(line, text[1:], level, "}")
        match = re.match(r"""\s*("[^"]*"|'[^']*'|[^,\[\]{}]*)""", text)
        assert match is not None
        return _plain(match[1].strip()), text[match.end() :]

    def flow_items(self, line: _Line, text: str, level: int, closing: str) -> tuple[Node, str]:
        items: list[Node] = []
        pairs: dict[str, Node] = {}
        while True:
            text = text.lstrip()
            if not text:
                raise _wrong(self.where, line.number, "a bracket is not closed")
            if text[0] == closing:
                return (pairs if closing == "}" else items), text[1:]
            if text[0] == ",":
                text = text[1:]
                continue
            if closing == "]":
                if text[0] in "]}":
                    raise _wrong(self.where, line.number, "a bracket closes another one")
                item, text = self.flow(line, text, level + 1)
                items.append(item)
                continue
            match = re.match(r"""("[^"]*"|'[^']*'|[^\s:,\[\]{}]+)\s*:\s*""", text)
            if match is None:
                raise _wrong(self.where, line.number, f"{text[:40]!r} is not a key and a value")
            pairs[_plain(match[1])], text = self.flow(line, text[match.end() :], level + 1)


def _plain(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text
