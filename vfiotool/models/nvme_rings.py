"""The queues of the NVMe model as it knows them (Base Specification 2.0, 3.3.1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CompletionRing:
    """A completion queue: `vector` is its interrupt's, -1 for none."""

    base: int
    entries: int
    vector: int
    tail: int = 0
    phase: int = 1


@dataclass(slots=True)
class SubmissionRing:
    """A submission queue, and the completion queue that its answers go to."""

    number: int
    base: int
    entries: int
    completions: int
    head: int = 0


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """A completion that is due and was kept back (`NvmeModel.hold`)."""

    queue: SubmissionRing
    cid: int
    status: int
    result: int
