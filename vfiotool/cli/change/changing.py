"""What all changing commands share: the options, the guard, the run, and what they print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from vfiotool.change.apply import Outcome, Progress, change
from vfiotool.change.guard import Allowance, refuse_uses
from vfiotool.change.journal import Journal
from vfiotool.change.remarks import remarks
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.registry import steps_as_json
from vfiotool.cli import output
from vfiotool.cli.context import host_of, remember_done, wants_json
from vfiotool.errors import UsageError
from vfiotool.host.host import WRITE_DEADLINE_S, Host
from vfiotool.host.tree import read_only_root

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the steps; touch nothing.")]
Timeout = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", help="Deadline of each write to the kernel."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="KIND:WHAT",
        help="Permit disrupting this use, as the refusal names it (repeatable).",
    ),
]
DEADLINE_S = WRITE_DEADLINE_S
Report = tuple[Mapping[str, object], Iterable[str]]
_QUIET_S = 1.0
_LONGEST_S = 604_800.0


@dataclass(frozen=True)
class Changed:
    """What a changing command did, or with a dry run would do; `notes` as `remarks` makes them."""

    steps: tuple[Step, ...]
    transaction: int | None
    dry: bool
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        return {
            "steps": steps_as_json(self.steps),
            "in_sync": not self.steps or not self.dry,
            "transaction": self.transaction,
            "notes": list(self.notes),
        }


def make_change(
    context: typer.Context,
    title: str,
    make: Callable[[Host, Journal | None], tuple[Step, ...]],
    *,
    dry_run: bool,
    timeout_s: float,
    allow: list[str] | None = None,
) -> Changed:
    """Plan, refuse what would hurt, and run; or just plan. Raises what `change` raises.

    Notes are printed once the locks are given back: a terminal that is stopped with Ctrl-S must
    not hold up whoever waits for these devices.
    """
    check_seconds("--timeout", timeout_s)
    chosen = host_of(context)
    allowed = [Allowance.parse(text) for text in allow or []]
    if dry_run:
        steps = make(chosen, Journal.existing(chosen) if chosen.live else None)
        refuse_uses(chosen, steps, allowed)
        return Changed(steps, None, dry=True, notes=say_remarks(chosen, steps))
    journal = journal_of(chosen)
    notes: list[str] = []
    try:
        outcome: Outcome = change(
            chosen,
            journal,
            title,
            lambda: make(chosen, journal),
            allowed=allowed,
            timeout_s=timeout_s,
            progress=progress_line(),
            notes=notes,
        )
        if outcome.transaction is not None:
            stands = f"change {outcome.transaction} stands (to revert it: vfiotool undo)"
            remember_done(context, stands)
    finally:
        _say_notes(notes)
    return Changed(outcome.steps, outcome.transaction, dry=False, notes=tuple(notes))


def journal_of(host: Host) -> Journal:
    """The journal of this machine. Raises UsageError for another root."""
    if not host.live:
        raise read_only_root(host.name)
    return Journal(host)


def check_seconds(option: str, seconds: float) -> None:
    """Raise UsageError for what is not a time to wait: not above 0, endless, or no number."""
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(
            f"{option} {seconds:g} is not a valid time",
            hint=f"give seconds above 0, and at most {_LONGEST_S:g}",
        )


def run_change(
    context: typer.Context,
    title: str,
    make: Callable[[Host, Journal | None], tuple[Step, ...]],
    report: Callable[[Changed], Report],
    *,
    dry_run: bool,
    timeout_s: float,
    allow: list[str] | None = None,
) -> int:
    """Run a change and print what `report` reads back of it; or print its plan. Raises as
    `make_change`.

    `report` gives the JSON keys to stand beside the steps, and the same in lines for people.
    """
    done = make_change(context, title, make, dry_run=dry_run, timeout_s=timeout_s, allow=allow)
    if done.dry:
        _show_plan(context, done)
        return 0
    keys, lines = report(done)
    if wants_json(context):
        output.emit({**done.as_json(), **keys})
    else:
        for line in lines:
            output.write(line)
    return 0


def _show_plan(context: typer.Context, done: Changed) -> None:
    if wants_json(context):
        payload = done.as_json()
        payload.pop("transaction")
        output.emit(payload)
    elif done.steps:
        print_steps(done.steps)
    else:
        output.write("nothing to do")


def say_remarks(host: Host, steps: tuple[Step, ...]) -> tuple[str, ...]:
    """Tell people what they should know of these steps, and return it."""
    notes = remarks(host, steps)
    _say_notes(notes)
    return notes


def _say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        output.say(f"vfiotool: note: {note}")


def progress_line() -> Progress | None:
    """Says on a terminal which step runs, once a change takes longer than a second."""
    if not output.interactive():
        return None
    begun = time.monotonic()

    def show(number: int, total: int, step: Step) -> None:
        if time.monotonic() - begun > _QUIET_S:
            output.progress(f"step {number} of {total}: {step.verb} {step.target}")

    return show


def print_steps(steps: tuple[Step, ...]) -> None:
    """The steps as people read them, one a line, with what undoes each."""
    for number, step in enumerate(steps, 1):
        before, after = step.words()
        undo = step.undo_text()
        output.write(
            f"{number}. ",
            (step.verb, "bold"),
            f" {step.target}: {before} -> ",
            (after, "green"),
            (f"   (undo: {undo})" if undo else "", "dim"),
        )
