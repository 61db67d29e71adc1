"""What a device is to whoever connects a driver to it: features, configuration, queues that start.

A disk in C (`block.BlockDisk`) and a class in Python (`device.VirtioDevice`, by its host) are
served alike, over vhost-user and VDUSE.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntFlag
from typing import Protocol

from vfiotool.native.virtqueue import (
    MemoryMap,
    MemoryRegion,
    RingLayout,
    Worker,
    WrittenPages,
)
from vfiotool.virtio.message import VringAddresses


class VirtioFeature(IntFlag):
    """Feature bits that belong to no device type (section 6), and vhost-user's own."""

    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34


@dataclass(frozen=True)
class QueueStart:
    """A virtqueue as it is to start. Descriptors stay the caller's; `log` is the in-flight log's
    map and its address there."""

    memory: MemoryMap
    layout: RingLayout
    base: int = 0
    kick: int | None = None
    call: int | None = None
    error: int | None = None
    log: tuple[MemoryMap, int] | None = None
    dirty: WrittenPages | None = None
    call_index: int | None = None
    """`call` is a VDUSE device, and this the queue's number there."""


class RunningQueue(Protocol):
    """A queue that was started; each call returns when it has been done."""

    def stop(self) -> int:
        """End it when what it fetched has ended; returns the next available index."""

    def suspend(self) -> int:
        """As `stop`, but what can be cancelled is, and stays in the in-flight log, if any."""

    def set_memory(self, memory: MemoryMap) -> bool:
        """Put another map under it; whether the ring lies in it."""

    def set_call(self, call: int | None) -> None:
        """Signal another eventfd from now on."""

    def set_dirty_log(self, dirty: WrittenPages | None) -> None:
        """Log what is written from now on, or nothing."""

    def broken(self) -> str | None:
        """Why it serves no more, in words; None while it does."""


class ServedDevice(Protocol):
    """A device that front ends drive."""

    @property
    def queues(self) -> int:
        """How many virtqueues it has."""

    def features(self) -> int:
        """The feature bits of its type that it offers."""

    def config(self) -> bytes:
        """Its configuration space as it is now."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote there. Raises UsageError for what cannot be written."""

    def reach(self, memory: MemoryMap, regions: list[MemoryRegion]) -> None:
        """A driver's memory, before a queue has it: for what moves data by itself. Raises
        KernelError where there is no room for it; the map stays the caller's then."""

    def held_up(self) -> bool:
        """Whether its driver made a thread of ours wait, by an interrupt that blocks."""

    def forgive(self) -> None:
        """`held_up` no more: that driver is gone."""

    def leave(self, memory: MemoryMap) -> None:
        """Close a map that `reach` was given and that no queue is to use any more."""

    def start_queue(
        self, workers: list[Worker], index: int, features: int, start: QueueStart
    ) -> RunningQueue:
        """Serve a queue from now on, with the features that were negotiated."""

    def resize(self) -> bool:
        """Take the size of what is behind it anew; whether it changed."""

    def close(self) -> None:
        """Give back what it holds; no queue runs any more."""


@dataclass
class Vring:
    """One queue's state. Descriptors are owned; `queue` is there while it runs."""

    size: int = 0
    base: int = 0
    addresses: VringAddresses | None = None
    kick: int | None = None
    call: int | None = None
    error: int | None = None
    kicked: bool = False
    enabled: bool = False
    paused: bool = False
    queue: RunningQueue | None = None

    def close(self) -> None:
        """Close its descriptors."""
        for descriptor in (self.kick, self.call, self.error):
            if descriptor is not None:
                os.close(descriptor)
        self.kick = self.call = self.error = None
