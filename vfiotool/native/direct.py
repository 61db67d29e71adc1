"""Virtqueues that Python serves itself: requests as memoryviews over the guest's memory.

C walks, checks and maps; what comes here is a list of views that lie in the front end's memory. A
view keeps that memory mapped for as long as it, or a slice of it, lives, so none ever dangles; what
a guest does with its memory meanwhile is its own affair. See cext/virtio/direct.h.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable
from threading import get_ident
from typing import Any

from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.native.library import failed, ffi, lib
from vfiotool.native.virtqueue import MemoryMap, RingLayout, WrittenPages

_REFUSED = {errno.EINVAL: UsageError, errno.EFAULT: UsageError}
_FIELDS = 6


class GuestViews:
    """The regions of a memory map as memoryviews, found by address in this process."""

    def __init__(self, memory: MemoryMap) -> None:
        count = lib.vt_memory_places(memory.handle, ffi.NULL, 0)
        places = ffi.new("struct vt_place[]", count)
        lib.vt_memory_places(memory.handle, places, count)
        found = []
        for place in places:
            # The buffer, and every slice of it, holds a reference of its own to the map.
            lib.vt_memory_get(memory.handle)
            start = ffi.gc(ffi.cast("char *", place.host), _giver(memory.handle))
            found.append((place.host, place.size, memoryview(ffi.buffer(start, place.size))))
        found.sort(key=lambda entry: entry[0])
        self.starts = [entry[0] for entry in found]
        self.views = [entry[2] for entry in found]

    def view(self, address: int, length: int) -> memoryview:
        """The bytes at an address that C found to lie in one region."""
        index = bisect_right(self.starts, address) - 1
        offset = address - self.starts[index]
        return self.views[index][offset : offset + length]


def _giver(handle: Any) -> Any:
    return lambda _: lib.vt_memory_put(handle)


def _ended() -> Any:
    raise VfiotoolError("the queue has been stopped")


class QueueRequest:
    """One request of a driver: what the device reads, and where it writes.

    `readable` and `writable` are views over the guest's memory in the driver's order, which the
    guest may change at any time: copy what is judged. There are `read_bytes` to read and `room` for
    so many bytes. `complete` ends it, once.
    """

    __slots__ = ("_queue", "head", "read_bytes", "readable", "room", "writable")

    def __init__(
        self,
        queue: DirectQueue,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        read_bytes: int,
        room: int,
    ) -> None:
        self._queue: DirectQueue | None = queue
        self.head = head
        self.readable = readable
        self.writable = writable
        self.read_bytes = read_bytes
        self.room = room

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "in flight"
        return f"<QueueRequest {self.head}, {self.read_bytes}+{self.room} bytes, {state}>"

    @property
    def is_complete(self) -> bool:
        return self._queue is None

    def data(self) -> bytes:
        """All that is readable, copied, as one string of bytes."""
        return b"".join(self.readable)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copy bytes into the writable views from `offset` on; returns how many found room."""
        left, done = memoryview(data).cast("B"), 0
        for view in self.writable:
            if offset >= len(view):
                offset -= len(view)
                continue
            size = min(len(view) - offset, len(left) - done)
            view[offset : offset + size] = left[done : done + size]
            done, offset = done + size, 0
            if done == len(left):
                break
        return done

    def complete(self, written: int = 0) -> None:
        """End it, saying that the first `written` writable bytes were written.

        Raises UsageError if it has ended, or for more bytes than there are. After its queue was
        stopped this does nothing: the request is the next back end's, by the in-flight log.
        """
        queue = self._queue
        if queue is None:
            raise UsageError("the request is complete already")
        queue.complete(self, written)
        self._queue = None


class DirectQueue:
    """A virtqueue that one thread serves: `fetch`, complete, `publish`.

    `log` is the map that holds the in-flight log and the log's address in it. Raises UsageError for
    a ring that does not lie in `memory` or a log that contradicts itself.
    """

    def __init__(
        self,
        memory: MemoryMap,
        layout: RingLayout,
        *,
        base: int = 0,
        call: int | None = None,
        log: tuple[MemoryMap, int] | None = None,
        dirty: WrittenPages | None = None,
    ) -> None:
        settings = ffi.new("struct vt_direct_settings *")
        settings.memory, settings.base = memory.handle, base
        layout.fill(settings.layout)
        settings.call_fd = -1 if call is None else call
        if log is not None:
            settings.log_memory, settings.log_at = log[0].handle, log[1]
        if dirty is not None:
            dirty.fill(settings.dirty)
        made = ffi.new("struct vt_direct **")
        result = lib.vt_direct_start(settings, made)
        if result < 0:
            raise failed(result, "start a queue", branches=_REFUSED)
        self._handle = made[0]
        self._thread = get_ident()
        # Called at each completion, unless whoever completes publishes by itself.
        self.completed: Callable[[], None] | None = None
        self.has_log = log is not None
        self._logs = bool(lib.vt_direct_logs(self._handle))
        self._views = GuestViews(memory)
        self._fields = ffi.new("uint32_t[]", _FIELDS * lib.VT_DIRECT_BATCH)
        self._numbers = memoryview(ffi.buffer(self._fields)).cast("I")
        table = ffi.buffer(
            ffi.cast("char *", lib.vt_direct_segments(self._handle)), 16 * lib.vt_direct_room()
        )
        self._segments = memoryview(table).cast("Q")

    def _own(self) -> Any:
        """The queue in C, for its thread alone: C gives up the interpreter's lock."""
        if get_ident() != self._thread:
            raise UsageError(
                "a virtqueue belongs to the thread that started it",
                hint="from another one: loop.call_soon_threadsafe(request.complete, written)",
            )
        return self._handle or _ended()

    @property
    def is_open(self) -> bool:
        return bool(self._handle != ffi.NULL)

    def fetch(self, most: int = 64) -> list[QueueRequest]:
        """Up to `most` (64) available requests, none if there are none or the queue is broken."""
        got = lib.vt_direct_fetch(self._own(), self._fields, most)
        if got <= 0:
            return []
        numbers = self._numbers[: _FIELDS * got].tolist()
        last = _FIELDS * (got - 1)
        end = numbers[last + 3] + numbers[last + 1] + numbers[last + 2]
        segments = self._segments[: 2 * end].tolist()
        view, found = self._views.view, []
        for at in range(0, _FIELDS * got, _FIELDS):
            head, readable, writable, first, read_bytes, room = numbers[at : at + _FIELDS]
            first, middle = 2 * first, 2 * (first + readable)
            end = middle + 2 * writable
            found.append(
                QueueRequest(
                    self,
                    head,
                    [view(segments[i], segments[i + 1]) for i in range(first, middle, 2)],
                    [view(segments[i], segments[i + 1]) for i in range(middle, end, 2)],
                    read_bytes,
                    room,
                )
            )
        return found

    def complete(self, request: QueueRequest, written: int) -> None:
        """End a request; see QueueRequest.complete."""
        if written and not 0 <= written <= request.room:
            raise UsageError(f"{written} bytes written where there is room for {request.room}")
        if self._handle == ffi.NULL:
            return
        handle = self._own()
        if written and self._logs:
            left = written
            for view in request.writable:
                size = min(left, len(view))
                address = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
                lib.vt_direct_wrote(handle, address, size)
                left -= size
        lib.vt_direct_complete(handle, request.head, written)
        if self.completed is not None:
            self.completed()

    def publish(self) -> None:
        """Make completions visible to the driver, with a signal if it wants one."""
        lib.vt_direct_publish(self._own())

    def notify(self, on: bool) -> bool:
        """Ask for kicks, or say that none is needed; whether requests wait already."""
        return bool(lib.vt_direct_notify(self._own(), on))

    @property
    def waiting(self) -> int:
        """Requests that are available."""
        return int(lib.vt_direct_waiting(self._own()))

    @property
    def in_flight(self) -> int:
        """Requests that were fetched and have not ended."""
        return int(lib.vt_direct_in_flight(self._own()))

    def stop(self) -> int:
        """End it; returns the next available index. What is in flight is lost without a log."""
        handle, self._handle = self._own(), ffi.NULL
        # Its table goes with it.
        self._segments.release()
        return int(lib.vt_direct_stop(handle))

    def set_memory(self, memory: MemoryMap) -> bool:
        """Put another map under it; whether the ring lies in it. It is broken otherwise."""
        if lib.vt_direct_set_memory(self._own(), memory.handle) != 0:
            return False
        self._views = GuestViews(memory)
        return True

    def set_call(self, call: int | None) -> None:
        """Signal another eventfd from now on."""
        result = lib.vt_direct_set_call(self._own(), -1 if call is None else call)
        if result < 0:
            raise failed(result, "change a queue's call", branches=_REFUSED)

    def set_dirty_log(self, dirty: WrittenPages | None) -> None:
        """Log what is written from now on, or nothing. Raises UsageError for a log of no bytes."""
        settings = ffi.new("struct vt_dirty_log *")
        if dirty is not None:
            dirty.fill(settings)
        result = lib.vt_direct_set_dirty_log(self._own(), settings)
        self._logs = bool(lib.vt_direct_logs(self._handle))
        if result < 0:
            raise failed(result, "log what a queue writes", branches=_REFUSED)

    def broken(self) -> str | None:
        """Why it serves no more, in words; None while it does."""
        why = lib.vt_direct_broken(self._own())
        return None if why == ffi.NULL else ffi.string(why).decode()
