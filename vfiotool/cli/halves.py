"""Long listings read by two processes at once.

Reading a function is a dozen system calls and little else: on a host with thousands of them half
of a listing in a second process takes half of the time. Whatever goes wrong with that process,
its half is read again here.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeVar

    from vfiotool.host import Host

    Item = TypeVar("Item")

# Starting a process costs about as much as reading so many items.
WORTH_IT = 256
# So many are read in one go: more of them make it no faster and take more memory.
_MOST = 2048
_LENGTH_BYTES = 8


def in_halves(
    host: Host, items: Sequence[Item], read: Callable[[Sequence[Item]], str]
) -> Iterator[str]:
    """`read` of one part of the items after another, in order; of all at once if they are few.

    Every second part is read in a child where the host is a tree of real files and there is a
    processor for it. `read` must not change anything and must return ASCII.
    """
    spread = len(items) >= WORTH_IT and hasattr(host.tree, "root")
    if not spread or len(os.sched_getaffinity(0)) < 2:
        yield read(items)
        return
    pairs = -(-len(items) // (2 * _MOST))
    size = -(-len(items) // (2 * pairs))
    for begin in range(0, len(items), 2 * size):
        here, there = items[begin : begin + size], items[begin + size : begin + 2 * size]
        child, pipe = _start(there, read)
        try:
            yield read(here)
            answer = _collect(pipe)
        finally:
            os.close(pipe)
            os.waitpid(child, 0)
        yield read(there) if answer is None else answer


def _start(items: Sequence[Item], read: Callable[[Sequence[Item]], str]) -> tuple[int, int]:
    pipe, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must never run on in the parent's code.
        try:
            os.close(pipe)
            data = read(items).encode("ascii")
            _send(writer, len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        finally:
            os._exit(0)
    os.close(writer)
    return child, pipe


def _send(writer: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(writer, rest) :]


def _collect(pipe: int) -> str | None:
    """The child's whole answer, or None if it is not whole."""
    pieces = []
    while piece := os.read(pipe, 1 << 20):
        pieces.append(piece)
    data = b"".join(pieces)
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or len(data) != _LENGTH_BYTES + length:
        return None
    return data[_LENGTH_BYTES:].decode("ascii")
