"""What must hold for any bytes given to the snapshot parser; fuzzed, and replayed from a corpus."""

from __future__ import annotations

from vfiotool.errors import UsageError
from vfiotool.host.tree import MemoryTree
from vfiotool.snapshot.text import format_snapshot, parse_snapshot

HEAD = b"vfiotool snapshot 1\nkernel: 6.12\n\n"


def check(data: bytes) -> bool:
    """Raises unless the bytes are refused with a line, or read soundly; returns whether read.

    What is read survives being written and read again, and no path of it leads out of the tree.
    """
    try:
        found = parse_snapshot(data, "fuzz")
    except UsageError as error:
        assert error.message.startswith("fuzz:"), error.message
        return False
    for path in (*found.files, *found.links, *found.directories):
        assert path.startswith("/") and "\0" not in path
        assert not {"..", "."} & set(path.split("/")) and "//" not in path
    again = parse_snapshot(format_snapshot(found).encode(), "again")
    assert (again.files, again.links) == (dict(found.files), dict(found.links))
    assert again.cut_off is None
    tree = MemoryTree(found.files, found.links, found.directories)
    for path in list(found.links)[:8]:
        tree.exists(path)
    return True


def with_head(data: bytes) -> bytes:
    """An input of the fuzzer: half of them get past the first line for free."""
    return HEAD + data[1:] if data[:1] == b"\x01" else data
