"""Undoing a change that was committed: its steps in reverse, run as any other change."""

from __future__ import annotations

from collections.abc import Iterable

from vfiotool.change.apply import Outcome, Progress, change
from vfiotool.change.guard import Allowance
from vfiotool.change.journal import Journal, Record
from vfiotool.change.steps.base import Step
from vfiotool.errors import NotFound
from vfiotool.host.host import WRITE_DEADLINE_S, Host


class NothingToUndo(NotFound):
    """No change of this boot stands."""


def undo(
    host: Host,
    journal: Journal,
    allowed: Iterable[Allowance] = (),
    *,
    timeout_s: float = WRITE_DEADLINE_S,
    progress: Progress | None = None,
) -> Record:
    """Revert the last change of this boot that stands. Returns its record.

    Raises NothingToUndo if there is none, and Refused if the host has been changed since, or if
    undoing would cut off a use of the host that is not `allowed`.
    """
    record = last_standing(journal.history())
    _revert(host, journal, record, allowed, timeout_s, progress)
    return record


def undo_number(
    host: Host, journal: Journal, number: int, *, timeout_s: float = WRITE_DEADLINE_S
) -> None:
    """Revert the committed change of that number. Raises as `undo` does."""
    history = journal.history()
    undone = {record.undoes for record in history if record.outcome == "committed"}
    for record in history:
        if record.number == number and record.outcome == "committed" and number not in undone:
            _revert(host, journal, record, (), timeout_s, None)
            return
    raise NotFound(f"change {number} does not stand (any more)", hint="vfiotool history")


def inverses(steps: Iterable[Step]) -> tuple[Step, ...]:
    """What undoes the steps, in the order in which it is run."""
    found = (step.inverse() for step in reversed(tuple(steps)))
    return tuple(step for step in found if step is not None)


def _revert(
    host: Host,
    journal: Journal,
    record: Record,
    allowed: Iterable[Allowance],
    timeout_s: float,
    progress: Progress | None,
) -> Outcome:
    steps = inverses(record.steps)
    return change(
        host,
        journal,
        f"undo {record.number}: {record.title}",
        lambda: steps,
        allowed=allowed,
        timeout_s=timeout_s,
        progress=progress,
        undoes=record.number,
    )


def last_standing(history: list[Record]) -> Record:
    """The latest committed change that is neither undone nor itself an undoing."""
    undone = {record.undoes for record in history if record.outcome == "committed"}
    for record in reversed(history):
        if record.outcome == "committed" and record.undoes is None and record.number not in undone:
            return record
    raise NothingToUndo(
        "there is no change of this boot to undo", hint="vfiotool history lists them"
    )
