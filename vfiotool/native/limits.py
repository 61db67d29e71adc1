"""Limits of served queues in C: rates, groups of shares, weights. See cext/virtio/limits.h.

A share belongs to one device, whose queues are charged to it; a group to any number of shares. Both
are counted: closing one gives this reference back, and queues that run keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vfiotool.native.library import failed, ffi, lib

WEIGHT = 100


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests and bytes a second, 0 for no limit; `burst_ns` is what may be saved up while idle,
    as a time at these rates."""

    requests: int = 0
    bytes: int = 0
    burst_ns: int = 50_000_000

    def filled(self) -> Any:
        made = ffi.new("struct vt_rate *")
        made.requests, made.bytes, made.burst_ns = self.requests, self.bytes, self.burst_ns
        return made


UNLIMITED = Rate()


@dataclass(frozen=True, slots=True)
class Level:
    """What was taken of a limit and is not earned yet, as times at its rates; `typical` is the
    bytes of a request as of late. What goes on in another process begins from it."""

    requests_ns: int = 0
    bytes_ns: int = 0
    typical: int = 0

    @classmethod
    def of(cls, get: Any, handle: Any, now: int | None) -> Level:
        found = ffi.new("struct vt_level *")
        get(handle, now_ns() if now is None else now, found)
        return cls(int(found.requests_ns), int(found.bytes_ns), int(found.typical))

    def put(self, set_level: Any, handle: Any, now: int | None) -> None:
        made = ffi.new("struct vt_level *")
        made.requests_ns, made.bytes_ns = self.requests_ns, self.bytes_ns
        made.typical = self.typical
        set_level(handle, made, now_ns() if now is None else now)


def now_ns() -> int:
    """The clock of workers and limits."""
    return int(lib.vt_now_ns())


class LimitGroup:
    """A limit that several shares have in common; its bucket begins empty."""

    def __init__(self, rate: Rate, *, now: int | None = None) -> None:
        made = ffi.new("struct vt_group **")
        result = lib.vt_group_create(rate.filled(), now_ns() if now is None else now, made)
        if result:
            raise failed(result, "make a group of limits")
        self.handle = made[0]

    def set(self, rate: Rate, *, now: int | None = None) -> None:
        lib.vt_group_set(self.handle, rate.filled(), now_ns() if now is None else now)

    def level(self, *, now: int | None = None) -> Level:
        return Level.of(lib.vt_group_level, self.handle, now)

    def set_level(self, level: Level, *, now: int | None = None) -> None:
        """Go on from a level that was so at `now`."""
        level.put(lib.vt_group_set_level, self.handle, now)

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL
        lib.vt_group_put(handle)


class LimitShare:
    """What one device may do; limited by nothing until `set`."""

    def __init__(self) -> None:
        made = ffi.new("struct vt_share **")
        result = lib.vt_share_create(made)
        if result:
            raise failed(result, "make a limit")
        self.handle = made[0]

    def set(
        self,
        rate: Rate,
        *,
        weight: int = WEIGHT,
        group: LimitGroup | None = None,
        now: int | None = None,
    ) -> None:
        handle = ffi.NULL if group is None else group.handle
        moment = now_ns() if now is None else now
        lib.vt_share_set(self.handle, rate.filled(), weight, handle, moment)

    def level(self, *, now: int | None = None) -> Level:
        """Its own; its group has another."""
        return Level.of(lib.vt_share_level, self.handle, now)

    def set_level(self, level: Level, *, now: int | None = None) -> None:
        """Go on from a level that was so at `now`."""
        level.put(lib.vt_share_set_level, self.handle, now)

    @property
    def waits(self) -> int:
        """How often a queue had to wait for its limits."""
        return int(lib.vt_share_waits(self.handle))

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL
        lib.vt_share_put(handle)
