"""What all changing commands share: the options, the guard, the run, and what they print."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from vfiotool.change.apply import Outcome, Progress, change
from vfiotool.change.guard import Allowance, refuse_hurtful
from vfiotool.change.journal import Journal
from vfiotool.change.remarks import remarks
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.registry import steps_as_json
from vfiotool.cli import output as render
from vfiotool.cli.declare import Context, Option
from vfiotool.errors import UsageError
from vfiotool.host.host import WRITE_DEADLINE_S, Host
from vfiotool.host.tree import read_only_root

DryRun = Annotated[bool, Option("--dry-run", help="Print the steps; touch nothing.")]
Timeout = Annotated[
    float,
    Option("--timeout", metavar="SECONDS", help="Deadline of each write to the kernel."),
]
Allow = Annotated[
    list[str] | None,
    Option("--allow", metavar="KIND:WHAT", help="Cut off this one use (repeatable)."),
]
DEADLINE_S = WRITE_DEADLINE_S
Told = tuple[Mapping[str, object], Iterable[str]]
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


def perform(
    context: Context,
    title: str,
    make: Callable[[Host, Journal | None], tuple[Step, ...]],
    *,
    dry_run: bool,
    timeout_s: float,
    allow: list[str] | None = None,
) -> Changed:
    """Plan, refuse what would hurt, and run; or just plan. Raises what `change` raises."""
    check_seconds("--timeout", timeout_s)
    host = render.host(context)
    allowed = [Allowance.parse(text) for text in allow or []]
    if dry_run:
        steps = make(host, Journal.existing(host) if host.live else None)
        refuse_hurtful(host, steps, allowed)
        return Changed(steps, None, dry=True, notes=say_remarks(host, steps))
    if not host.live:
        raise read_only_root(host.name)
    journal = Journal(host)
    notes: list[str] = []

    def guard(steps: tuple[Step, ...]) -> None:
        refuse_hurtful(host, steps, allowed)
        notes.extend(say_remarks(host, steps))

    outcome: Outcome = change(
        host,
        journal,
        title,
        lambda: make(host, journal),
        guard=guard,
        timeout_s=timeout_s,
        progress=progress_line(),
    )
    return Changed(outcome.steps, outcome.transaction, dry=False, notes=tuple(notes))


def check_seconds(option: str, seconds: float) -> None:
    """Raise UsageError for what is no time to wait: not above 0, endless, or no number."""
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(
            f"{option} {seconds:g} is no deadline",
            hint=f"give seconds above 0, and at most {_LONGEST_S:g}",
        )


def carry_out(
    context: Context,
    title: str,
    make: Callable[[Host, Journal | None], tuple[Step, ...]],
    tell: Callable[[Changed], Told],
    *,
    dry_run: bool,
    timeout_s: float,
    allow: list[str] | None = None,
) -> int:
    """Run a change and print what `tell` reads back of it; or print its plan. Raises as `perform`.

    `tell` gives the JSON keys to stand beside the steps, and the same in lines for people.
    """
    done = perform(context, title, make, dry_run=dry_run, timeout_s=timeout_s, allow=allow)
    if done.dry:
        _show_plan(context, done)
        return 0
    keys, lines = tell(done)
    if render.state(context).json:
        render.emit({**done.as_json(), **keys})
    else:
        for line in lines:
            print_line(line)
    return 0


def _show_plan(context: Context, done: Changed) -> None:
    if render.state(context).json:
        payload = done.as_json()
        payload.pop("transaction")
        render.emit(payload)
    elif done.steps:
        print_steps(done.steps)
    else:
        print_line("nothing to do")


def say_remarks(host: Host, steps: tuple[Step, ...]) -> tuple[str, ...]:
    """Tell people what they should know of these steps, and return it."""
    notes = remarks(host, steps)
    for note in notes:
        render.say(f"vfiotool: note: {note}")
    return notes


def progress_line() -> Progress | None:
    """Says on a terminal which step runs, once a change takes longer than a second."""
    if not sys.stderr.isatty():
        return None
    begun = time.monotonic()

    def show(number: int, total: int, step: Step) -> None:
        if time.monotonic() - begun > _QUIET_S:
            # A terminal that has gone away is no reason to give a change up.
            with suppress(OSError):
                render.say(f"step {number} of {total}: {step.verb} {step.target}")

    return show


def print_steps(steps: tuple[Step, ...]) -> None:
    """The steps as people read them, one a line, with what undoes each."""
    for number, step in enumerate(steps, 1):
        before, after = step.words()
        line = f"{number}. {step.verb} {step.target}: {before} -> {after}"
        undo = step.undo_text()
        print_line(f"{line}   (undo: {undo})" if undo else line)


def print_line(text: str) -> None:
    sys.stdout.write(render.escape(text) + "\n")
