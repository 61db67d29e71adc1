"""Loads on an NVMe namespace in the manner of fio: what to run, and what it came to.

The loop that keeps the queues filled is C (`cext/nvme_load.c`), one thread a queue pair.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass

from vfiotool.drivers.nvme.controller import Controller
from vfiotool.drivers.nvme.identify import Namespace
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.load import Load, LoadReport, merge
from vfiotool.drivers.nvme.status import failed_with
from vfiotool.errors import KernelError, UsageError, VfiotoolError
from vfiotool.vfio import DmaBuffer

# fio's names: (random, per cent of reads; None is the job's own mix).
PATTERNS: dict[str, tuple[bool, int | None]] = {
    "read": (False, 100),
    "write": (False, 0),
    "rw": (False, None),
    "randread": (True, 100),
    "randwrite": (True, 0),
    "randrw": (True, None),
}
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)


@dataclass(frozen=True, slots=True)
class Job:
    """What to run. `depth` commands of `size_bytes` in flight on each of `queues` queue pairs, a
    new one for each that is done, or `batch` at a time; for `runtime_s` seconds or `limit`
    commands a queue, over the first `span_bytes` of the disk (0: all of it)."""

    pattern: str = "randread"
    size_bytes: int = 4096
    depth: int = 1
    queues: int = 1
    batch: int = 1
    runtime_s: float = 5.0
    limit: int = 0
    span_bytes: int = 0
    read_percent: int = 50
    seed: int = 1

    @property
    def writes(self) -> bool:
        """Whether data on the disk is overwritten."""
        return PATTERNS[self.pattern][1] != 100


def run(controller: Controller, disk: Namespace, job: Job) -> LoadReport:
    """Run `job` on queue pairs of its own. Raises UsageError for a job that cannot be, KernelError
    with the controller's words when a command fails."""
    _check(controller, disk, job)
    queues: list[IoQueue] = []
    buffers: list[DmaBuffer] = []
    try:
        report = _run(controller, disk, job, queues, buffers)
    except BaseException:
        # What ended the load is told, not what its clean-up met.
        with contextlib.suppress(VfiotoolError):
            _clean_up(controller, queues, buffers)
        raise
    _clean_up(controller, queues, buffers)
    if not report.ios:
        raise KernelError("the load ended without a single command")
    return report


def _clean_up(controller: Controller, queues: list[IoQueue], buffers: list[DmaBuffer]) -> None:
    """The first error is raised when all was tried. A buffer that commands may still reach is
    kept: the controller's end frees it."""
    first: VfiotoolError | None = None
    for queue in queues:
        try:
            queue.close()
        except VfiotoolError as error:
            first = first or error
    if first is not None:
        controller.keep(buffers)
        raise first
    for buffer in buffers:
        buffer.close()


def _run(
    controller: Controller,
    disk: Namespace,
    job: Job,
    queues: list[IoQueue],
    buffers: list[DmaBuffer],
) -> LoadReport:
    page = controller.page_bytes
    stride = -(-job.size_bytes // page) * page
    for _ in range(job.queues):
        queues.append(controller.create_queue(max(job.depth + 1, 2)))
        buffers.append(controller.device.dma.alloc(job.depth * stride, align=page))
        if job.writes:
            buffers[-1].view[: job.size_bytes] = os.urandom(job.size_bytes)
    loads = [_load(disk, job, buffer.iova, stride, number) for number, buffer in enumerate(buffers)]
    return merge(_side_by_side(controller, queues, loads))


def _check(controller: Controller, disk: Namespace, job: Job) -> None:
    if job.pattern not in PATTERNS:
        raise UsageError(f"no pattern {job.pattern!r}", hint=f"one of {', '.join(PATTERNS)}")
    if job.size_bytes <= 0 or job.size_bytes % disk.block_bytes:
        raise UsageError(f"{job.size_bytes} bytes are not whole blocks of {disk.block_bytes}")
    disk.refuse_metadata()
    if job.size_bytes > controller.max_transfer:
        raise UsageError(f"the controller takes {controller.max_transfer} bytes a command at most")
    if not 1 <= job.batch <= job.depth or job.queues < 1:
        raise UsageError("depth and queues are at least 1, and batch is from 1 to depth")
    if job.runtime_s <= 0 and job.limit <= 0:
        raise UsageError("a load needs an end: a time or a number of commands")
    if not 0 <= job.read_percent <= 100:
        raise UsageError("the share of reads is a per cent")
    if job.span_bytes and not job.size_bytes <= job.span_bytes <= disk.size_bytes:
        raise UsageError(f"{job.span_bytes} bytes of a disk of {disk.size_bytes}")


def _load(disk: Namespace, job: Job, iova: int, stride: int, number: int) -> Load:
    random, reads = PATTERNS[job.pattern]
    return Load(
        nsid=disk.nsid,
        first_lba=0,
        span=(job.span_bytes or disk.size_bytes) // disk.block_bytes,
        blocks=job.size_bytes // disk.block_bytes,
        size_bytes=job.size_bytes,
        iova=iova,
        stride=stride,
        depth=job.depth,
        batch=job.batch,
        random=random,
        read_percent=job.read_percent if reads is None else reads,
        runtime_s=job.runtime_s,
        limit=job.limit,
        seed=job.seed + number,
    )


def _side_by_side(
    controller: Controller, queues: list[IoQueue], loads: list[Load]
) -> list[LoadReport]:
    reports: list[LoadReport] = []
    failures: list[VfiotoolError] = []

    def watch() -> None:
        controller.health.check()
        if failures:  # a load may have begun after the reset that ended the others
            raise UsageError("the load on another queue failed")

    def load(queue: IoQueue, one: Load) -> LoadReport:
        try:
            report = queue.pair.run(one, watch)
        except UsageError:
            controller.health.explain()  # a reset in another thread says more than "closed"
            raise
        if report.failed:
            raise failed_with(report.first_status, f"{report.failed} commands; the first one")
        return report

    if len(queues) == 1:
        return [load(queues[0], loads[0])]

    def work(queue: IoQueue, one: Load) -> None:
        try:
            reports.append(load(queue, one))
        except VfiotoolError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(queues, loads, strict=True)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        for queue in queues:
            queue.pair.halt()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    return reports


def as_json(report: LoadReport, job: Job) -> dict[str, object]:
    """The report as JSON has it: rates a second, latencies in nanoseconds."""

    def side(ios: int) -> dict[str, object]:
        rate = ios / report.elapsed_s
        return {"ios": ios, "iops": rate, "bytes_per_second": rate * job.size_bytes}

    return {
        "pattern": job.pattern,
        "size_bytes": job.size_bytes,
        "depth": job.depth,
        "queues": job.queues,
        "batch": job.batch,
        "elapsed_s": report.elapsed_s,
        "read": side(report.reads),
        "write": side(report.writes),
        "latency_ns": {
            "min": report.latency_min_ns,
            "mean": report.latency_sum_ns / report.ios,
            "max": report.latency_max_ns,
            "percentiles": {
                f"{percent:g}": report.percentile_ns(percent) for percent in PERCENTILES
            },
        },
        "doorbells": {"tail": report.tail_writes, "head": report.head_writes},
    }
