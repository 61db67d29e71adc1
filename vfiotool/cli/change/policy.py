"""`plan`, `apply`, `status`, `undo`, `history`, `recover`, `confirm`, `export`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

from vfiotool.change.apply import NothingToUndo, Recovered, last_standing, recover, undo
from vfiotool.change.confirm import arm, attach, confirm, revert_unconfirmed
from vfiotool.change.guard import Allowance, find_blockers
from vfiotool.change.journal import RUN_FOLDER, Journal, Record
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.registry import steps_as_json
from vfiotool.cli import output as render
from vfiotool.cli.change.changing import (
    DEADLINE_S,
    Allow,
    Changed,
    DryRun,
    Timeout,
    check_seconds,
    perform,
    print_line,
    print_steps,
    progress_line,
    say_remarks,
)
from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.errors import Stuck, UsageError, from_oserror
from vfiotool.host.host import Host
from vfiotool.host.tree import read_only_root
from vfiotool.policy.export import export_policy
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.model import Policy
from vfiotool.policy.parse import parse_policy, read_policy, read_policy_text
from vfiotool.policy.plan import Plan, Refusal, plan_policy
from vfiotool.policy.report import (
    drift_lines,
    drift_summary,
    plan_lines,
    refusal_lines,
    summary,
)
from vfiotool.policy.saved import DesiredState, SavedPlan, parse_saved, plan_to_text, refuse_changed

_Policy = Annotated[str, Argument(metavar="POLICY", help="A policy, or a saved plan.")]
_AbsentOk = Annotated[
    bool, Option("--absent-ok", help="Report rules whose device is absent, and go on.")
]


def register(app: Commands) -> None:
    """Add this area's commands."""
    app.command("plan", help="Show what a policy would change.")(show_plan)
    app.command("apply", help="Make the host as a policy says, or leave it as it was.")(apply)
    app.command("confirm", help="Keep what was applied with --confirm-within.")(keep)
    app.command("status", help="Tell whether the host is as a policy says (exit 1 if not).")(status)
    app.command("undo", help="Take the last change back.")(take_back)
    app.command("history", help="List the changes of this boot.")(history)
    app.command("recover", help="Finish or undo what a crash or a held device left.")(mend)
    app.command("export", help="Print the present state as a policy.")(export)


def load(path: str) -> Policy | SavedPlan:
    """A policy's or a saved plan's file. Raises what `read_policy` raises."""
    text = read_policy_text(path)
    return parse_saved(text, path) or parse_policy(text, path)


def make_plan(
    host: Host,
    journal: Journal | None,
    policy: Policy,
    *,
    absent_ok: bool = False,
    collect: bool = False,
) -> Plan:
    """Read what the policy needs to know of the host, and plan it."""
    facts = read_policy_facts(host, policy, journal)
    return plan_policy(policy, facts, absent_ok=absent_ok, collect=collect)


def _existing(host: Host) -> Journal | None:
    return Journal.existing(host) if host.live else None


def _emit_plan(context: Context, plan: Plan, notes: tuple[str, ...] = ()) -> None:
    if render.state(context).json:
        render.emit(
            {
                "steps": steps_as_json(plan.steps),
                "in_sync": not plan.steps and not plan.refusals,
                "notes": list(notes),
                "refusals": [refusal.as_json() for refusal in plan.refusals],
            }
        )
    else:
        for line in (*plan_lines(plan.steps), summary(plan)):
            print_line(line)
    for line in refusal_lines(plan.refusals):
        render.say(f"vfiotool: {line}")
    _tell_absent(plan)


def _tell_absent(plan: Plan) -> None:
    for line in plan.absent:
        render.say(f"vfiotool: absent: {line}")


def show_plan(
    context: Context,
    policy: _Policy,
    out: Annotated[
        str | None, Option(metavar="FILE", help="Save the plan for apply FILE.plan.")
    ] = None,
    absent_ok: _AbsentOk = False,
) -> int:
    host = render.host(context)
    loaded = read_policy(policy)
    plan = make_plan(host, _existing(host), loaded, absent_ok=absent_ok, collect=True)
    uses = (
        Refusal(blocker.kind, blocker.device, blocker.detail, blocker.evidence)
        for blocker in find_blockers(host, plan.steps)
    )
    plan = replace(plan, refusals=(*plan.refusals, *uses))
    if out is not None:
        if not out.endswith(".plan"):
            raise UsageError(
                f"a saved plan's name ends in .plan, {out} does not", hint=f"--out {out}.plan"
            )
        try:
            with open(out, "w", encoding="utf-8") as file:
                file.write(plan_to_text(loaded, plan.steps))
        except OSError as error:
            raise from_oserror(f"write {out}", error) from error
    _emit_plan(context, plan, say_remarks(host, plan.steps))
    return 4 if plan.refusals else 0


def apply(
    context: Context,
    policy: _Policy,
    confirm_within: Annotated[
        float | None,
        Option(metavar="SECONDS", help="Take it back unless confirmed by then."),
    ] = None,
    absent_ok: _AbsentOk = False,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    if confirm_within is not None:
        check_seconds("--confirm-within", confirm_within)
    host = render.host(context)
    loaded = load(policy)
    rules = loaded.policy if isinstance(loaded, SavedPlan) else loaded
    plans: list[Plan] = []

    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        plan = make_plan(host, journal, rules, absent_ok=absent_ok)
        if isinstance(loaded, SavedPlan):
            refuse_changed(loaded, plan.steps)
        plans.append(plan)
        return plan.steps

    def run() -> Changed:
        title = f"apply {os.path.basename(policy)}"
        return perform(context, title, make, dry_run=dry_run, timeout_s=timeout, allow=allow)

    if dry_run:
        notes = run().notes
        _emit_plan(context, plans[-1], notes)
        return 0
    # Found wanting before the change, not after it.
    desired = DesiredState() if host.live else None
    done = _run_confirmed(host, run, confirm_within) if confirm_within is not None else run()
    if desired is not None:
        desired.save(rules, done.transaction)
    _report_applied(context, done, plans[-1], confirm_within)
    return 0


def _run_confirmed(host: Host, run: Callable[[], Changed], seconds: float) -> Changed:
    if not host.live:
        raise read_only_root(host.name)
    journal = Journal(host)
    token = arm(host, journal, seconds)
    try:
        done = run()
    except Stuck:
        # Half done, and maybe what cut the user off: the watcher tries to undo it.
        raise
    except BaseException:
        # Rolled back: there is nothing that the watcher should take back.
        journal.pending.remove(token)
        raise
    attach(journal, token, done.transaction)
    return done


def _report_applied(
    context: Context, done: Changed, plan: Plan, confirm_within: float | None
) -> None:
    if render.state(context).json:
        render.emit({**done.as_json(), "in_sync": True, "absent": list(plan.absent)})
    elif done.steps:
        print_steps(done.steps)
        print_line(f"applied (change {done.transaction})")
    else:
        print_line("in sync: nothing to do")
    _tell_absent(plan)
    if confirm_within is not None and done.steps:
        render.say(
            f"vfiotool: this is taken back in {confirm_within:g} s unless you type: "
            "vfiotool confirm"
        )


def keep(context: Context) -> int:
    host = render.host(context)
    numbers = confirm(host, _journal(host))
    if render.state(context).json:
        render.emit({"confirmed": numbers})
    else:
        print_line(f"kept: change {', '.join(map(str, numbers))}")
    return 0


def _journal(host: Host) -> Journal:
    if not host.live:
        raise read_only_root(host.name)
    return Journal(host)


def status(context: Context, policy: _Policy, absent_ok: _AbsentOk = False) -> int:
    host = render.host(context)
    loaded = load(policy)
    rules = loaded.policy if isinstance(loaded, SavedPlan) else loaded
    plan = make_plan(host, _existing(host), rules, absent_ok=absent_ok, collect=True)
    if render.state(context).json:
        _emit_plan(context, plan)
    else:
        for line in (drift_summary(plan), *drift_lines(plan.steps)):
            print_line(line)
        for line in refusal_lines(plan.refusals):
            render.say(f"vfiotool: {line}")
        _tell_absent(plan)
    return 1 if plan.steps or plan.refusals else 0


def take_back(
    context: Context,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
    unconfirmed: Annotated[str | None, Option(hidden=True)] = None,
) -> int:
    check_seconds("--timeout", timeout)
    host = render.host(context)
    journal = _journal(host)
    if unconfirmed is not None:
        print_line(revert_unconfirmed(host, journal, unconfirmed, timeout) or "confirmed")
        return 0
    if dry_run:
        record = last_standing(journal.history())
        inverses = (step.inverse() for step in reversed(record.steps))
        steps = tuple(step for step in inverses if step is not None)
        _emit_plan(context, Plan(steps))
        return 0
    try:
        allowed = [Allowance.parse(text) for text in allow or []]
        record = undo(host, journal, allowed, timeout_s=timeout, progress=progress_line())
    except NothingToUndo as error:
        render.say(f"vfiotool: {error.message}")
        if render.state(context).json:
            render.emit({"undone": None, "title": None})
        return 0
    if render.state(context).json:
        render.emit({"undone": record.number, "title": record.title})
    else:
        print_line(f"undone: change {record.number} ({record.title})")
    return 0


def history(context: Context) -> int:
    host = render.host(context)
    if not host.live:
        raise read_only_root(host.name)
    # Looking at what was done makes no folder; where there is none nothing was.
    records = Journal(host).history() if os.path.isdir(RUN_FOLDER) else []
    undone = {record.undoes for record in records if record.outcome == "committed"}
    if render.state(context).json:
        render.emit({"history": [_record_as_json(record, undone) for record in records]})
        return 0
    if not records:
        render.say("vfiotool: nothing was changed since this boot")
    for record in records:
        at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        taken = ", undone" if record.number in undone else ""
        print_line(f"{record.number}  {at}  {_outcome(record)}{taken}  {record.title}")
        if record.error or record.stuck:
            print_line(f"    {record.error or record.stuck}")
    return 0


def _outcome(record: Record) -> str:
    if record.outcome is not None:
        return record.outcome
    return "stuck" if record.stuck else "open"


def _record_as_json(record: Record, undone: set[int | None]) -> dict[str, object]:
    return {
        "number": record.number,
        "at": record.at,
        "title": record.title,
        "outcome": _outcome(record),
        "error": record.error or record.stuck,
        "undoes": record.undoes,
        "undone": record.number in undone,
        "steps": steps_as_json(record.steps),
    }


def mend(
    context: Context,
    finish: Annotated[
        bool | None, Option("--finish/--undo", help="Decide instead of the default.")
    ] = None,
    timeout: Timeout = DEADLINE_S,
) -> int:
    check_seconds("--timeout", timeout)
    host = render.host(context)
    begun = time.monotonic()
    results = recover(host, _journal(host), timeout_s=timeout, finish=finish)
    if render.state(context).json:
        rows = [
            {
                "number": entry.number,
                "title": entry.title,
                "result": entry.result,
                "detail": entry.detail,
            }
            for entry in results
        ]
        render.emit({"recovered": rows, "seconds": round(time.monotonic() - begun, 3)})
    else:
        _print_recovered(results)
    return 6 if any(entry.result == "stuck" for entry in results) else 0


def _print_recovered(results: tuple[Recovered, ...]) -> None:
    if not results:
        print_line("nothing to recover")
    for entry in results:
        print_line(f"{entry.number} {entry.title}: {entry.result}")
        if entry.detail:
            print_line(f"    {entry.detail}")


def export(context: Context) -> int:
    text = export_policy(render.host(context))
    if render.state(context).json:
        render.emit({"policy": text})
    else:
        print_line(text.rstrip("\n"))
    return 0
