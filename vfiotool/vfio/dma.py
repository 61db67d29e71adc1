"""Memory that devices read and write: allocated, mapped, lent out as buffers, taken back.

A buffer's life has one order: memory, MADV_DONTFORK, I/O address, mapping; and back. Memory that
the IOMMU would not give up is kept until the process ends rather than handed to somebody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.native import library as native
from vfiotool.vfio.iova import PAGE, IovaAllocator
from vfiotool.vfio.opened import refuse_pickle
from vfiotool.vfio.space import AddressSpace, StillMapped
from vfiotool.vfio.trace import Trace

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAP_HUGETLB = 0x40000
_MFD_HUGETLB = 0x4
_HUGE_SHIFT = 26
_MADV_POPULATE_WRITE = 23
PageKind = Literal["normal", "2M", "1G"]
# The kinds of pages a buffer can be made of, in bytes.
PAGE_KINDS: dict[str, int] = dict(zip(get_args(PageKind), (PAGE, 1 << 21, 1 << 30), strict=True))

_live: weakref.WeakSet[DmaBuffer] = weakref.WeakSet()
# Memory that a failed unmap left within a device's reach.
_quarantine: list[object] = []


class DmaBuffer(native.PinCount):
    """`size` bytes at `iova` for the device and at `view` for this process.

    `view` is a writable memoryview of bytes; slices of it and numpy arrays over it (by
    `numpy.frombuffer`) share the memory. After `close` the view raises ValueError; slices and
    arrays made from it still hold ordinary memory, which no device sees any more.

    A buffer that a device or C still uses is pinned (`pin`): closing it is refused until then. A
    queue pins its rings for its life and data for the time of a command.
    """

    def __init__(
        self, owner: Dma, memory: mmap.mmap | memoryview, size: int, iova: int, *, own: bool = True
    ) -> None:
        self.owner = owner
        self.size = size
        self.iova = iova
        self.address = native.address_of(memory)
        self._memory: mmap.mmap | memoryview | None = memory
        # Whether it was allocated here, rather than lent.
        self._own = own
        # Of the file that the memory is of, where devices reach it by that; closed with it.
        self.file: int | None = None
        self._view = memoryview(memory)
        # None: not known, because the call was interrupted.
        self._mapped: bool | None = False
        self._released: mmap.mmap | memoryview | None = None
        self._generation = native.fork_generation()
        if own:
            _live.add(self)

    __reduce_ex__ = refuse_pickle

    def __repr__(self) -> str:
        state = ", closed" if self.closed else f", pinned {self.pins} times" if self.pins else ""
        devices = ", ".join(entry.target.name for entry in self.owner.space.attachments)
        return (
            f"<DmaBuffer of {devices or 'no device'}, {self.size} bytes at {self.iova:#x}{state}>"
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> bytes:
        """A copy of some of its bytes: `buffer[:512]`."""
        return bytes(self.view[where])

    def __setitem__(self, where: slice, data: Buffer) -> None:
        """Store bytes: `buffer[:4] = b"edu!"`."""
        self.view[where] = data

    def __buffer__(self, _flags: int) -> memoryview:
        """The memory itself, for numpy and its kind (from Python 3.12 on; `view` before)."""
        return self.view

    @property
    def view(self) -> memoryview:
        """The memory. Raises UsageError after `close` and in a child process."""
        if self._memory is None:
            raise UsageError(f"the DMA buffer at I/O address {self.iova:#x} is closed")
        if self._generation != native.fork_generation():
            raise UsageError("DMA memory stays with the process that mapped it")
        return self._view

    def _refuse_pin(self) -> None:
        raise UsageError(f"the DMA buffer at I/O address {self.iova:#x} is closed")

    def _unpinned(self) -> None:
        if self._released is not None:
            memory, self._released = self._released, None
            _release(self._view, memory)

    def close(self) -> None:
        """Unmap, then free. Raises UsageError while it is pinned, KernelError if the IOMMU keeps
        the mapping; the memory is then kept as well. Closing twice is nothing."""
        if self.pins and self._memory is not None and not self._is_foreign():
            raise UsageError(
                f"the DMA buffer at I/O address {self.iova:#x} is in use",
                hint="wait for the commands that use it, or close their queue first",
            )
        self.close_even_pinned()

    def close_even_pinned(self) -> None:
        """As `close`, but a pinned buffer's memory is freed with its last `unpin`: for the end of
        the address space, after which no device reaches it."""
        self._shut()
        memory, self._memory = self._memory, None
        if memory is None:
            return
        _live.discard(self)
        if self.file is not None:
            os.close(self.file)
            self.file = None
        if self._is_foreign():
            return
        try:
            if self._mapped is not False:
                self.owner.unmap_buffer(self)
        except BaseException:
            _quarantine.append(memory)
            raise
        if self.pins:
            self._released = memory
            return
        _release(self._view, memory)

    def _is_foreign(self) -> bool:
        return self._generation != native.fork_generation()

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


def _release(view: memoryview, memory: mmap.mmap | memoryview) -> None:
    # Slices and arrays still alive keep the memory; it is freed with the last of them.
    with contextlib.suppress(BufferError):
        view.release()
        if isinstance(memory, mmap.mmap):
            memory.close()
        else:
            memory.release()


def _after_fork() -> None:
    for buffer in list(_live):
        buffer.leave_child()


os.register_at_fork(after_in_child=_after_fork)


def _memory(size: int, pages: str, shared: bool, lent: bool) -> tuple[mmap.mmap, int | None]:
    """Memory, and where it is `lent` the descriptor of its file, which cannot be shortened."""
    page = PAGE_KINDS[pages]
    huge = page.bit_length() - 1 << _HUGE_SHIFT if pages != "normal" else 0
    try:
        if not (shared or lent):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGETLB | huge if huge else 0)
            return mmap.mmap(-1, size, flags=flags), None
        kind = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (_MFD_HUGETLB | huge if huge else 0)
        descriptor = os.memfd_create("vfiotool-dma", kind)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(descriptor)
            raise
        if lent:
            return memory, descriptor
        os.close(descriptor)
        return memory, None
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
    """The buffers of an address space, shared by its devices. Any thread may call it.

    Buffers live as long as a device is in the space: when the last one is closed, so are they.
    """

    def __init__(self, space: AddressSpace) -> None:
        self.space = space
        self.trace: Trace | None = None
        self.iovas = IovaAllocator(space.ranges())
        self.buffers: dict[int, DmaBuffer] = {}
        self._lock = threading.RLock()
        space.closers.append(self.close)

    def __repr__(self) -> str:
        used = sum(buffer.size for buffer in list(self.buffers.values()))
        return f"<Dma over {self.space!r}, {len(self.buffers)} buffers of {used} bytes>"

    def refresh(self) -> None:
        """Read the allowed ranges again: each device attached can narrow them."""
        with self._lock:
            self.iovas.set_ranges(self.space.ranges())
            self.iovas.avoid = self.space.windows()

    def alloc(
        self,
        size: int,
        *,
        limit_bits: int = 64,
        align: int = 0,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
        pages: PageKind = "normal",
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
            raise UsageError(f"{pages!r} is not a kind of page", hint=", ".join(PAGE_KINDS))
        _check_request(size, read, write)
        page = PAGE_KINDS[pages]
        size = -(-size // page) * page
        memory, file = _memory(size, pages, shared, self.space.shares_memory)
        try:
            place = self._place(size, max(align, page), limit_bits, iova)
        except BaseException:
            memory.close()
            if file is not None:
                os.close(file)
            raise
        buffer = DmaBuffer(self, memory, size, place)
        buffer.file = file
        try:
            if not write:
                _own_pages(memory)
            native.memory_dont_fork(buffer.address, size)
            self._map([buffer], read, write)
        except BaseException:
            self._give_up([buffer])
            raise
        return self._keep([buffer], read, write)[0]

    def alloc_many(
        self, count: int, size: int, *, limit_bits: int = 64, read: bool = True, write: bool = True
    ) -> list[DmaBuffer]:
        """`count` buffers of `size` bytes each, mapped in one call of C; all of them or none.
        Otherwise as `alloc`."""
        self.space.refuse_closed()
        if not isinstance(count, int) or count < 0:
            raise UsageError(f"{count!r} is not a number of buffers")
        _check_request(size, read, write)
        size = -(-size // PAGE) * PAGE
        made: list[DmaBuffer] = []
        try:
            for _ in range(count):
                memory, file = _memory(size, "normal", False, self.space.shares_memory)
                made.append(DmaBuffer(self, memory, size, self._place(size, 0, limit_bits, None)))
                made[-1].file = file
                if not write:
                    _own_pages(memory)
                native.memory_dont_fork(made[-1].address, size)
            self._map(made, read, write)
        except BaseException:
            self._give_up(made)
            raise
        return self._keep(made, read, write)

    def map(
        self,
        memory: Buffer,
        *,
        limit_bits: int = 64,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
        file: int | None = None,
    ) -> DmaBuffer:
        """Map memory of your own for devices: an mmap (of a memfd, a file, nothing), a numpy array,
        a bytearray, an array; whatever has one run of bytes. It is neither copied nor freed here.

        The IOMMU maps whole pages: what lies beside the memory in its first and last page is within
        the device's reach too, so prefer an mmap. `iova` is the page's address if given; the
        buffer's own `iova` adds what the memory begins behind its page. The object cannot be
        resized or closed until the buffer is closed; a file must not be truncated meanwhile.
        Raises UsageError for memory that the device would write and this process may not, or that
        has no bytes; otherwise as `alloc`.
        """
        self.space.refuse_closed()
        try:
            view = memoryview(memory)
            whole = view.cast("B")
        except TypeError as error:
            raise UsageError(f"{type(memory).__name__} is not one run of bytes: {error}") from error
        _check_request(whole.nbytes, read, write)
        if write and whole.readonly:
            raise UsageError("the memory can only be read, and the device was to write it")
        within = native.address_of(whole) % PAGE
        size = -(-(within + whole.nbytes) // PAGE) * PAGE
        place = self._place(size, 0, limit_bits, iova)
        buffer = DmaBuffer(self, whole, whole.nbytes, place + within, own=False)
        try:
            buffer.file = None if file is None else os.dup(file)
            self._map([buffer], read, write)
        except BaseException:
            self._give_up([buffer])
            raise
        return self._keep([buffer], read, write)[0]

    def _map(self, buffers: list[DmaBuffer], read: bool, write: bool) -> None:
        for buffer in buffers:
            buffer._mapped = None
        files = {one.address: one.file for one in buffers if one.file is not None}
        try:
            with self.space.lending(files):
                if len(buffers) == 1:
                    self.space.map(*_pages_of(buffers[0]), read=read, write=write)
                else:
                    rows = [_pages_of(buffer) for buffer in buffers]
                    self.space.map_many(rows, read=read, write=write)
        except StillMapped:
            raise
        except VfiotoolError:
            # The kernel said no, and to all of them.
            for buffer in buffers:
                buffer._mapped = False
            raise
        for buffer in buffers:
            buffer._mapped = True

    def _keep(self, buffers: list[DmaBuffer], read: bool, write: bool) -> list[DmaBuffer]:
        for buffer in buffers:
            self.buffers[buffer.iova] = buffer
            if self.trace is not None:
                self.trace.record(
                    "dma-map", iova=buffer.iova, size=buffer.size, read=read, write=write
                )
        return buffers

    def _give_up(self, buffers: Iterable[DmaBuffer]) -> None:
        """What was not handed out. What the IOMMU may still map keeps its memory and its address
        until the process ends."""
        for buffer in buffers:
            unknown = buffer._mapped is None
            try:
                buffer.close()
            except VfiotoolError:
                continue
            if not unknown:
                self._free(buffer)

    def _place(self, size: int, align: int, limit_bits: int, iova: int | None) -> int:
        with self._lock:
            if iova is None:
                limit = None if limit_bits >= 64 else (1 << limit_bits) - 1
                return self.iovas.allocate(size, align=align, limit=limit)
            if iova + size > 1 << limit_bits:
                raise UsageError(f"I/O address {iova:#x} is beyond the {limit_bits} bits asked for")
            self.iovas.reserve(iova, size)
            return iova

    def set_aside(self, size: int, *, align: int = 0, limit_bits: int = 64) -> int:
        """I/O addresses that no buffer gets until `give_back`: for what a device itself answers to,
        such as memory of its own. Returns the first; the arguments are those of `alloc`. Raises
        KernelError (ENOSPC) where none are left."""
        self.space.refuse_closed()
        return self._place(size, align, limit_bits, None)

    def give_back(self, iova: int) -> None:
        """The counterpart of `set_aside`."""
        with self._lock:
            self.iovas.free(iova)

    def _free(self, buffer: DmaBuffer) -> None:
        with self._lock:
            self.iovas.free(_pages_of(buffer)[1])

    def unmap_buffer(self, buffer: DmaBuffer) -> None:
        """Take a buffer's mapping away; the buffer's own `close` calls it."""
        _, iova, size = _pages_of(buffer)
        gone = self.space.unmap(iova, size)
        if self.trace is not None:
            self.trace.record("dma-unmap", iova=buffer.iova, size=buffer.size, unmapped=gone)
        if gone != size and (gone or buffer._mapped):
            raise KernelError(f"unmap of I/O address {iova:#x}: {gone} of {size} bytes went")
        buffer._mapped = False
        self.buffers.pop(buffer.iova, None)
        self._free(buffer)

    def close(self) -> None:
        """Close all buffers; the first error is raised after the last buffer was tried."""
        first: BaseException | None = None
        for buffer in list(self.buffers.values()):
            try:
                buffer.close_even_pinned()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first


def _check_request(size: int, read: bool, write: bool) -> None:
    if not isinstance(size, int) or size <= 0:
        raise UsageError(f"a DMA buffer of {size!r} bytes: it has at least one")
    if not (read or write):
        raise UsageError("a DMA buffer that the device can neither read nor write")


def _pages_of(buffer: DmaBuffer) -> tuple[int, int, int]:
    """(address, I/O address, bytes) of the whole pages that a buffer lies in."""
    within = buffer.address % PAGE
    size = -(-(within + buffer.size) // PAGE) * PAGE
    return buffer.address - within, buffer.iova - within, size


def dma_of(space: AddressSpace) -> Dma:
    """The buffers of `space`: one `Dma`, whoever asks."""
    with space.lock:
        for closer in space.closers:
            owner = getattr(closer, "__self__", None)
            if isinstance(owner, Dma):
                return owner
        return Dma(space)
