"""NVMe disks on a VFIO driver, served: one controller for all the exports of a process.

Each worker has a queue pair of its own (a port), which it polls while commands are out and whose
interrupt wakes it otherwise. Memory of machines is mapped for the controller as it is announced, so
that requests move between it and the disk without a copy. A namespace, or a range of its blocks, is
one export's alone unless all that have it only read.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from vfiotool.drivers.nvme import Controller, IoQueue, Namespace
from vfiotool.errors import Refused, UsageError, VfiotoolError
from vfiotool.native.port import BounceBuffers, NvmePort, PortPlace
from vfiotool.native.virtqueue import MemoryMap, MemoryRegion, Worker
from vfiotool.vfio import Device, DmaBuffer

QUEUE_ENTRIES = 256
_BOUNCES, _BOUNCE_BYTES = 64, 64 << 10
_PAGE = 4096
# Optional commands (Identify Controller, ONCS): Dataset Management, Write Zeroes.
_TRIMS, _ZEROES = 1 << 2, 1 << 3
# A controller that answers nothing for so long is reset.
SILENCE_S = 10.0
LOOK_S = 0.5
# What is in flight when memory goes: commands end in this time unless the controller is ill.
_LEAVE_S = 0.05
_PLACE = re.compile(r"(?P<device>.+?)(?:/(?P<nsid>[1-9]\d{0,9}))?")


def parse_place(text: str) -> tuple[str, int]:
    """`ADDRESS[/NSID]`: the device, and the namespace, 1 if none is said. Raises UsageError."""
    found = _PLACE.fullmatch(text)
    if found is None or "\0" in text:
        raise UsageError(f"--nvme {text[:80]!r}: write it as ADDRESS or ADDRESS/NSID")
    return found["device"], int(found["nsid"] or 1)


@dataclass(frozen=True)
class BlockRange:
    """Bytes of a namespace that an export has."""

    nsid: int
    start: int
    end: int
    read_only: bool

    def collides_with(self, other: BlockRange) -> bool:
        overlap = self.nsid == other.nsid and self.start < other.end and other.start < self.end
        return overlap and not (self.read_only and other.read_only)


class NvmeHost:
    """An opened controller and what its exports have of it. `shared` gives the one of a device.

    A thread looks after the controller: one that reports a fatal status, or says nothing for
    `SILENCE_S`, is reset; requests that were out are sent again. If that does not help they, and
    all that follow, end with an I/O error.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.users = 0
        self.resets = 0
        self.failure: str | None = None
        self._ranges: list[BlockRange] = []
        self._ports: dict[int, tuple[NvmePort, IoQueue, DmaBuffer]] = {}
        self._mapped: dict[int, list[DmaBuffer]] = {}
        self._retired: list[MemoryMap] = []
        self._lock = threading.RLock()
        self._ending = threading.Event()
        with ExitStack() as stack:
            self.device = stack.enter_context(Device.open(name))
            self.controller = stack.enter_context(Controller(self.device))
            self._open = stack.pop_all()
        self._watcher = threading.Thread(target=self._watch, name=f"nvme {name}", daemon=True)
        self._watcher.start()

    def namespace(self, nsid: int) -> Namespace:
        """The namespace. Raises as Controller.namespace does, Unsupported for one with metadata."""
        found = self.controller.namespace(nsid)
        found.refuse_metadata()
        return found

    def place(self, disk: Namespace) -> PortPlace:
        optional = self.controller.identity.optional_io
        return PortPlace(
            disk.nsid, disk.block_bytes, bool(optional & _TRIMS), bool(optional & _ZEROES)
        )

    @contextmanager
    def reserved(self, wanted: BlockRange) -> Iterator[None]:
        """Have a range for the time of the block. Raises Refused if another export has part of
        it."""
        with self._lock:
            if any(wanted.collides_with(other) for other in self._ranges):
                raise Refused(
                    f"{self.name}/{wanted.nsid}: another export has bytes from {wanted.start} to"
                    f" {wanted.end}, or some of them",
                    hint="give each export a range of its own: --offset and --size",
                )
            self._ranges.append(wanted)
        try:
            yield
        finally:
            with self._lock:
                self._ranges.remove(wanted)

    # Workers

    def port(self, worker: Worker) -> NvmePort:
        """The worker's port, made when it is asked for first. Raises UsageError where the
        controller has no more queues."""
        with self._lock:
            if id(worker) not in self._ports:
                self._ports[id(worker)] = self._make_port(worker)
            return self._ports[id(worker)][0]

    def _make_port(self, worker: Worker) -> tuple[NvmePort, IoQueue, DmaBuffer]:
        controller = self.controller
        vector = len(self._ports) + 1
        try:
            controller.enable_interrupts(vector + 1)
        except VfiotoolError:
            # There are no more: this one is polled.
            vector = 0
        limit = controller.registers.capabilities.field("queue_entries") + 1
        entries = min(QUEUE_ENTRIES, limit)
        queue = controller.create_queue(entries, vector=vector or None)
        with ExitStack() as stack:
            stack.callback(controller.delete_queue, queue)
            memory = self.device.dma.alloc(_BOUNCES * _BOUNCE_BYTES, align=_PAGE)
            stack.callback(memory.close)
            port = NvmePort(
                worker,
                queue.pair.handle,
                BounceBuffers(memory.address, memory.iova, _BOUNCE_BYTES, _BOUNCES),
                controller=id(self),
                page_size=controller.page_bytes,
                max_transfer=controller.max_transfer,
                event=queue.interrupt.descriptor if queue.interrupt is not None else None,
            )
            stack.pop_all()
        return port, queue, memory

    # Memory

    def reach(self, memory: MemoryMap, regions: Sequence[MemoryRegion]) -> None:
        """Map a machine's memory for the controller, before queues have it. Raises KernelError
        (no room, not lockable: the hint says how much is missing); nothing is mapped then."""
        files = {region.guest: region for region in regions}
        with self._lock, ExitStack() as stack:
            made = []
            for number, (address, size, guest) in enumerate(memory.places()):
                region = files[guest]
                # A process that serves the controller gets the file, which it maps from its start.
                lent = self.device.space.shares_memory
                start = address - region.offset if lent else address // _PAGE * _PAGE
                buffer = self.device.dma.map(
                    memory.view(start, address + size - start), file=region.fd if lent else None
                )
                stack.callback(buffer.close)
                memory.set_io(number, buffer.iova + address - start)
                made.append(buffer)
            stack.pop_all()
            self._mapped[id(memory)] = made

    def leave(self, memory: MemoryMap) -> None:
        """Take a machine's memory from the controller, and close the map: now, or as soon as the
        last request that uses it has ended."""
        ends = time.monotonic() + _LEAVE_S
        while memory.references > 1 and time.monotonic() < ends:
            time.sleep(1e-4)
        with self._lock:
            self._retired.append(memory)
            self._bury()

    def _bury(self) -> None:
        """Unmap what nobody uses any more."""
        for memory in list(self._retired):
            if memory.references > 1:
                continue
            self._retired.remove(memory)
            for buffer in self._mapped.pop(id(memory), []):
                with contextlib.suppress(VfiotoolError):
                    # Memory that the IOMMU keeps is kept by the buffer as well.
                    buffer.close()
            memory.close()

    # The controller's health

    def _watch(self) -> None:
        while not self._ending.wait(LOOK_S):
            with self._lock:
                self._bury()
                failure = self.failure or self._ailment()
                if failure is not None and self.failure is None:
                    self._revive()

    def _ailment(self) -> str | None:
        """What is wrong with the controller, None if nothing is."""
        silence = 0.0
        for port, _, _ in self._ports.values():
            figures = port.figures()
            if figures.in_flight:
                silence = max(silence, time.monotonic() - figures.progressed_ns / 1e9)
        if silence > SILENCE_S:
            return f"it has answered nothing for {silence:.1f} s"
        try:
            return self.controller.health.look()
        except VfiotoolError as error:
            return error.message

    def _revive(self) -> None:
        ports = [port for port, _, _ in self._ports.values()]
        for port in ports:
            port.down()
        self.resets += 1
        try:
            self.controller.reset()
        except VfiotoolError as error:
            self.failure = error.message
            # What it still does must not reach memory that machines get back.
            with contextlib.suppress(VfiotoolError):
                self.device.set_bus_master(False)
        for port in ports:
            port.up(works=self.failure is None)

    def close(self) -> None:
        """Shut the controller down; no queue uses it any more."""
        self._ending.set()
        self._watcher.join()
        for port, queue, memory in self._ports.values():
            port.close()
            with contextlib.suppress(VfiotoolError):
                self.controller.delete_queue(queue)
            with contextlib.suppress(VfiotoolError):
                memory.close()
        self._ports.clear()
        self._bury()
        with contextlib.suppress(VfiotoolError):
            self._open.close()


_hosts: dict[str, NvmeHost] = {}
_opening = threading.Lock()


@contextmanager
def shared(name: str) -> Iterator[NvmeHost]:
    """The controller of a device, opened with its first user and closed with its last. Raises what
    opening a device does, Unsupported for one that is not an NVMe controller."""
    with _opening:
        host = _hosts.get(name)
        if host is None:
            host = _hosts[name] = NvmeHost(name)
        host.users += 1
    try:
        yield host
    finally:
        with _opening:
            host.users -= 1
            if not host.users:
                del _hosts[name]
                host.close()


class NvmeRange:
    """What one export has of a controller: a namespace, or `size` bytes from `offset` on.

    Raises UsageError for a range that the namespace does not have or that is not whole blocks,
    Refused for one that another export has, and what opening the device does.
    """

    def __init__(self, place: str, offset: int, size: int | None, *, read_only: bool) -> None:
        name, nsid = parse_place(place)
        with ExitStack() as stack:
            self.host = stack.enter_context(shared(name))
            disk = self.host.namespace(nsid)
            self.block_bytes = disk.block_bytes
            self.place = self.host.place(disk)
            self.available = max(disk.size_bytes - offset, 0)
            wanted = self.available if size is None else size
            if offset % disk.block_bytes or wanted % disk.block_bytes:
                raise UsageError(
                    f"{place}: its blocks have {disk.block_bytes} bytes; --offset and --size are"
                    " whole blocks"
                )
            stack.enter_context(
                self.host.reserved(BlockRange(nsid, offset, offset + wanted, read_only))
            )
            self._open = stack.pop_all()

    def close(self) -> None:
        """Give it back."""
        self._open.close()
