"""Memory that devices read and write: allocated, mapped, lent out as buffers, taken back.

A buffer's life has one order: memory, MADV_DONTFORK, I/O address, mapping; and back. Memory that
the IOMMU would not give up is kept until the process ends rather than handed to somebody else.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from typing import TYPE_CHECKING

from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.native import library as native
from vfiotool.vfio.iova import PAGE, IovaAllocator

if TYPE_CHECKING:
    from vfiotool.vfio.backend import AddressSpace
    from vfiotool.vfio.trace import Trace

_MAP_HUGETLB = 0x40000
_MFD_HUGETLB = 0x4
_HUGE_SHIFT = 26
_MADV_POPULATE_WRITE = 23
# The kinds of pages a buffer can be made of, in bytes.
PAGE_KINDS = {"normal": PAGE, "2M": 1 << 21, "1G": 1 << 30}

_live: weakref.WeakSet[DmaBuffer] = weakref.WeakSet()
# Memory that a failed unmap left within a device's reach.
_quarantine: list[mmap.mmap] = []


class DmaBuffer:
    """`size` bytes at `iova` for the device and at `view` for this process.

    `view` is a writable memoryview of bytes; slices of it and numpy arrays over it (by
    `numpy.frombuffer`) share the memory. After `close` the view raises ValueError; slices and
    arrays made from it still hold ordinary memory, which no device sees any more.
    """

    def __init__(self, owner: Dma, memory: mmap.mmap, size: int, iova: int) -> None:
        self.owner = owner
        self.size = size
        self.iova = iova
        self.address = native.address_of(memory)
        self._memory: mmap.mmap | None = memory
        self._view = memoryview(memory)
        self._mapped = False
        self._generation = native.fork_generation()
        _live.add(self)

    @property
    def view(self) -> memoryview:
        """The memory. Raises UsageError after `close` and in a child process."""
        if self._memory is None:
            raise UsageError(f"the DMA buffer at I/O address {self.iova:#x} is closed")
        if self._generation != native.fork_generation():
            raise UsageError("DMA memory stays with the process that mapped it")
        return self._view

    @property
    def closed(self) -> bool:
        return self._memory is None

    def close(self) -> None:
        """Unmap, then free. Raises KernelError if the IOMMU keeps the mapping; the memory is then
        kept as well. Closing twice is nothing."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        _live.discard(self)
        if self._generation != native.fork_generation():
            return
        try:
            if self._mapped:
                self.owner.unmap_buffer(self)
        except BaseException:
            _quarantine.append(memory)
            raise
        _release(self._view, memory)

    def leave_child(self) -> None:
        """In a child: make the view unusable and stale arrays harmless."""
        with contextlib.suppress(BufferError):
            self._view.release()
        if self._memory is not None:
            native.memory_plug(self.address, len(self._memory))

    def __enter__(self) -> DmaBuffer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _release(view: memoryview, memory: mmap.mmap) -> None:
    # Slices and arrays still alive keep the memory; it is freed with the last of them.
    with contextlib.suppress(BufferError):
        view.release()
        memory.close()


def _after_fork() -> None:
    for buffer in list(_live):
        buffer.leave_child()


os.register_at_fork(after_in_child=_after_fork)


def _memory(size: int, pages: str, shared: bool) -> mmap.mmap:
    page = PAGE_KINDS[pages]
    huge = page.bit_length() - 1 << _HUGE_SHIFT if pages != "normal" else 0
    try:
        if not shared:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGETLB | huge if huge else 0)
            return mmap.mmap(-1, size, flags=flags)
        descriptor = os.memfd_create(
            "vfiotool-dma", os.MFD_CLOEXEC | (_MFD_HUGETLB | huge if huge else 0)
        )
        try:
            os.ftruncate(descriptor, size)
            return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED)
        finally:
            os.close(descriptor)
    except OSError as error:
        if huge:
            raise Unsupported(
                f"no {size} bytes of {pages} pages: {error.strerror}",
                hint=f"reserve some: sysctl vm.nr_hugepages, or hugepagesz={pages} at boot",
                errno_name="ENOMEM",
            ) from error
        raise KernelError(f"no {size} bytes of memory: {error.strerror}") from error


def _own_pages(memory: mmap.mmap) -> None:
    """Give the memory pages of its own before a device may only read it.

    Before Linux 6.2 a mapping for reading pins the shared zero page under memory never written:
    our first write then goes to a fresh page, and the device reads zeros for ever.
    """
    try:
        memory.madvise(_MADV_POPULATE_WRITE)
    except OSError:
        for offset in range(0, len(memory), PAGE):
            memory[offset] = 0


class Dma:
    """The buffers of an address space, shared by its devices.

    Buffers live as long as a device is in the space: when the last one is closed, so are they.
    """

    def __init__(self, space: AddressSpace, trace: Trace | None = None) -> None:
        self.space = space
        self.trace = trace
        self.iovas = IovaAllocator(space.ranges())
        self.buffers: dict[int, DmaBuffer] = {}

    def refresh(self) -> None:
        """Read the allowed ranges again: each device attached can narrow them."""
        self.iovas.set_ranges(self.space.ranges())

    def alloc(
        self,
        size: int,
        *,
        limit_bits: int = 64,
        align: int = 0,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
        pages: str = "normal",
        shared: bool = False,
    ) -> DmaBuffer:
        """Zeroed, page-aligned memory mapped for devices; `size` is rounded up to whole pages.

        `limit_bits` is the width of address that the device can emit; `align` the alignment of
        the I/O address, a power of two; `iova` fixes it. `read` and `write` are the device's
        rights (Intel's page tables cannot forbid reading what may be written). `pages` is
        "normal", "2M" or "1G"; `shared` takes it from a memfd.
        Raises UsageError, KernelError (no address, no memory, not lockable: the hint says how
        much is missing), Unsupported (no such pages).
        """
        self.space.refuse_closed()
        if pages not in PAGE_KINDS:
            raise UsageError(f"{pages!r} is no kind of page", hint=", ".join(PAGE_KINDS))
        if size <= 0 or not (read or write):
            raise UsageError(f"a DMA buffer of {size} bytes that can be neither read nor written")
        page = PAGE_KINDS[pages]
        size = -(-size // page) * page
        memory = _memory(size, pages, shared)
        try:
            place = self._place(size, max(align, page), limit_bits, iova)
        except BaseException:
            memory.close()
            raise
        buffer = DmaBuffer(self, memory, size, place)
        try:
            if not write:
                _own_pages(memory)
            native.memory_dont_fork(buffer.address, size)
            self.space.map(buffer.address, place, size, read=read, write=write)
        except BaseException:
            buffer.close()
            self.iovas.free(place)
            raise
        buffer._mapped = True
        self.buffers[place] = buffer
        if self.trace is not None:
            self.trace.record("dma-map", iova=place, size=size, read=read, write=write)
        return buffer

    def alloc_many(
        self, count: int, size: int, *, limit_bits: int = 64, read: bool = True, write: bool = True
    ) -> list[DmaBuffer]:
        """`count` buffers of `size` bytes each, mapped in one call of C; all of them or none.
        Otherwise as `alloc`."""
        self.space.refuse_closed()
        if count < 0 or size <= 0 or not (read or write):
            raise UsageError(f"{count} DMA buffers of {size} bytes")
        size = -(-size // PAGE) * PAGE
        made: list[DmaBuffer] = []
        try:
            for _ in range(count):
                memory = _memory(size, "normal", False)
                made.append(DmaBuffer(self, memory, size, self._place(size, 0, limit_bits, None)))
                if not write:
                    _own_pages(memory)
                native.memory_dont_fork(made[-1].address, size)
            triples = [(buffer.address, buffer.iova, size) for buffer in made]
            self.space.map_many(triples, read=read, write=write)
        except BaseException:
            for buffer in made:
                buffer.close()
                self.iovas.free(buffer.iova)
            raise
        for buffer in made:
            buffer._mapped = True
            self.buffers[buffer.iova] = buffer
            if self.trace is not None:
                self.trace.record("dma-map", iova=buffer.iova, size=size, read=read, write=write)
        return made

    def _place(self, size: int, align: int, limit_bits: int, iova: int | None) -> int:
        if iova is None:
            limit = None if limit_bits >= 64 else (1 << limit_bits) - 1
            return self.iovas.allocate(size, align=align, limit=limit)
        if iova + size > 1 << limit_bits:
            raise UsageError(f"I/O address {iova:#x} is beyond the {limit_bits} bits asked for")
        self.iovas.reserve(iova, size)
        return iova

    def unmap_buffer(self, buffer: DmaBuffer) -> None:
        """Take a buffer's mapping away; the buffer's own `close` calls it."""
        gone = self.space.unmap(buffer.iova, buffer.size)
        if self.trace is not None:
            self.trace.record("dma-unmap", iova=buffer.iova, size=buffer.size, unmapped=gone)
        if gone != buffer.size:
            raise KernelError(
                f"unmap of I/O address {buffer.iova:#x}: {gone} of {buffer.size} bytes went"
            )
        buffer._mapped = False
        del self.buffers[buffer.iova]
        self.iovas.free(buffer.iova)

    def close(self) -> None:
        """Close all buffers; the first error is raised after the last buffer was tried."""
        first: BaseException | None = None
        for buffer in list(self.buffers.values()):
            try:
                buffer.close()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first
