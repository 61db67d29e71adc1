"""NVMe queue pairs: the C hot path (`cext/nvme_queue.h`, `cext/nvme_load.h`) as Python objects.

A queue pair belongs to one thread at a time. What it refuses is a UsageError: use by two threads
at once, after `close`, in a child process, with the device's memory decode off. While C runs the
interpreter's lock is released, so several queue pairs work in several threads.
Source: NVM Express Base Specification 2.0, 3.3.1 (queues), 4.1.1 (PRP lists), 4.2 (entries).
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfiotool.errors import KernelError, UsageError
from vfiotool.native.library import ffi, lib
from vfiotool.vfio.dma import DmaBuffer
from vfiotool.vfio.region import Mapping

COMMAND_BYTES = 64
COMPLETION_BYTES = 16
FOREVER_S = 1e6
# C is left this often, so that Ctrl-C is noticed.
_SLICE_S = 0.05
_SLICE_NS = 50_000_000
# (type, code) -> name: Base Specification 2.0, figures 93 to 97; NVM Command Set 1.0, 2.3.
STATUS_NAMES = {
    (0, 0x01): "invalid command opcode",
    (0, 0x02): "invalid field in command",
    (0, 0x03): "command identifier conflict",
    (0, 0x04): "data transfer error",
    (0, 0x05): "aborted for loss of power",
    (0, 0x06): "internal error",
    (0, 0x07): "abort requested",
    (0, 0x08): "aborted: its queue was deleted",
    (0, 0x0B): "invalid namespace or format",
    (0, 0x0C): "command sequence error",
    (0, 0x13): "invalid offset of a data pointer",
    (0, 0x15): "operation denied",
    (0, 0x20): "namespace is write protected",
    (0, 0x80): "block address out of range",
    (0, 0x81): "capacity exceeded",
    (0, 0x82): "namespace not ready",
    (1, 0x00): "invalid completion queue",
    (1, 0x01): "invalid queue identifier",
    (1, 0x02): "invalid queue size",
    (1, 0x08): "invalid interrupt vector",
    (1, 0x0A): "invalid format",
    (1, 0x0D): "feature identifier cannot be saved",
    (1, 0x0E): "feature cannot be changed",
    (1, 0x1F): "invalid controller identifier",
    (1, 0x20): "invalid secondary controller state",
    (1, 0x21): "invalid number of controller resources",
    (1, 0x22): "invalid resource identifier",
    (1, 0x80): "conflicting attributes",
    (1, 0x82): "write to a read only range",
    (2, 0x80): "write fault",
    (2, 0x81): "unrecovered read error",
    (2, 0x85): "compare failure",
    (2, 0x86): "access denied",
}
_REFUSED = {
    errno.EBUSY: "another thread is using the queue pair",
    errno.ESHUTDOWN: "the queue pair is closed",
    errno.ESTALE: "this process is a child of the one that opened the device",
    errno.EINVAL: "no such command: data, blocks or slots are out of bounds",
}


def failed_with(status: int, what: str) -> KernelError:
    """The error of a command that the controller failed with `status`."""
    kind, code = status >> 8 & 7, status & 0xFF
    name = STATUS_NAMES.get((kind, code), "no name known")
    final = "; do not retry" if status >> 14 & 1 else ""
    return KernelError(f"{what} failed: {name} (type {kind}, code {code:#x}{final})")


@dataclass(frozen=True, slots=True)
class Completion:
    """A command that is done. `status` 0 is success, otherwise type << 8 | code (Base
    Specification 2.0, 4.2.3), with "more" in bit 13 and "do not retry" in bit 14; `result` is
    dword 0 of the entry."""

    tag: int
    status: int
    result: int
    latency_ns: int


@dataclass(frozen=True, slots=True)
class Counters:
    """What a queue pair did so far; `tail_writes` and `head_writes` count doorbell writes."""

    submitted: int
    completed: int
    failed: int
    tail_writes: int
    head_writes: int
    in_flight: int


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

    submission: DmaBuffer
    completion: DmaBuffer
    lists: DmaBuffer | None
    sq_entries: int
    cq_entries: int
    page_bytes: int
    id: int
    lazy: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What `QueuePair.run` keeps the device busy with. The buffer of slot i is at
    `iova` + i * `stride`; runs of `blocks` blocks within `span` blocks from `first_lba` on."""

    nsid: int
    first_lba: int
    span: int
    blocks: int
    size_bytes: int
    iova: int
    stride: int
    depth: int
    batch: int = 1
    random: bool = True
    read_percent: int = 100
    runtime_s: float = 0.0
    limit: int = 0
    seed: int = 1


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load came to. `histogram` counts latencies by bucket, see `percentile_ns`."""

    reads: int
    writes: int
    failed: int
    first_status: int
    elapsed_s: float
    latency_min_ns: int
    latency_max_ns: int
    latency_sum_ns: int
    tail_writes: int
    head_writes: int
    histogram: Sequence[int] = field(repr=False)

    @property
    def ios(self) -> int:
        return self.reads + self.writes

    def percentile_ns(self, percent: float) -> int:
        """The latency that `percent` of the commands did not exceed, to within 1/64."""
        wanted = sum(self.histogram) * percent / 100
        seen = 0
        for bucket, count in enumerate(self.histogram):
            seen += count
            if count and seen >= wanted:
                return int(lib.vt_nvme_bucket_floor(bucket))
        return 0


def merge(reports: Sequence[LoadReport]) -> LoadReport:
    """One report of loads that ran side by side: counts add up, the longest time counts."""
    return LoadReport(
        reads=sum(report.reads for report in reports),
        writes=sum(report.writes for report in reports),
        failed=sum(report.failed for report in reports),
        first_status=next((r.first_status for r in reports if r.first_status), 0),
        elapsed_s=max(report.elapsed_s for report in reports),
        latency_min_ns=min(report.latency_min_ns for report in reports),
        latency_max_ns=max(report.latency_max_ns for report in reports),
        latency_sum_ns=sum(report.latency_sum_ns for report in reports),
        tail_writes=sum(report.tail_writes for report in reports),
        head_writes=sum(report.head_writes for report in reports),
        histogram=[sum(counts) for counts in zip(*(r.histogram for r in reports), strict=True)],
    )


class QueuePair:
    """A submission and a completion queue whose memory the controller knows already."""

    def __init__(self, rings: Rings, doorbells: Doorbells) -> None:
        self.rings = rings
        self.doorbells = doorbells
        self.depth = rings.sq_entries - 1
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
        self._check_memory()
        made = ffi.new("struct vt_nvme_queue **")
        self._check(lib.vt_nvme_new(layout, made))
        self._queue = ffi.gc(made[0], lib.vt_nvme_free)
        self._done = ffi.new("struct vt_nvme_done[]", self.depth)

    def _check_memory(self) -> None:
        rings = self.rings
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

    def _check_doorbell(self) -> None:
        # Raises where a store would be a bus error: window closed, memory decode off, a child.
        self.doorbells.mapping.address(self.doorbells.tail, 4)

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
        self._check_doorbell()
        one = ffi.new("struct vt_nvme_io *")
        one.tag, one.lba, one.iova, one.bytes = tag, lba, iova, size_bytes
        one.blocks, one.nsid, one.control, one.opcode = blocks, nsid, control, opcode
        return self._check(lib.vt_nvme_submit(self._queue, one, 1)) == 1

    def submit_raw(self, command: bytes, tag: int = 0) -> bool:
        """Send 64 bytes as they are, but for the command identifier. False where it is full."""
        if len(command) != COMMAND_BYTES:
            raise UsageError(f"a command has {COMMAND_BYTES} bytes, not {len(command)}")
        self._check_doorbell()
        return self._check(lib.vt_nvme_submit_raw(self._queue, command, tag)) == 1

    def poll(self, least: int = 0, timeout_s: float = 0.0) -> list[Completion]:
        """Take completions: all that are there, and wait until there are `least` (or nothing is
        in flight) for at most `timeout_s` seconds. Raises KernelError (EPROTO) if the controller
        answers what nobody asked."""
        self._check_doorbell()
        taken: list[Completion] = []

        def step(wanted: int, timeout_ns: int) -> int:
            room = self.depth
            count = self._check(lib.vt_nvme_poll(self._queue, self._done, room, wanted, timeout_ns))
            for one in self._done[0:count]:
                taken.append(Completion(one.tag, one.status, one.result, one.latency_ns))
            return count

        self._in_slices(step, least, timeout_s)
        return taken

    def _in_slices(self, step: Callable[[int, int], int], least: int, timeout_s: float) -> int:
        if least <= 0 or timeout_s <= 0:
            return step(least, 0)
        end = time.monotonic() + timeout_s
        total = 0
        while True:
            left = min(_SLICE_S, end - time.monotonic())
            total += step(least - total, max(0, round(left * 1e9)))
            if total >= least or left <= 0 or not self.in_flight:
                return total

    @property
    def in_flight(self) -> int:
        """How many commands are out."""
        return self.counters().in_flight

    def counters(self) -> Counters:
        """What was done so far."""
        found = ffi.new("struct vt_nvme_counters *")
        lib.vt_nvme_count(self._queue, found)
        return Counters(
            submitted=found.submitted,
            completed=found.completed,
            failed=found.failed,
            tail_writes=found.tail_writes,
            head_writes=found.head_writes,
            in_flight=found.in_flight,
        )

    def run(self, load: Load) -> LoadReport:
        """Run a load on the idle queue; returns when it ended and all commands are back.

        Stops early at the first command that fails, and on Ctrl-C. Raises UsageError for a load
        that cannot be, KernelError if the controller stops answering.
        """
        self._check_doorbell()
        job = ffi.new("struct vt_nvme_job *")
        job.first_lba, job.span, job.iova, job.stride = (
            load.first_lba,
            load.span,
            load.iova,
            load.stride,
        )
        job.runtime_ns, job.limit, job.seed = round(load.runtime_s * 1e9), load.limit, load.seed
        job.depth, job.batch, job.blocks, job.bytes = (
            load.depth,
            load.batch,
            load.blocks,
            load.size_bytes,
        )
        job.nsid, job.random, job.read_percent = load.nsid, load.random, load.read_percent
        report = ffi.new("struct vt_nvme_report *")
        results: list[int] = []
        # In a thread of its own: this one stays open for signals.
        worker = threading.Thread(
            target=lambda: results.append(lib.vt_nvme_run(self._queue, job, report))
        )
        worker.start()
        try:
            worker.join()
        except BaseException:
            lib.vt_nvme_halt(self._queue)
            worker.join()
            raise
        self._check(results[0])
        return _report(report)

    def halt(self) -> None:
        """End a running `run` or `poll` soon; the one call for other threads."""
        lib.vt_nvme_halt(self._queue)

    def close(self) -> None:
        """Never touch rings and doorbells again; ends what another thread is waiting for. Closing
        twice is nothing."""
        while lib.vt_nvme_stop(self._queue) < 0:
            self.halt()
            time.sleep(1e-4)


def _report(report: Any) -> LoadReport:
    done = report.reads + report.writes + report.failed
    return LoadReport(
        reads=report.reads,
        writes=report.writes,
        failed=report.failed,
        first_status=report.first_status,
        elapsed_s=report.elapsed_ns / 1e9,
        latency_min_ns=report.latency_min_ns if done else 0,
        latency_max_ns=report.latency_max_ns,
        latency_sum_ns=report.latency_sum_ns,
        tail_writes=report.tail_writes,
        head_writes=report.head_writes,
        histogram=list(report.histogram),
    )


class Batch:
    """Equal commands on many places, for loops in Python that send and take many at once.

    There are `slots` places for data, `stride` bytes apart in `buffer`. Fill `lbas[:n]` and
    `slots[:n]` (which of the places each command uses), `submit(n)`; after `n = poll(...)`,
    `slots[:n]` are the places whose commands are done.
    """

    def __init__(
        self,
        queue: QueuePair,
        opcode: int,
        nsid: int,
        *,
        blocks: int,
        size_bytes: int,
        buffer: DmaBuffer,
        stride: int,
    ) -> None:
        if stride < size_bytes or size_bytes <= 0:
            raise UsageError(f"places {stride} bytes apart do not hold {size_bytes} bytes")
        self.queue = queue
        self.buffer = buffer
        self.count = min(queue.depth, buffer.size // stride)
        self._stride = stride
        self._pattern = ffi.new("struct vt_nvme_io *")
        self._pattern.iova, self._pattern.bytes = buffer.iova, size_bytes
        self._pattern.blocks, self._pattern.nsid, self._pattern.opcode = blocks, nsid, opcode
        self._lbas = ffi.new("uint64_t[]", self.count)
        self._tags = ffi.new("uint64_t[]", self.count)
        self._status = ffi.new("uint32_t *")
        self.lbas: memoryview[int] = memoryview(ffi.buffer(self._lbas)).cast("Q")
        self.slots: memoryview[int] = memoryview(ffi.buffer(self._tags)).cast("Q")

    def submit(self, count: int) -> int:
        """Send commands for the first `count` entries of `lbas` and `slots`, with one write of
        the doorbell; returns how many were taken (fewer where the queue is full)."""
        if not 0 <= count <= self.count:
            raise UsageError(f"a batch of {count}; there are {self.count} places")
        queue = self.queue
        queue._check_doorbell()
        result: int = lib.vt_nvme_submit_many(
            queue._queue, self._pattern, self._lbas, self._tags, count, self._stride, self.count
        )
        return result if result >= 0 else queue._check(result)

    def poll(self, least: int = 1, timeout_s: float = FOREVER_S) -> int:
        """Take completions as `QueuePair.poll`; returns how many, their places in `slots`.

        Raises KernelError with the status of the first command that failed.
        """
        queue = self.queue
        queue._check_doorbell()
        end = 0.0
        total = 0
        while True:
            count: int = lib.vt_nvme_poll_tags(
                queue._queue,
                self._tags + total,
                self.count - total,
                least - total if least > total else 0,
                _SLICE_NS,
                self._status,
            )
            if count < 0:
                queue._check(count)
            total += count
            if self._status[0]:
                raise failed_with(self._status[0], f"a command on queue {queue.rings.id}")
            if total >= least:
                return total
            end = end or time.monotonic() + timeout_s
            if time.monotonic() >= end or not queue.in_flight:
                return total
