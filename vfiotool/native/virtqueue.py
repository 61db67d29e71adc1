"""Virtqueues in C: memory maps, disks, workers and queues as objects that end explicitly.

Whoever makes one closes it, in the reverse order: queues before their worker and disk. Each call
that waits for a worker gives up the interpreter's lock meanwhile. See cext/virtio/*.h for what is
guaranteed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.native.library import failed, ffi, lib
from vfiotool.native.limits import LimitShare

LOG_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One region of a front end's memory: bytes `offset` to `offset + size` of the file `fd`."""

    guest: int
    user: int
    size: int
    offset: int
    fd: int


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where a ring lies, in the front end's addresses, and how it is used; see vt_ring_layout."""

    descriptors: int
    available: int
    used: int
    size: int
    event_index: bool
    indirect: bool
    packed: bool = False

    def fill(self, layout: Any) -> None:
        """Write it into a struct vt_ring_layout."""
        for field in fields(self):
            setattr(layout, field.name, getattr(self, field.name))


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """Counters since a disk was opened."""

    reads: int
    writes: int
    flushes: int
    discards: int
    bytes_read: int
    bytes_written: int
    failed: int


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """Counters since a worker was started."""

    requests: int
    batches: int
    signals: int
    kicks: int
    sleeps: int


_T = TypeVar("_T")
_REFUSED = {errno.EINVAL: UsageError, errno.EFAULT: UsageError, errno.E2BIG: UsageError}


def _done(result: int, operation: str) -> int:
    if result < 0:
        raise failed(result, operation, branches=_REFUSED)
    return result


def _figures(kind: type[_T], values: Any) -> _T:
    return kind(*(getattr(values, field.name) for field in fields(kind)))  # type: ignore[arg-type]


# Regions that a process can have mapped at once.
MEMORY_ROOM = int(lib.VT_MEMORY_ROOM)


class MemoryMap:
    """A front end's memory, mapped here. Raises UsageError for regions that contradict themselves.

    Unless `sized`, the descriptors are no files whose size could be checked, as VDUSE's.
    Shrinking files break the queues that use them, and nothing else: see vt_memory_guard.
    """

    def __init__(self, regions: Sequence[MemoryRegion], *, sized: bool = True) -> None:
        _done(lib.vt_memory_guard(), "guard against shrinking memory")
        table = ffi.new("struct vt_region[]", len(regions))
        for entry, region in zip(table, regions, strict=True):
            entry.guest, entry.user = region.guest, region.user
            entry.size, entry.offset, entry.fd = region.size, region.offset, region.fd
        made = ffi.new("struct vt_memory **")
        create = lib.vt_memory_create if sized else lib.vt_memory_create_unsized
        _done(create(table, len(regions), made), "map the front end's memory")
        self.handle = made[0]

    def close(self) -> None:
        """Give the reference back; queues that use the map keep theirs."""
        handle, self.handle = self.handle, ffi.NULL
        lib.vt_memory_put(handle)

    @property
    def is_broken(self) -> bool:
        return bool(lib.vt_memory_is_broken(self.handle))

    @property
    def references(self) -> int:
        """Who looks into it: its owner, the queues, and each request in flight."""
        return int(lib.vt_memory_references(self.handle))

    def places(self) -> list[tuple[int, int, int]]:
        """(address here, bytes, guest address) of its regions; of a map that is not closed."""
        if self.handle == ffi.NULL:
            raise VfiotoolError("the memory map is closed")
        table = ffi.new("struct vt_place[]", lib.VT_MEMORY_REGIONS)
        count = lib.vt_memory_places(self.handle, table, lib.VT_MEMORY_REGIONS)
        return [(one.host, one.size, one.guest) for one in table[0:count]]

    def view(self, address: int, size: int) -> memoryview:
        """Memory here as bytes; of the map, which outlives it."""
        return memoryview(ffi.buffer(ffi.cast("uint8_t *", address), size)).cast("B")

    def set_io(self, place: int, io: int) -> None:
        """Devices reach the region `place` of `places` at `io` and on; before queues have it."""
        _done(lib.vt_memory_set_io(self.handle, place, io), "tell where devices reach memory")


def log_bytes(queue_size: int, *, packed: bool = False) -> int:
    """The bytes of one queue's in-flight log, rounded so that the next one is aligned."""
    size = int((lib.vt_packed_log_size if packed else lib.vt_log_size)(queue_size))
    return (size + LOG_ALIGNMENT - 1) // LOG_ALIGNMENT * LOG_ALIGNMENT


@dataclass(frozen=True, slots=True)
class PortPlace:
    """Where on a controller a disk is; see vt_port_place."""

    nsid: int
    block_bytes: int
    trims: bool
    zeroes: bool


class RawDisk:
    """A disk in memory (`fd` None, or a sealed memfd and `mapped`), in a raw file, or at a `place`
    behind the ports of its queues, from `offset` on; sizes in bytes.

    `direct_fd` is the same file opened with O_DIRECT, for requests that are aligned; others go
    through the page cache. The descriptors are duplicated. Raises UsageError for sizes that are no
    multiples of 512.
    """

    def __init__(
        self,
        size: int,
        *,
        fd: int | None = None,
        mapped: bool = False,
        direct_fd: int | None = None,
        offset: int = 0,
        read_only: bool = False,
        discard: bool = True,
        serial: str = "",
        place: PortPlace | None = None,
    ) -> None:
        settings = ffi.new("struct vt_disk_settings *")
        if place is not None:
            for field in fields(place):
                setattr(settings.place, field.name, getattr(place, field.name))
        settings.fd = -1 if fd is None else fd
        settings.mapped = mapped
        settings.direct_fd = -1 if direct_fd is None else direct_fd
        settings.offset, settings.size = offset, size
        settings.read_only, settings.discard = read_only, discard
        settings.id = serial.encode()[: lib.VT_BLK_ID_BYTES].ljust(lib.VT_BLK_ID_BYTES, b"\0")
        made = ffi.new("struct vt_disk **")
        _done(lib.vt_disk_open(settings, made), "open the disk")
        self.handle = made[0]

    def resize(self, size: int) -> None:
        lib.vt_disk_resize(self.handle, size)

    @property
    def is_muted(self) -> bool:
        """Whether a driver's interrupt blocked: none is signalled any more until `unmute`."""
        return bool(lib.vt_disk_is_muted(self.handle))

    def unmute(self) -> None:
        lib.vt_disk_mute(self.handle, False)

    def figures(self) -> DiskFigures:
        values = ffi.new("struct vt_disk_figures *")
        lib.vt_disk_figures(self.handle, values)
        return _figures(DiskFigures, values)

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL
        lib.vt_disk_close(handle)


class _Port(Protocol):
    """A port as its worker and queues see it (native.port)."""

    handle: Any

    def close(self) -> None:
        """End it."""


class Worker:
    """A thread that serves queues; `poll_us` limits how long it looks at idle rings."""

    def __init__(self, poll_us: int = 0) -> None:
        made = ffi.new("struct vt_worker **")
        _done(lib.vt_worker_start(poll_us, made), "start a worker")
        self.handle = made[0]
        self.queues = 0
        self.ports: list[_Port] = []

    def figures(self) -> WorkerFigures:
        values = ffi.new("struct vt_worker_figures *")
        lib.vt_worker_figures(self.handle, values)
        return _figures(WorkerFigures, values)

    def recheck(self) -> None:
        """Have queues that wait for their limits ask again: after limits were changed."""
        lib.vt_worker_recheck(self.handle)

    def close(self) -> None:
        """End the thread. Raises KernelError (EBUSY) while it serves queues."""
        for port in list(self.ports):
            port.close()
        if self.handle != ffi.NULL:
            _done(lib.vt_worker_stop(self.handle), "stop a worker")
            self.handle = ffi.NULL


@dataclass(frozen=True, slots=True)
class WrittenPages:
    """Where the pages that are written are logged; `ring` is the used ring's guest address, or
    None where that is not logged."""

    memory: MemoryMap
    size: int
    ring: int | None

    def fill(self, settings: Any) -> None:
        settings.memory, settings.at, settings.size = self.memory.handle, 0, self.size
        settings.ring = self.ring is not None
        settings.ring_guest = self.ring or 0


class ServedQueue:
    """A virtqueue that a worker serves from now on; see vt_queue_start.

    `ended` is called when it was stopped. `log` is the map that holds the in-flight log and the
    log's address in it. Raises UsageError for a ring that does not lie in `memory` or a log that
    contradicts itself. With `call_index` the call is a VDUSE device, and that is the queue's number
    there.
    """

    def __init__(
        self,
        worker: Worker,
        disk: RawDisk,
        memory: MemoryMap,
        layout: RingLayout,
        *,
        base: int = 0,
        write_through: bool = False,
        kick: int | None = None,
        call: int | None = None,
        error: int | None = None,
        log: tuple[MemoryMap, int] | None = None,
        dirty: WrittenPages | None = None,
        share: LimitShare | None = None,
        call_index: int | None = None,
        port: _Port | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        settings = ffi.new("struct vt_queue_settings *")
        settings.memory, settings.disk, settings.base = memory.handle, disk.handle, base
        layout.fill(settings.layout)
        settings.mode.write_through = write_through
        settings.kick_fd = -1 if kick is None else kick
        settings.call_fd = -1 if call is None else call
        settings.error_fd = -1 if error is None else error
        if call_index is not None:
            settings.call_is_vduse, settings.call_index = True, call_index
        if log is not None:
            settings.log_memory, settings.log_at = log[0].handle, log[1]
        if dirty is not None:
            dirty.fill(settings.dirty)
        if share is not None:
            settings.share = share.handle
        if port is not None:
            settings.port = port.handle
        made = ffi.new("struct vt_queue **")
        _done(lib.vt_queue_start(worker.handle, settings, made), "start a queue")
        self.handle = made[0]
        self.worker = worker
        self._ended = ended
        worker.queues += 1

    def stop(self) -> int:
        """End it when what it fetched has ended; returns the next available index."""
        return self._end(lib.vt_queue_stop)

    def suspend(self) -> int:
        """End it; what its disk can cancel stays in the in-flight log. See vt_queue_suspend."""
        return self._end(lib.vt_queue_suspend)

    def _end(self, end: Callable[[Any], int]) -> int:
        handle, self.handle = self.handle, ffi.NULL
        if handle == ffi.NULL:
            raise VfiotoolError("the queue has been stopped already")
        self.worker.queues -= 1
        base = int(end(handle))
        self._ended()
        return base

    def move(self, worker: Worker) -> bool:
        """Have another worker serve it; whether it does now: not while it waits for its disk, nor
        where the worker has no port to that.
        Raises KernelError as epoll_ctl does; it stays where it is then."""
        result = int(lib.vt_queue_move(self.handle, worker.handle))
        if result in (-errno.EBUSY, -errno.ENXIO):
            return False
        _done(result, "move a queue")
        self.worker.queues -= 1
        self.worker = worker
        worker.queues += 1
        return True

    @property
    def served(self) -> int:
        """Requests since its start."""
        return int(lib.vt_queue_served(self.handle))

    def set_memory(self, memory: MemoryMap) -> bool:
        """Put another map under it; whether the ring lies in it. It is broken otherwise."""
        return int(lib.vt_queue_set_memory(self.handle, memory.handle)) == 0

    def set_call(self, call: int | None) -> None:
        result = lib.vt_queue_set_call(self.handle, -1 if call is None else call)
        _done(result, "change a queue's call")

    def set_dirty_log(self, dirty: WrittenPages | None) -> None:
        """Log what is written from now on, or nothing. Raises UsageError for a log of no bytes."""
        settings = ffi.new("struct vt_dirty_log *")
        if dirty is not None:
            dirty.fill(settings)
        _done(lib.vt_queue_set_dirty_log(self.handle, settings), "log what a queue writes")

    def broken(self) -> str | None:
        """Why it serves no more, in words; None while it does."""
        why = lib.vt_queue_broken(self.handle)
        return None if why == ffi.NULL else ffi.string(why).decode()
