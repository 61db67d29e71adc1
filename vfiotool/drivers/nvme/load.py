"""Loads on a queue pair: what to run, what it came to (`cext/nvme/nvme_load.h`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vfiotool.native.library import ffi, lib


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


def job_of(load: Load) -> Any:
    """`load` as a `struct vt_nvme_job`."""
    job = ffi.new("struct vt_nvme_job *")
    job.first_lba, job.span = load.first_lba, load.span
    job.iova, job.stride = load.iova, load.stride
    job.runtime_ns, job.limit, job.seed = round(load.runtime_s * 1e9), load.limit, load.seed
    job.depth, job.batch = load.depth, load.batch
    job.blocks, job.bytes, job.nsid = load.blocks, load.size_bytes, load.nsid
    job.random, job.read_percent = load.random, load.read_percent
    return job


def report_of(report: Any) -> LoadReport:
    """A `struct vt_nvme_report` as a value."""
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
