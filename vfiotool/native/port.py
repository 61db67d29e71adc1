"""A worker's way to an NVMe controller: `vt_port` as an object that ends explicitly.

Whoever makes one closes it before the queue pair. See cext/virtio/port.h for what is guaranteed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vfiotool.native.library import failed, ffi, lib
from vfiotool.native.virtqueue import PortPlace, Worker

__all__ = ["BounceBuffers", "NvmePort", "PortFigures", "PortPlace"]


@dataclass(frozen=True, slots=True)
class BounceBuffers:
    """`count` pieces of `size` bytes at `address` here and at `iova` for the controller."""

    address: int
    iova: int
    size: int
    count: int


@dataclass(frozen=True, slots=True)
class PortFigures:
    """Counters of a port; `progressed_ns` is of CLOCK_MONOTONIC."""

    commands: int
    bounced: int
    bounced_bytes: int
    progressed_ns: int
    in_flight: int


class NvmePort:
    """A port of `worker` to the controller whose queue pair `queue` (a struct vt_nvme_queue *)
    nobody else uses. `controller` is any number that is the same for ports of one controller.
    Without `event`, the eventfd that completions signal, the port is polled.

    Raises UsageError for sizes that cannot be, KernelError.
    """

    def __init__(
        self,
        worker: Worker,
        queue: Any,
        bounces: BounceBuffers,
        *,
        controller: int,
        page_size: int,
        max_transfer: int,
        event: int | None,
    ) -> None:
        settings = ffi.new("struct vt_port_settings *")
        settings.queue, settings.controller = queue, controller
        settings.bounce, settings.bounce_io = bounces.address, bounces.iova
        settings.bounces, settings.bounce_bytes = bounces.count, bounces.size
        settings.page_size, settings.max_transfer = page_size, max_transfer
        settings.event_fd = -1 if event is None else event
        made = ffi.new("struct vt_port **")
        _check(lib.vt_port_open(settings, made), "open a port")
        self.handle = made[0]
        self._worker = worker
        try:
            _check(lib.vt_worker_add_port(worker.handle, self.handle), "add a port")
        except BaseException:
            lib.vt_port_close(self.handle)
            raise
        worker.ports.append(self)

    def down(self) -> None:
        """The controller is about to be reset: what is begun from now on waits."""
        if self.handle != ffi.NULL:
            lib.vt_worker_port_down(self._worker.handle, self.handle)

    def up(self, *, works: bool) -> None:
        """After that: what was out is sent again, or ends with an error and so does all else."""
        if self.handle != ffi.NULL:
            lib.vt_worker_port_up(self._worker.handle, self.handle, works)

    def figures(self) -> PortFigures:
        values = ffi.new("struct vt_port_figures *")
        if self.handle != ffi.NULL:
            lib.vt_port_figures(self.handle, values)
        return PortFigures(*(getattr(values, name) for name in PortFigures.__slots__))

    def close(self) -> None:
        """End it; no queue uses it any more. Closing twice is nothing. Raises KernelError (EBUSY)
        while something is out."""
        if self.handle == ffi.NULL:
            return
        _check(lib.vt_worker_remove_port(self._worker.handle, self.handle), "close a port")
        handle, self.handle = self.handle, ffi.NULL
        self._worker.ports.remove(self)
        lib.vt_port_close(handle)


def _check(result: int, operation: str) -> None:
    if result < 0:
        raise failed(result, operation)
