"""What changed between two captures of a host, entry by entry."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass

from vfiotool.errors import UsageError, errno_name
from vfiotool.snapshot.load import load
from vfiotool.snapshot.text import NOT_CAPTURED, Snapshot, escape


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs. `before` and `after` are None where there is nothing at the path.

    Contents are given as in the snapshot's text form: escaped, links as ``-> target``, unreadable
    files as ``! EIO``, bytes as one hexadecimal word a line of 32.
    """

    path: str
    before: str | None
    after: str | None

    def as_json(self) -> dict[str, object]:
        return {"path": self.path, "before": self.before, "after": self.after}

    def lines(self) -> list[str]:
        """The change for people: one line, or for a text of several a diff without context."""
        if self.before is None or self.after is None:
            sign, content = ("+", self.after) if self.before is None else ("-", self.before)
            assert content is not None
            first, *more = content.split("\n")
            return [f"{sign} {self.path}: {first}{f' (and {len(more)} lines)' if more else ''}"]
        if "\n" not in self.before and "\n" not in self.after:
            return [f"~ {self.path}: {self.before} => {self.after}"]
        found = difflib.unified_diff(
            self.before.split("\n"), self.after.split("\n"), lineterm="", n=0
        )
        inner = [line for line in found if not line.startswith(("---", "+++", "@@"))]
        return [f"~ {self.path}:", *(f"    {line}" for line in inner)]


# What differs from one second to the next on a host where nobody does anything.
_VOLATILE = re.compile(
    r"/proc/(interrupts|iomem|modules|mdstat)"
    r"|/proc/(self|\d+)/(?!mountinfo).*"
    r"|/proc/vfiotool/(open-nodes|net-links|caller)"
    r"|/sys/.*/power/(runtime_status|control)"
    r"|/sys/.*/(power_state|current_link_speed|current_link_width|free_hugepages)"
    r"|/sys/.*/(available_instances|domains_used|operstate|carrier|brforward)"
    r"|/sys/.*/(carrier_changes|carrier_(up|down)_count|cur_bus_speed|md/array_state)"
)
# Of these the lines, or the columns, that stay.
_MEMORY = re.compile(r"/proc/meminfo|/sys/devices/system/node/node\d+/meminfo")
_SWAPS = re.compile(r"/proc/swaps")
_SWAP_USED = 3


def compare(before: Snapshot, after: Snapshot, *, volatile: bool = True) -> list[Change]:
    """The paths that differ, sorted; headers and the order of entries do not count.

    Without `volatile`, what changes by itself is left out: counters, link and power states.
    """
    old, new = _contents(before), _contents(after)
    return [
        Change(path, old.get(path), new.get(path))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
        and (volatile or _lasting(path, old.get(path)) != _lasting(path, new.get(path)))
    ]


def _lasting(path: str, content: str | None) -> str | None:
    """What of a content does not change by itself; nothing of a path that is all counters."""
    if content is None or _VOLATILE.fullmatch(path):
        return None
    if _MEMORY.fullmatch(path):
        return "\n".join(line for line in content.split("\n") if "Total:" in line)
    if _SWAPS.fullmatch(path):
        rows = [line.replace("\\x09", " ").split() for line in content.split("\n")]
        return "\n".join(" ".join(row[:_SWAP_USED] + row[_SWAP_USED + 1 :]) for row in rows)
    return content


def load_any(path: str) -> Snapshot:
    """A snapshot file, or the `sys.txt` of a fixture's directory. Raises UsageError."""
    fixture = os.path.join(path, "sys.txt")
    if os.path.isdir(path) and not os.path.isfile(fixture):
        raise UsageError(
            f"{path} is a directory, not a snapshot",
            hint=f"vfiotool --root {path} snapshot FILE makes one of it",
        )
    return load(fixture if os.path.isfile(fixture) else path)


def _contents(snapshot: Snapshot) -> dict[str, str]:
    found = {path: _content(content) for path, content in snapshot.files.items()}
    found.update((path, f"-> {escape(os.fsencode(to))}") for path, to in snapshot.links.items())
    return found


def _content(content: bytes | int) -> str:
    if content == NOT_CAPTURED:
        return "?"
    if isinstance(content, int):
        return f"! {errno_name(content)}"
    if b"\0" in content:
        pieces = range(0, len(content), 32)
        return "\n".join(f"{at:03x}: {content[at : at + 32].hex()}" for at in pieces)
    return "\n".join(escape(line) for line in content.removesuffix(b"\n").split(b"\n"))
