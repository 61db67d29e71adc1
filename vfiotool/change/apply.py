"""The executor: run a plan under its locks, verify each step, undo all of it if one fails.

What ends well is committed; what fails is rolled back in exact reverse and raises the failure;
what hangs, or cannot be rolled back, raises Stuck and stays in the journal for `recover`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from vfiotool.change.guard import Allowance, refuse_uses
from vfiotool.change.journal import Journal
from vfiotool.change.locks import held, lock_keys
from vfiotool.change.remarks import remarks
from vfiotool.change.signals import kept
from vfiotool.change.steps.base import Step
from vfiotool.change.writer import (
    StepWriter,
    forget_origins,
    left_stuck,
    reason_of,
    remember_origins,
    roll_back,
    run_step,
    verify_all,
)
from vfiotool.errors import KernelError, Stuck, VfiotoolError
from vfiotool.host.host import WRITE_DEADLINE_S, Host
from vfiotool.host.tree import read_only_root

LOCK_DEADLINE_S = 60.0
_REPLANS = 8

Progress = Callable[[int, int, Step], None]


@dataclass(frozen=True)
class Outcome:
    """What a change did: its steps, and its number in the journal (None if there were none)."""

    steps: tuple[Step, ...]
    transaction: int | None


@dataclass(frozen=True)
class How:
    """How a change is run: its deadline for each write, and what it may disrupt."""

    allowed: tuple[Allowance, ...] = ()
    timeout_s: float = WRITE_DEADLINE_S
    progress: Progress | None = None
    undoes: int | None = None


def change(
    host: Host,
    journal: Journal,
    title: str,
    make: Callable[[], tuple[Step, ...]],
    *,
    allowed: Iterable[Allowance] = (),
    timeout_s: float = WRITE_DEADLINE_S,
    progress: Progress | None = None,
    undoes: int | None = None,
    notes: list[str] | None = None,
) -> Outcome:
    """Plan with `make` under the locks that the plan needs, and run it.

    A use of the host that the steps would cut off refuses the plan before the first write, and
    stops it before each later one, unless it is `allowed`. `timeout_s` is the deadline of each
    write. What `remarks` says of the steps is added to `notes`: nothing is printed while locks are
    held. Raises UsageError on a root that is not the running host; Refused, NotFound,
    KernelError, NotPermitted or Unsupported with everything rolled back; Stuck where it could not
    be.
    """
    if not host.live:
        raise read_only_root(host.name)
    how = How(tuple(allowed), timeout_s, progress, undoes)
    steps = make()
    for _ in range(_REPLANS):
        if not steps:
            return Outcome((), None)
        keys = lock_keys(host, steps)
        with held(journal.locks, keys, LOCK_DEADLINE_S):
            steps = make()
            if not steps:
                return Outcome((), None)
            if set(lock_keys(host, steps)) <= set(keys):
                _refuse_unfinished(journal, keys)
                refuse_uses(host, steps, how.allowed)
                if notes is not None:
                    notes.extend(remarks(host, steps))
                number = _run_all(host, journal, title, steps, keys, how)
                return Outcome(steps, number)
    raise KernelError(
        "the host kept changing while the change was planned", hint="try again", errno_name="EAGAIN"
    )


def _refuse_unfinished(journal: Journal, keys: tuple[str, ...]) -> None:
    record = journal.abandoned_on(keys)
    if record is not None:
        raise Stuck(
            f"an earlier change of this device was not finished ({record.number}: {record.title})",
            hint="vfiotool recover",
        )


def _run_all(
    host: Host,
    journal: Journal,
    title: str,
    steps: tuple[Step, ...],
    keys: tuple[str, ...],
    how: How,
) -> int:
    with kept() as interrupts:
        transaction = journal.begin(title, steps, keys, how.undoes)
        writer = StepWriter(host, transaction, how.timeout_s, how.allowed, interrupts)
        started = 0
        try:
            remember_origins(host, journal, steps)
            for number, step in enumerate(steps, 1):
                if how.progress is not None:
                    how.progress(number, len(steps), step)
                step.check(host)
                started = number
                run_step(writer, number, step)
            verify_all(host, steps)
            transaction.end("committed")
        except Stuck as error:
            raise left_stuck(writer, steps, error) from error
        except BaseException as error:
            _undo_all(writer, journal, steps, started, error)
            raise
    # The change stands, whatever becomes of this: an old record of an origin harms nobody.
    with suppress(VfiotoolError, OSError):
        forget_origins(host, journal, steps, hold=True)
    return transaction.number


def _undo_all(
    writer: StepWriter,
    journal: Journal,
    steps: tuple[Step, ...],
    started: int,
    error: BaseException,
) -> None:
    """Roll back what ran because of `error`. Raises Stuck if that cannot be."""
    transaction = writer.transaction
    try:
        roll_back(writer, steps, range(started, 0, -1), error)
    except Stuck as stuck:
        raise left_stuck(writer, steps, stuck) from error
    except BaseException as again:
        # Interrupted once more: `recover` ends the roll-back, in this process or another.
        transaction.release()
        raise Stuck(
            f"interrupted while it was rolled back: {steps[max(writer.number, 1) - 1].target} is "
            "half done",
            hint="vfiotool recover",
        ) from again
    forget_origins(writer.host, journal, steps)
    try:
        transaction.end("rolled-back", reason_of(error))
    except VfiotoolError as again:
        transaction.release()
        raise Stuck(
            f"{reason_of(error)}; it was rolled back, but the journal could not say so: "
            f"{again.message}",
            hint="make room there, then: vfiotool recover",
            errno_name=again.errno_name,
        ) from error


__all__ = ["Outcome", "Progress", "change"]
