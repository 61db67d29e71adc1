"""Which I/O virtual addresses are free: an allocator over the kernel's allowed ranges.

Pure: it knows nothing of kernels. Addresses and sizes are bytes; ranges are (start, last), both
inclusive, as the kernel tells them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from vfiotool.errors import KernelError, UsageError

PAGE = 4096
LOW_LIMIT = (1 << 32) - 1


class IovaAllocator:
    """Free address ranges, kept sorted and merged.

    `allocate` takes the highest place that fits, so that low addresses stay free for devices
    that reach few bits; without a limit it looks below 4 GiB first, as the kernel's own DMA API
    does (drivers/iommu/dma-iommu.c), because hardware lies about the rest. Address 0 is given out
    only by `reserve`: too many devices take it for "none".
    """

    def __init__(self, ranges: Iterable[tuple[int, int]], page_size: int = PAGE) -> None:
        self.page_size = page_size
        self._starts: list[int] = []
        self._ends: list[int] = []  # exclusive
        self._used: dict[int, int] = {}
        self.ranges: tuple[tuple[int, int], ...] = ()
        # Where `allocate` puts nothing, and `reserve` what its caller answers for.
        self.avoid: tuple[tuple[int, int], ...] = ()
        self.set_ranges(ranges)

    def set_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Take the kernel's ranges anew (attaching a device narrows them); what is in use stays.

        Raises UsageError for a range that ends before it starts.
        """
        page = self.page_size
        merged: list[list[int]] = []
        for start, last in sorted(ranges):
            if last < start or start < 0:
                raise UsageError(f"{start:#x}-{last:#x} is not a range of addresses")
            low, high = -(-start // page) * page, (last + 1) // page * page
            if low >= high:
                continue
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        self.ranges = tuple((low, high - 1) for low, high in merged)
        self._starts = [low for low, _ in merged]
        self._ends = [high for _, high in merged]
        for start, size in self._used.items():
            self._cut(start, start + size)

    def allocate(self, size: int, *, align: int = 0, limit: int | None = None) -> int:
        """The start of `size` bytes (rounded up to pages), a multiple of `align` (a power of
        two), the last byte at most `limit`. Raises KernelError (ENOSPC) when no place is left."""
        size, align = self._rounded(size), max(align, self.page_size)
        if align & (align - 1):
            raise UsageError(f"an alignment of {align} bytes is not a power of two")
        limits = [LOW_LIMIT, (1 << 64) - 1] if limit is None else [limit]
        for top in limits:
            start = self._highest(size, align, top)
            if start is not None:
                self._cut(start, start + size)
                self._used[start] = size
                return start
        below = "" if limit is None else f" below {limit + 1:#x}"
        raise KernelError(
            f"no I/O address space left for {size} bytes{below}",
            hint="free buffers of this device, or ask for smaller ones",
            errno_name="ENOSPC",
        )

    def reserve(self, start: int, size: int) -> None:
        """Take a place by address. Raises UsageError if it is not aligned, not allowed, in use."""
        size = self._rounded(size)
        if start % self.page_size:
            raise UsageError(f"I/O address {start:#x} is not a multiple of {self.page_size}")
        index = bisect_right(self._starts, start) - 1
        if index < 0 or start + size > self._ends[index]:
            allowed = any(low <= start and start + size - 1 <= high for low, high in self.ranges)
            reason = "is in use" if allowed else "lies outside what the IOMMU allows"
            raise UsageError(f"I/O address {start:#x}, {size} bytes: {reason}")
        self._cut(start, start + size)
        self._used[start] = size

    def free(self, start: int) -> None:
        """Give back what `allocate` or `reserve` gave. Raises UsageError if it did not."""
        size = self._used.pop(start, None)
        if size is None:
            raise UsageError(f"I/O address {start:#x} was not allocated here")
        for low, last in self.ranges:
            first, end = max(low, start), min(last + 1, start + size)
            if first < end:
                self._join(first, end)

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    def free_ranges(self) -> list[tuple[int, int]]:
        """What is free, as (start, last)."""
        return [(low, high - 1) for low, high in zip(self._starts, self._ends, strict=True)]

    def _rounded(self, size: int) -> int:
        if size <= 0:
            raise UsageError(f"a mapping of {size} bytes")
        return -(-size // self.page_size) * self.page_size

    def _highest(self, size: int, align: int, limit: int) -> int | None:
        for index in range(bisect_right(self._starts, limit) - 1, -1, -1):
            low = max(self._starts[index], self.page_size)
            end = min(self._ends[index], limit + 1)
            while (start := (end - size) // align * align) >= low:
                crossed = [first for first, last in self.avoid if start <= last and first < end]
                if not crossed:
                    return start
                end = min(crossed)
        return None

    def _cut(self, start: int, end: int) -> None:
        """Take [start, end) out of the free ranges, wherever it is free."""
        index = bisect_right(self._ends, start)
        while index < len(self._starts) and self._starts[index] < end:
            low, high = self._starts[index], self._ends[index]
            pieces = [(low, start)] if low < start else []
            pieces += [(end, high)] if end < high else []
            self._starts[index : index + 1] = [piece[0] for piece in pieces]
            self._ends[index : index + 1] = [piece[1] for piece in pieces]
            index += len(pieces)

    def _join(self, start: int, end: int) -> None:
        """Put [start, end) among the free ranges and merge it with its neighbours."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
