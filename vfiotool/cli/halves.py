"""Long listings read by two processes at once.

Reading a function is a dozen system calls and little else: on a host with thousands of them half
of a listing in a second process takes half of the time. Whatever goes wrong with that process,
its half is read again here.
"""

from __future__ import annotations

import gc
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeVar

    from vfiotool.host.host import Host

    Item = TypeVar("Item")

# Starting a process costs about as much as reading so many items.
WORTH_IT = 256
# So many are read in one go: enough that waiting for each other costs nothing, and few enough that
# what has been read of them stays small.
_MOST = 256
_LENGTH_BYTES = 8


def in_halves(
    host: Host, items: Sequence[Item], read: Callable[[Sequence[Item]], str]
) -> Iterator[str]:
    """`read` of one part of the items after another, in order; of all at once if they are few.

    Every second part is read in a child where the host is a tree of real files and there is a
    processor for it. `read` must not change anything and must return ASCII.
    """
    # What is read is many small values without cycles: looking for some took a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        if len(items) < WORTH_IT:
            yield read(items)
            return
        size = min(_MOST, -(-len(items) // 2))
        parts = [items[begin : begin + size] for begin in range(0, len(items), size)]
        if hasattr(host.tree, "root") and len(os.sched_getaffinity(0)) > 1:
            yield from _by_turns(parts, read)
        else:
            yield from map(read, parts)
    finally:
        if collecting:
            gc.enable()


def _by_turns(
    parts: Sequence[Sequence[Item]], read: Callable[[Sequence[Item]], str]
) -> Iterator[str]:
    """The even parts are read here, the odd ones by a child."""
    child, pipe = _start(parts[1::2], read)
    try:
        for number, part in enumerate(parts):
            answer = _receive(pipe) if number % 2 else None
            yield read(part) if answer is None else answer
    finally:
        os.close(pipe)
        os.waitpid(child, 0)


def _start(
    parts: Sequence[Sequence[Item]], read: Callable[[Sequence[Item]], str]
) -> tuple[int, int]:
    """A child that reads these parts, and the pipe on which it answers each: length and text."""
    pipe, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must never run on in the parent's code.
        try:
            os.close(pipe)
            for part in parts:
                data = read(part).encode("ascii")
                _send(writer, len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        finally:
            os._exit(0)
    os.close(writer)
    return child, pipe


def _send(writer: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(writer, rest) :]


def _receive(pipe: int) -> str | None:
    """The child's next answer, or None if it is not whole: then no other will be."""
    head = _read_exactly(pipe, _LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    data = _read_exactly(pipe, length)
    whole = len(head) == _LENGTH_BYTES and len(data) == length
    return data.decode("ascii") if whole else None


def _read_exactly(pipe: int, length: int) -> bytes:
    """That many bytes; fewer if the other end closed."""
    pieces = []
    while length and (piece := os.read(pipe, length)):
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)
