"""Data that lies in several buffers, as a command tells it: PRP lists and scatter lists (SGL).

Sources: NVM Express Base Specification 2.0, 4.1.1 (PRP), 4.1.2 (SGL).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vfiotool.errors import UsageError
from vfiotool.vfio import DmaBuffer

_SGL_DATA_BLOCK = 0x0
_SGL_LAST_SEGMENT = 0x3
# Command dword 0, PSDT: the data pointer is a scatter list, metadata one contiguous buffer.
USE_SGL = 1 << 6


@dataclass(frozen=True, slots=True)
class Segment:
    """`size` bytes of `buffer` from `offset` on."""

    buffer: DmaBuffer
    offset: int
    size: int

    @property
    def iova(self) -> int:
        return self.buffer.iova + self.offset

    def check(self) -> None:
        """Raises UsageError for what does not lie in its buffer, or begins off a dword."""
        if self.buffer.closed:
            raise UsageError("the DMA buffer is closed")
        if self.offset < 0 or self.size <= 0 or self.offset + self.size > self.buffer.size:
            raise UsageError(
                f"{self.size} bytes at {self.offset:#x} of a buffer of {self.buffer.size}"
            )
        if self.offset % 4 or self.size % 4:
            raise UsageError(f"{self.size} bytes at {self.offset:#x} are not whole dwords")


def pages_of(segments: Sequence[Segment], page_bytes: int) -> list[int] | None:
    """The PRP entries of the segments in order, or None where only a scatter list tells them: all
    but the first must begin on a page, all but the last end on one."""
    entries: list[int] = []
    for number, segment in enumerate(segments):
        segment.check()
        start, end = segment.iova, segment.iova + segment.size
        if (number and start % page_bytes) or (number + 1 < len(segments) and end % page_bytes):
            return None
        entries.append(start)
        entries += range(start - start % page_bytes + page_bytes, end, page_bytes)
    return entries


def prp(entries: Sequence[int], table: DmaBuffer, page_bytes: int) -> tuple[int, int]:
    """The two PRP fields for these entries; those that do not fit a command go to `table`, whose
    pages are chained (4.1.1: the last entry of a full page names the next one)."""
    if len(entries) <= 2:
        return entries[0], entries[1] if len(entries) == 2 else 0
    rest, room = list(entries[1:]), page_bytes // 8
    page = 0
    while rest:
        if (page + 1) * page_bytes > table.size:
            raise UsageError(f"{len(entries)} pages of data do not fit their list")
        last = len(rest) <= room
        here, rest = (rest, []) if last else (rest[: room - 1], rest[room - 1 :])
        if not last:
            here = [*here, table.iova + (page + 1) * page_bytes]
        struct.pack_into(f"<{len(here)}Q", table.view, page * page_bytes, *here)
        page += 1
    return entries[0], table.iova


def sgl(segments: Sequence[Segment], table: DmaBuffer) -> tuple[int, int]:
    """The 16 bytes of SGL entry 1, as two numbers: one data block, or a segment of them."""
    for segment in segments:
        segment.check()
    if len(segments) == 1:
        return segments[0].iova, segments[0].size | _SGL_DATA_BLOCK << 60
    if 16 * len(segments) > table.size:
        raise UsageError(f"{len(segments)} segments do not fit their list")
    for number, segment in enumerate(segments):
        struct.pack_into("<QQ", table.view, 16 * number, segment.iova, segment.size)
    return table.iova, 16 * len(segments) | _SGL_LAST_SEGMENT << 60
