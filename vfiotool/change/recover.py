"""Finishing or undoing what a crash, a kill or a held device left half done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vfiotool.change.apply import LOCK_DEADLINE_S
from vfiotool.change.guard import Allowance, refuse_uses, uses_left
from vfiotool.change.journal import Journal, Record, Transaction, started_at
from vfiotool.change.locks import held
from vfiotool.change.signals import kept
from vfiotool.change.steps.base import AnotherDevice, Step
from vfiotool.change.undo import inverses
from vfiotool.change.writer import (
    StepWriter,
    forget_origins,
    left_stuck,
    roll_back,
    run_step,
    verify_all,
)
from vfiotool.errors import KernelError, Stuck, VfiotoolError
from vfiotool.host.host import WRITE_DEADLINE_S, Host
from vfiotool.host.paths import PROC
from vfiotool.host.tree import read_only_root

_RESULT = {"committed": "finished", "rolled-back": "undone"}


@dataclass(frozen=True)
class Recovered:
    """What `recover` made of one transaction: `finished`, `undone`, `stuck` or `in progress`."""

    number: int
    title: str
    result: str
    detail: str | None = None


def recover(
    host: Host,
    journal: Journal,
    allowed: Iterable[Allowance] = (),
    *,
    timeout_s: float = WRITE_DEADLINE_S,
    finish: bool | None = None,
    only: int | None = None,
) -> tuple[Recovered, ...]:
    """Finish or undo every change that was left half done, or the one of the number `only`.

    By default a change that a held device stopped is finished (its user still wants it, and
    nothing failed), anything else undone, unless undoing would take a device that is in use;
    `finish` decides otherwise. Both ways pass the guard: with `finish` given a use that is not
    `allowed` raises Refused before anything is written, otherwise the change is reported as
    `stuck`, as is what is still held at most `timeout_s` after the call.
    """
    if not host.live:
        raise read_only_root(host.name)
    results = []
    permits = tuple(allowed)
    # Latest first: an earlier change may be what a later one built on.
    waiting = list(reversed(journal.unfinished(only=only)))
    try:
        while waiting:
            record, transaction = waiting.pop(0)
            if transaction is None:
                detail = f"process {record.pid} works on it"
                results.append(Recovered(record.number, record.title, "in progress", detail))
                continue
            results.append(_take_up(host, journal, record, transaction, permits, timeout_s, finish))
    finally:
        for _, transaction in waiting:
            if transaction is not None:
                transaction.release()
    return tuple(results)


def _take_up(
    host: Host,
    journal: Journal,
    record: Record,
    transaction: Transaction,
    allowed: tuple[Allowance, ...],
    timeout_s: float,
    finish: bool | None,
) -> Recovered:
    with kept() as interrupts, held(journal.locks, record.keys, LOCK_DEADLINE_S):
        writer = StepWriter(host, transaction, timeout_s, allowed, interrupts)
        writer.number, writer.nodes = max(record.started, default=1), record.nodes
        try:
            return _recover_one(writer, journal, record, finish)
        except BaseException:
            transaction.release()
            raise


def _recover_one(
    writer: StepWriter, journal: Journal, record: Record, finish: bool | None
) -> Recovered:
    host, transaction = writer.host, writer.transaction
    if record.outcome is not None:
        transaction.end(record.outcome, record.error)
        return Recovered(record.number, record.title, _RESULT[record.outcome])
    try:
        _await_writer(host, record, writer.timeout_s)
        if finish is not None:
            refuse_uses(host, _left(host, record, finish), writer.allowed)
        forward = _goes_forward(writer, record) if finish is None else finish
        outcome, reason = "rolled-back", None
        if forward:
            outcome, reason = _finish(writer, record)
        if outcome == "rolled-back":
            last = writer.number if forward else max(record.started, default=0)
            cause = KernelError(reason or "undone by recover")
            roll_back(writer, record.steps, range(last, 0, -1), cause)
    except Stuck as error:
        stuck = left_stuck(writer, record.steps, error)
        return Recovered(record.number, record.title, "stuck", stuck.message)
    forget_origins(host, journal, record.steps)
    transaction.end(outcome, reason)
    return Recovered(record.number, record.title, _RESULT[outcome], reason)


def _left(host: Host, record: Record, forward: bool) -> tuple[Step, ...]:
    """The steps that going on, or back, would run.

    None is about a device that has been replaced: whoever uses its successor loses nothing.
    """
    started = max(record.started, default=0)
    if forward:
        steps = record.steps[max(started - 1, 0) :]
    else:
        steps = inverses(record.steps[:started])
    return tuple(step for step in steps if not _is_of_another(host, step))


def _is_of_another(host: Host, step: Step) -> bool:
    try:
        step.check(host, begun=True)
    except AnotherDevice:
        return True
    except VfiotoolError:
        # Whatever else it is: the step is tried, and who uses the device is asked.
        return False
    return False


def _goes_forward(writer: StepWriter, record: Record) -> bool:
    """Whether to finish rather than undo: see `recover`.

    A device that came back to the host before the crash may be in use again by now: undoing is
    then no way out. Raises Stuck if finishing would hurt the host as well.
    """
    host, allowed = writer.host, writer.allowed
    if record.stuck is not None and not record.undoing and not record.interrupted:
        return True
    if not uses_left(host, _left(host, record, False), allowed):
        return False
    in_use = uses_left(host, _left(host, record, True), allowed)
    if in_use:
        raise Stuck(
            f"both ways would hurt this host: {in_use[0].device} {in_use[0].kind}: "
            f"{in_use[0].detail}",
            hint="end that use, then: vfiotool recover",
        )
    return True


def _finish(writer: StepWriter, record: Record) -> tuple[str, str | None]:
    """Run what is left of a transaction; the outcome, and why if it cannot be finished."""
    try:
        first = max(record.started, default=1)
        for number in range(first, len(record.steps) + 1):
            step = record.steps[number - 1]
            step.check(writer.host, begun=number == first)
            run_step(writer, number, step)
        verify_all(writer.host, record.steps)
    except Stuck:
        raise
    except VfiotoolError as error:
        return "rolled-back", error.message
    return "committed", None


def _await_writer(host: Host, record: Record, timeout_s: float) -> None:
    """Wait for a write that an earlier process left in the kernel. Raises Stuck if it stays."""
    if record.writer is None:
        return
    pid, since = record.writer
    deadline = host.clock.monotonic() + timeout_s
    while started_at(host, pid) == since and _alive(host, pid):
        if host.clock.monotonic() > deadline:
            raise Stuck(f"its last write is still in the kernel, in process {pid}")
        host.clock.sleep(0.02)


def _alive(host: Host, pid: int) -> bool:
    stat = host.read(f"{PROC}/{pid}/stat")
    return stat is not None and stat.rpartition(")")[2].split()[0] not in ("Z", "X")
