"""What a server's exports do a second, from their counters at two moments: for `--stats`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from vfiotool.native.virtqueue import DiskFigures
from vfiotool.virtio.block import BlockDisk
from vfiotool.virtio.server import Server


@dataclass(frozen=True)
class ExportRates:
    """One export over a while. `reads`, `writes` and bytes are a second; the rest counts."""

    name: str
    reads: float
    writes: float
    bytes_read: float
    bytes_written: float
    flushes: int
    failed: int
    waits: int
    """How often a queue had to wait for its limits."""


@dataclass(frozen=True)
class DiskCounters:
    """An export's counters at one moment."""

    figures: DiskFigures
    waits: int


def rates(name: str, before: DiskCounters, now: DiskCounters, seconds: float) -> ExportRates:
    """What was done in between. `seconds` is more than 0."""
    old, new = before.figures, now.figures
    return ExportRates(
        name,
        (new.reads - old.reads) / seconds,
        (new.writes - old.writes) / seconds,
        (new.bytes_read - old.bytes_read) / seconds,
        (new.bytes_written - old.bytes_written) / seconds,
        new.flushes - old.flushes,
        new.failed - old.failed,
        now.waits - before.waits,
    )


class Stats:
    """Looks at a server's disks again and again. An export that came since the last look begins
    with it; one that went is left out."""

    def __init__(self, server: Server, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._clock = server, clock
        self._at, self._before = clock(), self._look()

    def _look(self) -> dict[str, DiskCounters]:
        return {
            name: DiskCounters(export.device.figures(), export.device.share.waits)
            for name, export in self._server.exports.items()
            if isinstance(export.device, BlockDisk)
        }

    def take(self) -> list[ExportRates]:
        """What was done since the last look, or since this was made."""
        at, now = self._clock(), self._look()
        seconds, before = max(at - self._at, 1e-9), self._before
        self._at, self._before = at, now
        return [
            rates(name, before[name], counters, seconds)
            for name, counters in now.items()
            if name in before
        ]
