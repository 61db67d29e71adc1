"""NVMe: a polled user-space driver for one controller, its namespaces and I/O queues.

    with Device.open("0000:01:00.0") as device:
        controller = Controller(device)
        disk = controller.namespace(1)
        queue = controller.create_queue()
        block = queue.read(disk, lba=0, blocks=1)

Sources: NVM Express Base Specification 2.0, sections cited below. The hot path is C, reached
through `queue_pair.py`; what is here happens once a queue, or waits for a device.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Iterator

from vfiotool.drivers import Check
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.queue_pair import Completion, Doorbells, QueuePair, Rings, failed_with
from vfiotool.drivers.nvme.spec import ControllerIdentity, Namespace, SecondaryController
from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.vfio import Device, DmaBuffer, Interrupt

ADMIN_ENTRIES = 32
ADMIN_TIMEOUT_S = 10.0
# A PRP list of one page tells 2 MiB of 4 KiB pages (vfio/nvme_queue.py keeps to one).
TRANSFER_LIMIT = 2 << 20
_PAGE = 4096
_OFFLINE_HINT = (
    "a VF comes up once its PF has given it queues and interrupts and brought it online: "
    "nvme virt-mgmt"
)


class Controller:
    """A controller, brought up: admin queue running, identified, queues of I/O to be created.

    Raises Unsupported for what is no NVMe controller or lacks the NVM command set, KernelError
    when it does not come up. When `device` is closed the controller is shut down first, so that
    no DMA is left when its memory goes.
    """

    def __init__(self, device: Device, *, shadow_doorbells: bool = False) -> None:
        if device.info.is_pci and device.config.read32(0x08) >> 8 != 0x010802:
            raise Unsupported(f"{device.name} is no NVMe controller", device=device.name)
        self.device = device
        self.bar = device.region(0).map()
        self.registers = nvme_spec.NvmeRegisters(self.bar)
        self._capabilities = self.registers.capabilities.fields()
        self._timeout_s = max(1.0, self._capabilities["timeout"] * 0.5)
        self.page_bytes = _PAGE << self._capabilities["page_min"]
        self.interrupts: list[Interrupt] = []
        self.queues: dict[int, IoQueue] = {}
        self._buffers: list[DmaBuffer] = []
        self._lock = threading.Lock()
        self._closed = False
        self._shadows: tuple[DmaBuffer, DmaBuffer] | None = None
        device.on_close(self.close)
        self._disable()
        self._enable()
        self.identity = ControllerIdentity.parse(self.identify(nvme_spec.CNS_CONTROLLER))
        self.max_transfer = self._max_transfer()
        self.queue_limit = self._ask_queues()
        if shadow_doorbells:
            self._set_doorbell_buffers()

    def _max_transfer(self) -> int:
        pages = self.identity.max_transfer_pages
        return min(TRANSFER_LIMIT, pages * self.page_bytes if pages else TRANSFER_LIMIT)

    def _disable(self) -> None:
        """Section 3.5.1, step 1 of initialization; also what ends all DMA."""
        if self.registers.status.read() == 0xFFFFFFFF:
            raise KernelError(f"{self.device.name} has gone: its registers read all ones")
        configuration = self.registers.configuration
        if configuration.field("enable"):
            configuration.modify(enable=0)
        self.registers.status.poll_field("ready", 0, self._timeout_s)

    def _enable(self) -> None:
        """Section 3.5.1, steps 2 to 6."""
        registers = self.registers
        if not any(self._capabilities.values()):
            raise KernelError(
                f"{self.device.name} is offline: its capabilities read zero", hint=_OFFLINE_HINT
            )
        if not self._capabilities["command_sets"] & 1:
            raise Unsupported(f"{self.device.name} does not speak the NVM command set")
        rings = self._rings(0, ADMIN_ENTRIES, ADMIN_ENTRIES, lists=False)
        self.device.set_bus_master(True)
        registers.admin_queues.set(sq_size=ADMIN_ENTRIES - 1, cq_size=ADMIN_ENTRIES - 1)
        registers.admin_submission.write(rings.submission.iova)
        registers.admin_completion.write(rings.completion.iova)
        registers.configuration.set(
            enable=1,
            page_size=self._capabilities["page_min"],
            sq_entry_size=6,
            cq_entry_size=4,
        )
        self._await_ready()
        self._admin = QueuePair(rings, self._doorbells(0))

    def _await_ready(self) -> None:
        end = time.monotonic() + self._timeout_s
        while True:
            status = self.registers.status.fields()
            if status["fatal"]:
                raise KernelError(f"{self.device.name} reports a fatal error (CSTS.CFS)")
            if status["ready"]:
                return
            if time.monotonic() >= end:
                raise KernelError(
                    f"{self.device.name} was not ready within {self._timeout_s:g} s",
                    hint=_OFFLINE_HINT,
                    errno_name="ETIMEDOUT",
                )
            time.sleep(1e-3)

    def _alloc(self, size: int) -> DmaBuffer:
        buffer = self.device.dma.alloc(size, align=self.page_bytes)
        self._buffers.append(buffer)
        return buffer

    def _rings(
        self, number: int, sq_entries: int, cq_entries: int, *, lists: bool, lazy: bool = False
    ) -> Rings:
        return Rings(
            submission=self._alloc(sq_entries * 64),
            completion=self._alloc(cq_entries * 16),
            lists=self._alloc(sq_entries * self.page_bytes) if lists else None,
            sq_entries=sq_entries,
            cq_entries=cq_entries,
            page_bytes=self.page_bytes,
            id=number,
            lazy=lazy,
        )

    def _doorbells(self, number: int) -> Doorbells:
        """Section 3.1.3, figure 35: SQyTDBL and CQyHDBL; with the shadows of 5.8 but for admin."""
        stride = 4 << self._capabilities["stride"]
        tail, head = 2 * number * stride, (2 * number + 1) * stride
        shadows = (0, 0, 0, 0)
        if number and self._shadows is not None:
            words, events = (buffer.address for buffer in self._shadows)
            shadows = (words + tail, words + head, events + tail, events + head)
        return Doorbells(self.bar, nvme_spec.DOORBELLS + tail, nvme_spec.DOORBELLS + head, shadows)

    def _ask_queues(self) -> int:
        """Section 5.27.1.5: ask for many, be told how many there are."""
        wanted = 0xFFFE
        dwords = (nvme_spec.FEATURE_QUEUES, wanted << 16 | wanted)
        result = self.admin(nvme_spec.command(nvme_spec.SET_FEATURES, dwords=dwords)).result
        return min(result & 0xFFFF, result >> 16) + 1

    def _set_doorbell_buffers(self) -> None:
        if not self.identity.doorbell_buffers:
            raise Unsupported(f"{self.device.name} takes no shadow doorbells")
        shadows = (self._alloc(self.page_bytes), self._alloc(self.page_bytes))
        self.admin(
            nvme_spec.command(
                nvme_spec.DOORBELL_BUFFERS, prp1=shadows[0].iova, prp2=shadows[1].iova
            )
        )
        self._shadows = shadows

    def admin(self, command: bytes, timeout_s: float = ADMIN_TIMEOUT_S) -> Completion:
        """Run an admin command (64 bytes, see `nvme_spec.command`) to its end. Raises KernelError
        with the controller's words if it fails, and ETIMEDOUT if no answer comes."""
        self._refuse_closed()
        with self._lock:
            self._admin.submit_raw(command)
            done = self._admin.poll(1, timeout_s)
        if not done:
            raise KernelError(
                f"{self.device.name} did not answer admin command {command[0]:#x}",
                hint="close it and reset it: vfiotool device reset",
                device=self.device.name,
                errno_name="ETIMEDOUT",
            )
        if done[0].status:
            raise failed_with(done[0].status, f"admin command {command[0]:#x}")
        return done[0]

    def identify(self, cns: int, nsid: int = 0, controller_id: int = 0) -> bytes:
        """Identify (5.17): 4096 bytes of the structure `cns`."""
        with self.device.dma.alloc(_PAGE, align=self.page_bytes) as page:
            dwords = (cns | controller_id << 16,)
            self.admin(nvme_spec.command(nvme_spec.IDENTIFY, nsid, prp1=page.iova, dwords=dwords))
            return bytes(page.view[:_PAGE])

    def namespaces(self) -> list[int]:
        """The identifiers of the active namespaces."""
        raw = self.identify(nvme_spec.CNS_ACTIVE_NAMESPACES)
        return [nsid for (nsid,) in struct.iter_unpack("<I", raw) if nsid]

    def namespace(self, nsid: int) -> Namespace:
        """The namespace `nsid`. Raises KernelError where there is none, and UsageError for one
        that is not active."""
        found = Namespace.parse(nsid, self.identify(nvme_spec.CNS_NAMESPACE, nsid))
        if not found.blocks:
            active = ", ".join(map(str, self.namespaces())) or "none"
            raise UsageError(f"namespace {nsid} is not active", hint=f"active: {active}")
        return found

    def enable_interrupts(self, count: int) -> None:
        """Turn on `count` MSI-X vectors; vector 0 is the admin queue's, which is polled."""
        self.interrupts = list(self.device.irqs.msix(count).vectors)

    def create_queue(self, entries: int = 128, *, vector: int | None = None) -> IoQueue:
        """A new pair of I/O queues (5.4, 5.5) for up to `entries` - 1 commands in flight; polled,
        or signalled by MSI-X `vector`. Raises UsageError where there is no room for more."""
        self._refuse_closed()
        number = next(n for n in range(1, 0xFFFF) if n not in self.queues)
        limit = self._capabilities["queue_entries"] + 1
        if number > self.queue_limit or not 2 <= entries <= limit:
            raise UsageError(
                f"{self.device.name} takes {self.queue_limit} queue pairs of 2 to {limit} entries"
            )
        if vector is not None and not 0 <= vector < len(self.interrupts):
            raise UsageError(f"vector {vector} of {len(self.interrupts)} that are on")
        completions = entries if vector is not None else min(limit, max(1024, 2 * entries))
        rings = self._rings(number, entries, completions, lists=True, lazy=vector is None)
        signals = 0 if vector is None else vector << 16 | 1 << 1
        create = nvme_spec.command
        self.admin(
            create(
                nvme_spec.CREATE_CQ,
                prp1=rings.completion.iova,
                dwords=(number | (completions - 1) << 16, signals | 1),
            )
        )
        try:
            self.admin(
                create(
                    nvme_spec.CREATE_SQ,
                    prp1=rings.submission.iova,
                    dwords=(number | (entries - 1) << 16, number << 16 | 1),
                )
            )
        except VfiotoolError:
            with contextlib.suppress(VfiotoolError):
                self.admin(create(nvme_spec.DELETE_CQ, dwords=(number,)))
            raise
        interrupt = None if vector is None else self.interrupts[vector]
        self.queues[number] = IoQueue(self, QueuePair(rings, self._doorbells(number)), interrupt)
        return self.queues[number]

    def delete_queue(self, queue: IoQueue) -> None:
        """End a pair of I/O queues (5.6, 5.7); what was in flight does not come back."""
        number = queue.number
        queue.pair.close()
        self.admin(nvme_spec.command(nvme_spec.DELETE_SQ, dwords=(number,)))
        self.admin(nvme_spec.command(nvme_spec.DELETE_CQ, dwords=(number,)))
        del self.queues[number]
        queue.free()

    def free(self, rings: Rings) -> None:
        """Give back the memory of queues that the controller does not know any more."""
        for buffer in (rings.submission, rings.completion, rings.lists):
            if buffer is not None:
                self._buffers.remove(buffer)
                buffer.close()

    def manage(self, action: int, controller_id: int, resource: int = 0, count: int = 0) -> int:
        """Virtualization Management (5.25) on a PF; returns how many resources were assigned.
        Raises Unsupported where the controller has no such command."""
        if not self.identity.virtualization:
            raise Unsupported(f"{self.device.name} has no virtualization management")
        dwords = (action | resource << 8 | controller_id << 16, count)
        return self.admin(nvme_spec.command(nvme_spec.VIRTUALIZATION, dwords=dwords)).result

    def secondaries(self) -> list[SecondaryController]:
        """The controllers of this PF's VFs."""
        return SecondaryController.parse_list(self.identify(nvme_spec.CNS_SECONDARY_CONTROLLERS))

    def release_flexible(self) -> Controller:
        """Free the PF's flexible queues and interrupts for its VFs (8.2.6): resets the function,
        as only that makes it so, and returns its controller, brought up anew. Any VFs go."""
        for resource in (nvme_spec.QUEUE_RESOURCES, nvme_spec.INTERRUPT_RESOURCES):
            self.manage(nvme_spec.ASSIGN_PRIMARY, self.identity.controller_id, resource)
        self.close()
        self.device.reset()
        return Controller(self.device)

    def give(self, controller_id: int, queues: int, interrupts: int) -> None:
        """Assign queue pairs and interrupts (the admin ones counted in) to a VF and bring it
        online. It stays so until this controller is closed, and must be reset to come up, as
        opening it through VFIO does."""
        self.manage(nvme_spec.SECONDARY_OFFLINE, controller_id)
        for resource, count in (
            (nvme_spec.QUEUE_RESOURCES, queues),
            (nvme_spec.INTERRUPT_RESOURCES, interrupts),
        ):
            self.manage(nvme_spec.ASSIGN_SECONDARY, controller_id, resource, count)
        self.manage(nvme_spec.SECONDARY_ONLINE, controller_id)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError(f"the controller {self.device.name} is closed")

    def close(self) -> None:
        """Shut the controller down (3.6.1), disable it, free its memory. Closing twice is
        nothing. Memory stays mapped if the controller does not stop."""
        if self._closed:
            return
        gone = self.registers.status.read() == 0xFFFFFFFF
        if not gone and self.registers.status.field("ready"):
            self._end_queues()
        self._closed = True
        for queue in self.queues.values():
            queue.pair.close()
        if hasattr(self, "_admin"):
            self._admin.close()
        if gone:
            return
        configuration = self.registers.configuration
        if configuration.field("enable") and self.registers.status.field("ready"):
            configuration.modify(shutdown=1)
            with contextlib.suppress(KernelError):
                self.registers.status.poll_field("shutdown", 2, self._timeout_s)
        self._disable()
        for queue in self.queues.values():
            queue.free_bounce()
        for buffer in self._buffers:
            buffer.close()

    def _end_queues(self) -> None:
        """Let what is in flight end, then delete the queues, as 3.6.1 has it before a shutdown.
        It matters: QEMU 10.0 reads freed memory when it is disabled with commands unfetched."""
        for queue in list(self.queues.values()):
            with contextlib.suppress(VfiotoolError):
                queue.drain()
        for queue in list(self.queues.values()):
            with contextlib.suppress(VfiotoolError):
                self.delete_queue(queue)

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def demo(device: Device) -> Iterator[Check]:
    """Identify, read the first blocks polled and by interrupt, compare; nothing is written."""
    controller = Controller(device)
    identity = controller.identity
    named = f"{identity.model} {identity.serial}, firmware {identity.firmware}"
    yield Check("identify", bool(identity.model), named)
    nsids = controller.namespaces()
    yield Check("namespaces", bool(nsids), f"{nsids}, {controller.queue_limit} queue pairs")
    disk = controller.namespace(nsids[0])
    queue = controller.create_queue()
    count = min(disk.blocks, 64)
    polled = queue.read(disk, 0, count)
    size = f"{disk.blocks} blocks of {disk.block_bytes}"
    yield Check("read", len(polled) == count * disk.block_bytes, f"{len(polled)} bytes of {size}")
    controller.enable_interrupts(2)
    signalled = controller.create_queue(32, vector=1)
    same = signalled.read(disk, 0, count) == polled
    yield Check("interrupt", same, f"{len(polled)} bytes by MSI-X, equal: {same}")
    last = queue.read(disk, disk.blocks - 1, 1)
    yield Check("last block", len(last) == disk.block_bytes, f"{len(last)} bytes")


def registers_of(device: Device) -> nvme_spec.NvmeRegisters:
    """The controller's registers, for `device dump`."""
    return nvme_spec.NvmeRegisters(device.region(0).map())
