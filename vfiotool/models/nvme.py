"""An NVMe controller with a disk in memory, as a model: registers, doorbells, queues, interrupts.

NVM Express Base Specification 2.0: 3.1.3 (registers), 3.3.1 (queues), 3.5.1 (initialization),
4.2 (entries). Doorbells are memory that the client maps and a thread here looks at, or, without
`shared_doorbells`, registers that are trapped: for a hypervisor, whose guest rings seldom and which
shares its processors with this thread. What commands do is in `nvme_commands.py`.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Callable

from vfiotool.models.bar import BarSpec, reads, writes
from vfiotool.models.device import Model
from vfiotool.models.dma import ClientMemory, DmaFault
from vfiotool.models.nvme_commands import INVALID_FIELD, TRANSFER_ERROR, NvmeCommands
from vfiotool.models.nvme_rings import CompletionRing, HeldAnswer, SubmissionRing
from vfiotool.vfio import Area, Register, RegisterMap

_DOORBELLS, _MSIX_TABLE, _BAR_BYTES = 0x1000, 0x2000, 0x4000
_PAIRS = 8
_VECTORS = _PAIRS + 1
_SQ_ENTRY, _CQ_ENTRY = 64, 16
# How long the thread sleeps between two looks at quiet doorbells.
_SHORTEST_NAP_S, _LONGEST_NAP_S = 5e-5, 1e-3
_NORMAL_SHUTDOWN, _SHUTDOWN_DONE, _SHUTTING = 3, 2, 1


class NvmeModelRegisters(RegisterMap):
    """Section 3.1.3."""

    capabilities = Register(0x00, width=8, access="ro", halves=True)
    version = Register(0x08, access="ro")
    mask_set = Register(0x0C)
    mask_clear = Register(0x10)
    configuration = Register(0x14)
    status = Register(0x1C, access="ro")
    admin_queues = Register(0x24)
    admin_submission = Register(0x28, width=8, halves=True)
    admin_completion = Register(0x30, width=8, halves=True)
    memory_location = Register(0x38, access="ro")
    memory_size = Register(0x3C, access="ro")
    memory_control = Register(0x50, width=8, halves=True)
    memory_status = Register(0x58, access="ro")


_R = NvmeModelRegisters
_BUFFER_BAR = 2
# CMBSZ: submission queues, and data to and from the disk, in units of 4 KiB (3.1.3.12).
_BUFFER_HOLDS = 1 << 0 | 1 << 3 | 1 << 4
_BUFFER_DECODE, _BUFFER_REGISTERS = 2, 1


class NvmeModel(NvmeCommands, Model):
    """The controller, with namespace 1 of `blocks` blocks of 1 << `shift` bytes.

    Faults beside those of every model: `hold` keeps the answers of I/O commands back until
    `release`; `mute_queues` takes no command any more; `fail` has the status that the next command
    of a (queue, opcode) ends with; `wrong_ids` answers commands that nobody sent; `ready` False
    never comes up; `fatal` is CSTS.CFS; `shutdown_s` is how long a shutdown takes.

    With `memory_buffer_bytes` BAR 2 is a Controller Memory Buffer of that size (a power of two, at
    least a page; 8.5): `memory_location` and `memory_size` are what its registers tell while they
    are enabled, `takes_address` says whether it takes an address for it; with `decodes` False it
    takes one and means another.
    """

    vendor, device, class_code = 0x1B36, 0x0010, 0x010802
    subsystem = (0x1AF4, 0x1100)
    msix, msix_bar, msix_offset = _VECTORS, 0, _MSIX_TABLE

    def __init__(
        self,
        blocks: int = 4096,
        shift: int = 9,
        *,
        shared_doorbells: bool = True,
        memory_buffer_bytes: int = 0,
    ) -> None:
        self.set_disk(blocks, shift)
        self.memory_location = _BUFFER_BAR
        self.memory_size = memory_buffer_bytes | _BUFFER_HOLDS if memory_buffer_bytes else 0
        self.takes_address: Callable[[int], bool] = lambda _base: True
        self.entries, self.shutdown_s, self.command_sets = 1024, 0.0, 1
        self.decodes = True
        self.buffer_reads = 0  # what it fetched from its memory buffer
        self.arbitration = 0  # CAP.AMS: 1, queues have priorities, to which it gives no heed
        self.version = 0x00020000
        self.ready, self.hold, self.mute_queues, self.wrong_ids = True, False, False, False
        self.fail: dict[tuple[int, int], int] = {}
        self.held: list[HeldAnswer] = []
        self.submissions: dict[int, SubmissionRing] = {}
        self.completions: dict[int, CompletionRing] = {}
        self.configurations: list[int] = []
        self._rung = threading.Event()
        self._ending = True
        self._thread: threading.Thread | None = None
        shared = (Area(_DOORBELLS, 0x1000),) if shared_doorbells else ()
        bars: tuple[BarSpec, ...] = (
            BarSpec(0, _BAR_BYTES, registers=_R, wide=True, shared=shared),
        )
        if memory_buffer_bytes:
            size, whole = memory_buffer_bytes, (Area(0, memory_buffer_bytes),)
            bars += (BarSpec(_BUFFER_BAR, size, wide=True, prefetchable=True, shared=whole),)
        self._trapped = not shared_doorbells
        self._make(self.make_config(bars), bars)

    def power_on(self) -> None:
        self.fatal = False
        self._shutting: float | None = None
        self.set(_R.capabilities, self.tell_capabilities())
        self.set(_R.version, self.version)
        self._forget()

    @reads(_R.capabilities)
    def tell_capabilities(self) -> int:
        low = self.entries - 1 | 1 << 16 | self.arbitration << 17 | 2 << 24
        return low | self.command_sets << 37 | bool(self.memory_size) << 57

    @reads(_R.memory_location)
    def tell_memory_location(self) -> int:
        return self.memory_location if self._buffer_control & _BUFFER_REGISTERS else 0

    @reads(_R.memory_size)
    def tell_memory_size(self) -> int:
        return self.memory_size if self._buffer_control & _BUFFER_REGISTERS else 0

    @reads(_R.memory_status)
    def tell_memory_status(self) -> int:
        control = self._buffer_control
        return int(bool(control & _BUFFER_DECODE) and not self.takes_address(control & ~0xFFF))

    @property
    def _buffer_control(self) -> int:
        return self.get(_R.memory_control) if self.memory_size else 0

    def _in_buffer(self, iova: int, count: int) -> int | None:
        """Where in its memory buffer an I/O address lies, or None: it is the client's memory."""
        if not self.memory_size or not self.decodes:
            return None
        control, bar = self._buffer_control, self.bar_or_none(_BUFFER_BAR)
        base = control & ~0xFFF
        if control & 3 != _BUFFER_DECODE | _BUFFER_REGISTERS or bar is None:
            return None
        within = base <= iova and iova + count <= base + bar.spec.size
        return iova - base if within and self.takes_address(base) else None

    def dma_read(self, iova: int, count: int) -> bytes:
        """As every model's, but for the addresses of its memory buffer."""
        at = self._in_buffer(iova, count)
        if at is None:
            return super().dma_read(iova, count)
        self.buffer_reads += 1
        return self.bar(_BUFFER_BAR).memory[at : at + count]

    def dma_write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """As `dma_read`."""
        at = self._in_buffer(iova, len(data))
        if at is None:
            super().dma_write(iova, data)
            return
        self.bar(_BUFFER_BAR).memory[at : at + len(data)] = bytes(data)

    @reads(_R.status)
    def tell_status(self) -> int:
        enabled = self.get(_R.configuration) & 1
        shutdown = 0
        if self._shutting is not None:
            over = time.monotonic() - self._shutting >= self.shutdown_s
            shutdown = _SHUTDOWN_DONE if over else _SHUTTING
        return int(bool(enabled and self.ready)) | int(self.fatal) << 1 | shutdown << 2

    @writes(_R.configuration)
    def configure(self, value: int) -> None:
        self.configurations.append(value)
        self._shutting = time.monotonic() if value >> 14 & _NORMAL_SHUTDOWN else None
        if not value & 1:
            self._forget()
        elif not self.submissions:
            self._begin()

    def _forget(self) -> None:
        """CC.EN is 0: queues are gone, and what was out is not answered."""
        self.submissions, self.completions, self.held = {}, {}, []
        self.fatal = False
        self.events.clear()

    def _begin(self) -> None:
        sizes = self.get(_R.admin_queues)
        for at in range(_DOORBELLS, _DOORBELLS + 8 * _VECTORS, 4):
            self.bar(0).store(at, 0, 4)
        self.add_completions(0, self.get(_R.admin_completion), (sizes >> 16 & 0xFFF) + 1, 0)
        self.add_submissions(0, self.get(_R.admin_submission), (sizes & 0xFFF) + 1, 0)

    def add_completions(self, number: int, base: int, entries: int, vector: int) -> None:
        self._set_bell(2 * number + 1, 0)
        self.completions[number] = CompletionRing(base, entries, vector)

    def add_submissions(self, number: int, base: int, entries: int, completions: int) -> None:
        self._set_bell(2 * number, 0)
        self.submissions[number] = SubmissionRing(number, base, entries, completions)

    def _bell(self, number: int) -> int:
        return self.bar(0).load(_DOORBELLS + 4 * number, 4)

    def _set_bell(self, number: int, value: int) -> None:
        self.bar(0).store(_DOORBELLS + 4 * number, value, 4)

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        super().write(bar, offset, value, width)
        if _DOORBELLS <= offset < _MSIX_TABLE:
            self._rung.set()

    def start(self, memory: ClientMemory) -> None:
        super().start(memory)
        self._ending = False
        self._thread = threading.Thread(target=self._live, daemon=True, name="nvme model")
        self._thread.start()

    def stop(self) -> None:
        self._ending = True
        self._rung.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        super().stop()

    def _live(self) -> None:
        nap = _SHORTEST_NAP_S
        while not self._ending:
            self._rung.clear()
            worked = False
            for queue in list(self.submissions.values()):
                worked |= self._work(queue)
            if worked:
                nap = _SHORTEST_NAP_S
                continue
            # Held commands and mute queues are rung for no more: look now and then.
            self._rung.wait(0.05 if self._trapped else nap)
            nap = min(2 * nap, _LONGEST_NAP_S)

    def _work(self, queue: SubmissionRing) -> bool:
        worked = False
        while not (self.mute_queues or self.faults.mute or self.faults.gone or self._ending):
            with self.lock:
                if self.submissions.get(queue.number) is not queue:
                    return worked
                tail = self._bell(2 * queue.number)
                if tail == queue.head or self.fatal:
                    return worked
                if tail >= queue.entries:
                    # "Invalid Doorbell Write Value": nothing of this queue can be trusted.
                    self.fatal = True
                    return True
                worked = True
                try:
                    self._step(queue)
                except DmaFault:
                    # A ring that cannot be reached is the end (CSTS.CFS).
                    self.fatal = True
        return worked

    def _step(self, queue: SubmissionRing) -> None:
        entry = self.dma_read(queue.base + _SQ_ENTRY * queue.head, _SQ_ENTRY)
        queue.head = (queue.head + 1) % queue.entries
        opcode, cid = entry[0], struct.unpack_from("<H", entry, 2)[0]
        status = self.fail.pop((queue.number, opcode), None)
        result: int | None = 0
        if status is None:
            try:
                run = self.io_command if queue.number else self.admin_command
                status, result = run(opcode, entry)
            except DmaFault:
                status = TRANSFER_ERROR
            except struct.error:
                status = INVALID_FIELD
        if result is None:
            return  # answered later: an asynchronous event
        if queue.number and self.hold:
            self.held.append(HeldAnswer(queue, cid, status, result))
            return
        self.complete(queue, 9999 if self.wrong_ids else cid, status, result)

    def complete(self, queue: SubmissionRing, cid: int, status: int, result: int) -> None:
        """Put an entry into the completion queue and signal its vector. Raises DmaFault."""
        ring = self.completions.get(queue.completions)
        if ring is None or self.submissions.get(queue.number) is not queue:
            return
        self._await_room(queue.completions, ring)
        place = ring.base + _CQ_ENTRY * ring.tail
        head = struct.pack("<IIHHH", result, 0, queue.head, queue.number, cid)
        self.dma_write(place, head)
        # The phase bit last: it says that the entry is whole.
        self.dma_write(place + len(head), struct.pack("<H", status << 1 | ring.phase))
        ring.tail += 1
        if ring.tail == ring.entries:
            ring.tail, ring.phase = 0, ring.phase ^ 1
        if ring.vector >= 0:
            self.interrupt(ring.vector)

    def _await_room(self, number: int, ring: CompletionRing) -> None:
        """A full completion queue is not written beyond (3.3.1.2.1)."""
        end = time.monotonic() + 1.0
        while (ring.tail + 1) % ring.entries == self._bell(2 * number + 1):
            if self._ending or time.monotonic() >= end:
                raise DmaFault("the completion queue stays full")
            time.sleep(_SHORTEST_NAP_S)

    def release(self, order: Callable[[list[HeldAnswer]], None] | None = None) -> None:
        """Answer what is held, in the order that `order` puts it in."""
        with self.lock:
            held, self.held = self.held, []
            if order is not None:
                order(held)
            for one in held:
                with contextlib.suppress(DmaFault):
                    self.complete(one.queue, one.cid, one.status, one.result)

    def event(self, result: int) -> bool:
        """Answer an Asynchronous Event Request; False where none is out."""
        with self.lock:
            if not self.events or 0 not in self.submissions:
                return False
            self.complete(self.submissions[0], self.events.pop(0), 0, result)
            return True
