"""Objects as YAML: block style, every string that could be read otherwise quoted as JSON does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9/._-]*(?: [A-Za-z0-9/._-]+)*", re.ASCII)
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def document(value: Mapping[str, object]) -> str:
    """One document, with a newline at its end."""
    return "\n".join(_lines(value, 0)) + "\n"


def documents(values: Sequence[Mapping[str, object]]) -> str:
    """Several documents, `---` between them."""
    return "---\n".join(document(value) for value in values)


def _lines(value: object, depth: int) -> Iterator[str]:
    pad = "  " * depth
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _entry(f"{pad}{_scalar(str(key))}:", inner, depth)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            rows = list(_lines(inner, depth + 1))
            # The first row stands behind the dash.
            yield f"{pad}- {rows[0].lstrip()}"
            yield from rows[1:]
    else:
        yield pad + _scalar(value)


def _entry(head: str, value: object, depth: int) -> Iterator[str]:
    nested = isinstance(value, Mapping | list | tuple)
    if nested and not value:
        yield f"{head} {'{}' if isinstance(value, Mapping) else '[]'}"
    elif nested:
        yield head
        yield from _lines(value, depth + 1)
    else:
        yield f"{head} {_scalar(value)}"


def _scalar(value: object) -> str:
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) is not None and value.lower() not in _WORDS
        return value if plain else json.dumps(value)
    return json.dumps(value)
