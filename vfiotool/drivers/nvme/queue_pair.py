"""NVMe queue pairs: the C hot path (`cext/nvme/nvme_queue.h`) as a Python object.

A queue pair belongs to one thread at a time. What it refuses is a UsageError: use by two threads
at once, after `close`, in a child process, while the device's registers cannot be reached. While C
waits the interpreter's lock is released, so several queue pairs work in several threads; what never
waits is called with it, as letting go costs more.
Source: NVM Express Base Specification 2.0, 3.3.1 (queues), 4.1.1 (PRP lists), 4.2 (entries).
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.load import Load, LoadReport, job_of, report_of
from vfiotool.drivers.nvme.memory_buffer import MemoryPiece
from vfiotool.drivers.nvme.spec import unfit
from vfiotool.errors import KernelError, UsageError
from vfiotool.native.library import QueueCalls, QueueCommand, ffi, lib, queue_calls
from vfiotool.vfio import DmaBuffer, Mapping

COMMAND_BYTES = 64
COMPLETION_BYTES = 16
# C is left this often, so that Ctrl-C is noticed.
SLICE_S = 0.05
_REFUSED = {
    errno.EBUSY: "another thread is using the queue pair",
    errno.ESHUTDOWN: "the queue pair is closed",
    errno.ESTALE: "this process is a child of the one that opened the device",
    errno.EINVAL: "no such command: data, blocks or slots are out of bounds",
    errno.EACCES: "its doorbells cannot be reached: memory decode is off, or the device sleeps",
}

# What `submit` takes, and what its field holds (cext/python/queue_type.c).
_FIELD_BITS = (
    ("opcode", 8),
    ("nsid", 32),
    ("lba", 64),
    ("blocks", 32),
    ("iova", 64),
    ("size_bytes", 32),
    ("control", 16),
    ("tag", 64),
)


class Completion(NamedTuple):
    """A command that is done. `status` 0 is success, otherwise type << 8 | code (Base
    Specification 2.0, 4.2.3), with "more" in bit 13 and "do not retry" in bit 14; `result` is
    dword 0 of the entry."""

    tag: int
    status: int
    result: int
    latency_ns: int


@dataclass(frozen=True, slots=True)
class Counters:
    """What a queue pair did so far; `tail_writes` and `head_writes` count doorbell writes,
    `strays` completions that were no command's: the last one carried `last_stray` (command
    identifier, status in bits 31:16). Each stray is a fault of the controller."""

    submitted: int
    completed: int
    failed: int
    strays: int
    tail_writes: int
    head_writes: int
    in_flight: int
    last_stray: int


@dataclass(frozen=True, slots=True)
class Doorbells:
    """The two registers of a queue pair: offsets into `mapping`; and, for a controller that takes
    shadow doorbells, addresses of the four words in memory (tail, head; their event indices)."""

    mapping: Mapping
    tail: int
    head: int
    shadows: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Rings:
    """Memory and sizes of a queue pair. `lists` holds a page for the PRP list of each submission
    entry, or is None. `lazy` tells the controller late which completions were taken: for polling,
    and only useful where `cq_entries` is well above `sq_entries`."""

    submission: DmaBuffer | MemoryPiece
    completion: DmaBuffer
    lists: DmaBuffer | None
    sq_entries: int
    cq_entries: int
    page_bytes: int
    id: int
    lazy: bool = False

    @property
    def buffers(self) -> tuple[DmaBuffer | MemoryPiece, ...]:
        found = (self.submission, self.completion)
        return found if self.lists is None else (*found, self.lists)

    @property
    def window(self) -> Mapping | None:
        """The mapping that `submission` lies in where it is memory of the controller."""
        return self.submission.window if isinstance(self.submission, MemoryPiece) else None


class QueuePair:
    """A submission and a completion queue whose memory the controller knows already.

    The rings' buffers and the windows that C stores to (of the doorbells, and of a submission queue
    in the controller's memory) are pinned until `close`: closing one before is a UsageError, of it
    or of the queue pair, and never a fault.
    """

    def __init__(self, rings: Rings, doorbells: Doorbells) -> None:
        self.rings = rings
        self.doorbells = doorbells
        self.depth = rings.sq_entries - 1
        # Completions that were taken, by their number; an interrupted caller finds them here.
        self.ready: dict[int, Completion] = {}
        self._pinned: list[Mapping | DmaBuffer | MemoryPiece] = []
        self._stops = 0
        self._check_memory()
        layout = self._layout()
        made = ffi.new("struct vt_nvme_queue **")
        try:
            layout.gate, layout.memory_gate = self._pin()
            self._check(lib.vt_nvme_new(layout, made))
        except BaseException:
            self._unpin()
            raise
        self._queue = ffi.gc(made[0], lib.vt_nvme_free)
        self._done = ffi.new("struct vt_nvme_done[]", self.depth)
        self._held = ffi.new("uint32_t *")
        # What never waits is called with the interpreter's lock held: see cext/python/queue_type.c.
        self._calls = queue_calls(self._queue, self._done, self.depth, self._held)
        # Read in place: a call would let go of the interpreter's lock, and other threads in.
        self._in_flight = lib.vt_nvme_in_flight(self._queue)
        self._submitted = lib.vt_nvme_submitted(self._queue)

    @property
    def calls(self) -> QueueCalls:
        """The calls that never wait, for C."""
        return self._calls

    @property
    def handle(self) -> Any:
        """The struct vt_nvme_queue *, for C that sends in place of this object. It is there until
        `close`; nothing but `stop` and `restart` may be called here meanwhile."""
        return self._queue

    def _layout(self) -> Any:
        rings, doorbells = self.rings, self.doorbells
        layout = ffi.new("struct vt_nvme_layout *")
        layout.submission = rings.submission.address
        layout.completion = rings.completion.address
        layout.tail_doorbell = doorbells.mapping.address(doorbells.tail, 4)
        layout.head_doorbell = doorbells.mapping.address(doorbells.head, 4)
        shadows = doorbells.shadows
        layout.tail_shadow, layout.head_shadow, layout.tail_event, layout.head_event = shadows
        if rings.lists is not None:
            layout.lists, layout.lists_iova = rings.lists.address, rings.lists.iova
        layout.sq_entries, layout.cq_entries = rings.sq_entries, rings.cq_entries
        layout.page_size, layout.id, layout.lazy = rings.page_bytes, rings.id, rings.lazy
        return layout

    def _pin(self) -> tuple[int, int]:
        """Pins windows and buffers; the addresses of the gates of the doorbells' window and of the
        one that the submission queue lies in, 0 where that is ordinary memory."""
        gate, memory_gate = self.doorbells.mapping.pin(), 0
        self._pinned.append(self.doorbells.mapping)
        if (window := self.rings.window) is not None:
            memory_gate = window.pin()
            self._pinned.append(window)
        for buffer in self.rings.buffers:
            buffer.pin()
            self._pinned.append(buffer)
        return gate, memory_gate

    def _unpin(self) -> None:
        while self._pinned:
            self._pinned.pop().unpin()

    def _check_memory(self) -> None:
        rings = self.rings
        if any(buffer.closed for buffer in rings.buffers):
            raise UsageError(f"queue {rings.id}: the memory of its rings is closed")
        enough = (
            rings.submission.size >= rings.sq_entries * COMMAND_BYTES
            and rings.completion.size >= rings.cq_entries * COMPLETION_BYTES
            and (rings.lists is None or rings.lists.size >= self.depth * rings.page_bytes)
        )
        if not enough:
            raise UsageError("the memory of the queue pair is smaller than its entries")

    def _check(self, result: int) -> int:
        if result >= 0:
            return result
        if -result in _REFUSED:
            raise UsageError(f"queue {self.rings.id}: {_REFUSED[-result]}")
        if result == -errno.EPROTO:
            raise KernelError(
                f"queue {self.rings.id}: the controller completed a command that was not there",
                hint="reset the controller",
                errno_name="EPROTO",
            )
        if result == -errno.ETIMEDOUT:
            raise KernelError(
                f"queue {self.rings.id}: the controller does not answer",
                hint="reset the controller",
                errno_name="ETIMEDOUT",
            )
        raise KernelError(f"queue {self.rings.id}: error {-result}")

    def submit(
        self,
        opcode: int,
        nsid: int,
        *,
        lba: int = 0,
        blocks: int = 0,
        iova: int = 0,
        size_bytes: int = 0,
        control: int = 0,
        tag: int = 0,
    ) -> bool:
        """Send a command on `blocks` blocks from `lba` on, with `size_bytes` of data at `iova`.
        False where the queue is full. `tag` comes back with the completion."""
        numbers = (opcode, nsid, lba, blocks, iova, size_bytes, control, tag)
        try:
            sent = self._calls.submit(*numbers)
        except (OverflowError, TypeError) as error:
            raise _unfit(numbers) from error
        return self._check(sent) == 1

    def sender(
        self,
        opcode: int,
        nsid: int,
        lba: int,
        blocks: int,
        iova: int,
        size_bytes: int,
        control: int,
    ) -> QueueCommand:
        """`submit` of one command, for whoever has its tag: in as few steps as can be."""
        try:
            return QueueCommand(
                self._calls, self._check, opcode, nsid, lba, blocks, iova, size_bytes, control
            )
        except (OverflowError, TypeError) as error:
            raise _unfit((opcode, nsid, lba, blocks, iova, size_bytes, control)) from error

    def submit_raw(self, command: bytes, tag: int = 0) -> bool:
        """Send 64 bytes as they are, but for the command identifier. False where it is full."""
        if len(command) != COMMAND_BYTES:
            raise UsageError(f"a command has {COMMAND_BYTES} bytes, not {len(command)}")
        return self._check(lib.vt_nvme_submit_raw(self._queue, command, tag)) == 1

    def gather(self, least: int = 0, timeout_s: float = 0.0, spin_ns: int = 0) -> int:
        """Move completions into `ready`: those that are there; with `timeout_s` wait until there
        are `least`, for at most a slice of time; with `spin_ns` until there is one, for so many
        nanoseconds in which no other thread of Python runs. Returns how many came."""
        self._absorb()
        if least > 0 and timeout_s > 0:
            wait_ns = round(min(timeout_s, SLICE_S) * 1e9)
            queue, done, held = self._queue, self._done, self._held
            result = lib.vt_nvme_poll(queue, done, self.depth, least, wait_ns, held)
        else:
            result = self._calls.look(spin_ns)
        count = self._check(result)
        if count:
            self._absorb()
        return count

    def _absorb(self) -> None:
        # In an order that loses nothing to Ctrl-C, and takes nothing twice.
        held = self._held[0]
        for one in self._done[0:held]:
            self.ready[one.number] = Completion(one.tag, one.status, one.result, one.latency_ns)
        self._held[0] = 0

    def poll(self, least: int = 0, timeout_s: float | None = 0.0) -> list[Completion]:
        """Take completions: all that are there, and wait until there are `least` (or nothing is
        in flight) for at most `timeout_s` seconds, None being without limit. Completions of no
        command end nothing: see `Counters.strays`."""
        deadline = Deadline(timeout_s)
        self.gather()
        while len(self.ready) < least and not deadline.passed and self.in_flight:
            self.gather(least - len(self.ready), deadline.left())
        taken, self.ready = list(self.ready.values()), {}
        return taken

    @property
    def in_flight(self) -> int:
        """How many commands are out."""
        found: int = self._in_flight[0]
        return found

    @property
    def submitted(self) -> int:
        """How many commands were sent so far."""
        found: int = self._submitted[0]
        return found

    def identifier(self, tag: int) -> int:
        """The command identifier of the command that is out with `tag`, for Abort. Raises
        UsageError where there is none."""
        found: int = lib.vt_nvme_identifier(self._queue, tag)
        if found < 0:
            raise UsageError(f"queue {self.rings.id}: no command with tag {tag} is out")
        return found

    def counters(self) -> Counters:
        """What was done so far."""
        found = ffi.new("struct vt_nvme_counters *")
        lib.vt_nvme_count(self._queue, found)
        return Counters(
            submitted=found.submitted,
            completed=found.completed,
            failed=found.failed,
            strays=found.strays,
            tail_writes=found.tail_writes,
            head_writes=found.head_writes,
            in_flight=found.in_flight,
            last_stray=found.last_stray,
        )

    def run(self, load: Load, watch: Callable[[], object] | None = None) -> LoadReport:
        """Run a load on the idle queue; returns when it ended and all commands are back.

        Stops early at the first command that fails, and on Ctrl-C. `watch` is called twice a
        second meanwhile; what it raises ends the load at once. Raises UsageError for a load that
        cannot be, KernelError if the controller stops answering.
        """
        job, report = job_of(load), ffi.new("struct vt_nvme_report *")
        stops = self._stops
        results: list[int] = []
        # In a thread of its own: this one stays open for signals.
        worker = threading.Thread(
            target=lambda: results.append(lib.vt_nvme_run(self._queue, job, report))
        )
        worker.start()
        try:
            worker.join(0.5)
            while worker.is_alive():
                if watch is not None:
                    watch()
                worker.join(0.5)
        except BaseException as error:
            if isinstance(error, KernelError):
                lib.vt_nvme_abandon(self._queue)
            else:
                lib.vt_nvme_halt(self._queue)
            worker.join()
            raise
        # A reset may be over by the time that this thread hears of the load's end.
        if self._stops != stops:
            raise UsageError(f"queue {self.rings.id}: it was closed or reset during the load")
        self._check(results[0])
        return report_of(report)

    def halt(self) -> None:
        """End a running `run` or `poll` soon; the one call for other threads."""
        lib.vt_nvme_halt(self._queue)

    def abandon(self) -> None:
        """As `halt`, for a controller that does not answer: `run` does not wait for it."""
        lib.vt_nvme_abandon(self._queue)

    def stop(self, *, abandon: bool = False) -> None:
        """Never touch rings and doorbells again, or until `restart`; ends what another thread is
        waiting for, a load at once with `abandon`."""
        self._stops += 1
        # From the first try on nobody comes in any more: what is waited for is one call's end.
        while lib.vt_nvme_stop(self._queue) < 0:
            if abandon:
                self.abandon()
            time.sleep(1e-4)

    def restart(self) -> None:
        """After `stop` and a reset of the controller: empty rings, nothing in flight. Completions
        that had come are in `ready`."""
        self._absorb()
        self._check(lib.vt_nvme_restart(self._queue, self._done, self.depth, self._held))
        self._absorb()

    def close(self) -> None:
        """`stop`, and let go of the memory. Closing twice is nothing."""
        self.stop()
        self._unpin()

    def __repr__(self) -> str:
        return f"<QueuePair {self.rings.id}: {self.in_flight} of {self.depth} in flight>"


def _unfit(numbers: tuple[object, ...]) -> UsageError:
    pairs = zip(_FIELD_BITS, numbers, strict=False)
    return unfit((name, (number, bits)) for (name, bits), number in pairs)
