"""Virtqueues that Python serves itself: requests as memoryviews over the guest's memory.

C walks, checks and maps; what comes here is a list of views that lie in the front end's memory. A
view keeps that memory mapped for as long as it, or a slice of it, lives, so none ever dangles; what
a guest does with its memory meanwhile is its own affair. See cext/virtio/direct.h.
"""

from __future__ import annotations

import errno
from threading import get_ident
from typing import Any

from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.native import _types
from vfiotool.native._types import GuestMemory, QueueRequest
from vfiotool.native.library import failed, ffi, lib
from vfiotool.native.virtqueue import MemoryMap, RingLayout, WrittenPages

__all__ = ["DirectQueue", "QueueRequest"]

_REFUSED = {errno.EINVAL: UsageError, errno.EFAULT: UsageError}


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def _guest_memory(memory: MemoryMap) -> GuestMemory:
    """The regions of a map for C; each view of them, and every slice, keeps the map."""
    views = []
    for host, size, _ in sorted(memory.places()):
        lib.vt_memory_get(memory.handle)
        start = ffi.gc(ffi.cast("char *", host), _giver(memory.handle))
        views.append(memoryview(ffi.buffer(start, size)))
    return GuestMemory(_address(memory.handle), views)


def signal(descriptor: int) -> bool:
    """Add 1 to a driver's eventfd. False if that blocks: nobody should signal it again."""
    return bool(lib.vt_signal(descriptor))


def signal_blocks() -> str:
    """What a queue that was signalled in vain says of itself."""
    return str(ffi.string(lib.vt_signal_blocks()).decode())


def _giver(handle: Any) -> Any:
    return lambda _: lib.vt_memory_put(handle)


class DirectQueue(_types.DirectQueue):
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
        made, views = ffi.new("struct vt_direct **"), _guest_memory(memory)
        result = lib.vt_direct_start(settings, made)
        if result < 0:
            raise failed(result, "start a queue", branches=_REFUSED)
        self._handle = made[0]
        self._thread = get_ident()
        self.has_log = log is not None
        calls = _address(lib.vt_direct_calls())
        super().__init__(_address(made[0]), calls, views, QueueRequest)

    def _refuse(self, reason: int, number: object, room: int) -> None:
        """What C refuses; see cext/python/direct_types.h."""
        if reason == 1:
            raise UsageError("the request is complete already")
        if reason == 2:
            raise UsageError(f"{number} bytes written where there is room for {room}")
        if reason == 3:
            raise UsageError(
                "a virtqueue belongs to the thread that started it",
                hint="from another one: loop.call_soon_threadsafe(request.complete, written)",
            )
        raise VfiotoolError("the queue has been stopped")

    def _own(self) -> Any:
        """The queue in C, for its thread alone: C gives up the interpreter's lock."""
        if get_ident() != self._thread:
            self._refuse(3, None, 0)
        if not self.is_open:
            self._refuse(4, None, 0)
        return self._handle

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
        handle = self._own()
        self._forget()
        return int(lib.vt_direct_stop(handle))

    def set_memory(self, memory: MemoryMap) -> bool:
        """Put another map under it; whether the ring lies in it. It is broken otherwise."""
        views = _guest_memory(memory)
        if lib.vt_direct_set_memory(self._own(), memory.handle) != 0:
            return False
        self._set_views(views)
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
        if result < 0:
            raise failed(result, "log what a queue writes", branches=_REFUSED)

    def broken(self) -> str | None:
        """Why it serves no more, in words; None while it does."""
        why = lib.vt_direct_broken(self._own())
        return None if why == ffi.NULL else ffi.string(why).decode()
