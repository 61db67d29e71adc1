"""`plan`, `apply`, `confirm`, `status`, `export`: a host's desired state."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from vfiotool.change.confirm import arm, attach, confirm
from vfiotool.change.guard import find_blockers
from vfiotool.change.journal import Journal
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.registry import steps_as_json
from vfiotool.change.undo import undo_number
from vfiotool.cli import candidates, output
from vfiotool.cli.change.changing import (
    DEADLINE_S,
    Allow,
    Changed,
    DryRun,
    Timeout,
    check_seconds,
    journal_of,
    make_change,
    print_steps,
    say_remarks,
)
from vfiotool.cli.context import area, examples, host_of, remember_done, wants_json
from vfiotool.errors import (
    KernelError,
    NotPermitted,
    Refused,
    Stuck,
    UsageError,
    VfiotoolError,
    from_oserror,
)
from vfiotool.host.host import Host
from vfiotool.policy.export import export_policy
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.model import Policy
from vfiotool.policy.parse import LARGEST_BYTES, parse_policy, read_policy_text
from vfiotool.policy.plan import Plan, Refusal, plan_policy
from vfiotool.policy.report import (
    drift_lines,
    drift_summary,
    plan_lines,
    refusal_lines,
    summary,
)
from vfiotool.policy.saved import DesiredState, SavedPlan, parse_saved, plan_to_text, refuse_changed

app = area()
_Policy = Annotated[
    str,
    typer.Argument(
        metavar="POLICY",
        help="A policy, or a saved plan; - for standard input.",
        autocompletion=candidates.policies,
    ),
]
_AbsentOk = Annotated[
    bool, typer.Option("--absent-ok", help="Report rules whose device is absent, and go on.")
]


def load(path: str) -> Policy | SavedPlan:
    """The policy or the saved plan in a file, in a pipe, or on standard input for `-`. Raises what
    `read_policy_text` and `parse_policy` raise."""
    name = "standard input" if path == "-" else path
    text = _read_stream() if path == "-" else read_policy_text(path)
    return parse_saved(text, name) or parse_policy(text, name)


def _read_stream() -> str:
    data = sys.stdin.buffer.read(LARGEST_BYTES + 1)
    if len(data) > LARGEST_BYTES:
        raise UsageError(f"the policy on standard input is larger than {LARGEST_BYTES >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the policy on standard input is not UTF-8: {error}") from error


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


def _print_plan(context: typer.Context, plan: Plan, notes: tuple[str, ...] = ()) -> None:
    if wants_json(context):
        output.emit(
            {
                "steps": steps_as_json(plan.steps),
                "in_sync": not plan.steps and not plan.refusals,
                "notes": list(notes),
                "refusals": [refusal.as_json() for refusal in plan.refusals],
            }
        )
    else:
        _print_lines(plan_lines(plan.steps))
        output.write((summary(plan), "bold"))
    _warn_refusals(plan)


def _print_lines(lines: Iterable[str]) -> None:
    """Lines under headings: what is not indented is a device."""
    for line in lines:
        output.write(line if line.startswith(" ") else (line, "bold"))


def _warn_refusals(plan: Plan) -> None:
    for line in refusal_lines(plan.refusals):
        output.warn(f"vfiotool: {line}")
    _warn_absent(plan)


def _warn_absent(plan: Plan) -> None:
    for line in plan.absent:
        output.warn(f"vfiotool: absent: {line}")


@app.command(
    "plan",
    epilog=examples(
        "vfiotool plan policy.toml",
        "vfiotool plan policy.toml --out change.plan && vfiotool apply change.plan",
        "vfiotool import /etc/modprobe.d | vfiotool plan -",
        "vfiotool --root snapshot.gz plan policy.toml",
    ),
)
def show_plan(
    context: typer.Context,
    policy: _Policy,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Save the plan, for apply FILE.plan; - for standard output.",
            autocompletion=candidates.files,
        ),
    ] = None,
    absent_ok: _AbsentOk = False,
) -> int:
    """Show what a policy would change, step by step, with what would undo each.

    Exit code 0 whether or not there is something to do (status shows that); 4 where apply would
    refuse.
    """
    host = host_of(context)
    loaded = load(policy)
    if isinstance(loaded, SavedPlan):
        loaded = loaded.policy
    plan = make_plan(host, _existing(host), loaded, absent_ok=absent_ok, collect=True)
    uses = (
        Refusal(blocker.kind, blocker.device, blocker.detail, blocker.evidence)
        for blocker in find_blockers(host, plan.steps)
    )
    plan = replace(plan, refusals=(*plan.refusals, *uses))
    if out is not None:
        if not out.endswith(".plan") and out != "-":
            raise UsageError(
                f"a saved plan's name ends in .plan, {out} does not", hint=f"--out {out}.plan"
            )
        try:
            output.save(out, plan_to_text(loaded, plan.steps))
        except OSError as error:
            raise from_oserror(f"write {out}", error) from error
    if out == "-":
        _warn_refusals(plan)
    else:
        _print_plan(context, plan, say_remarks(host, plan.steps))
    return Refused.exit_code if plan.refusals else 0


@app.command(
    "apply",
    epilog=examples(
        "vfiotool apply policy.toml --dry-run",
        "vfiotool apply policy.toml --confirm-within 60",
        "vfiotool apply change.plan",
        "vfiotool import old.conf | vfiotool apply -",
    ),
)
def apply(
    context: typer.Context,
    policy: _Policy,
    confirm_within: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Roll back unless confirmed within this time."),
    ] = None,
    absent_ok: _AbsentOk = False,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Apply a policy; all or nothing.

    What it changes lasts until reboot; vfiotool boot enable applies a policy at every boot.
    """
    if confirm_within is not None:
        check_seconds("--confirm-within", confirm_within)
    host = host_of(context)
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
        return make_change(context, title, make, dry_run=dry_run, timeout_s=timeout, allow=allow)

    if dry_run:
        notes = run().notes
        _print_plan(context, plans[-1], notes)
        return 0
    desired = DesiredState() if host.live else None
    if desired is not None:
        # Found wanting before the change, not after it.
        desired.try_out(rules)
    done = _run_confirmed(host, run, confirm_within) if confirm_within is not None else run()
    if desired is not None:
        _save_desired(host, desired, rules, done.transaction)
    _report_applied(context, done, plans[-1], confirm_within)
    return 0


def _save_desired(
    host: Host, desired: DesiredState, rules: Policy, transaction: int | None
) -> None:
    """Keep what was applied; where that fails, roll the change back: exit code 5 says so.

    Raises Stuck where that fails too.
    """
    try:
        desired.save(rules, transaction)
    except (KernelError, NotPermitted) as error:
        if transaction is not None:
            try:
                undo_number(host, journal_of(host), transaction)
            except VfiotoolError as again:
                raise Stuck(
                    f"{error.message}; the change stands: rolling it back failed: {again.message}",
                    hint="vfiotool undo, or make room and apply the policy again",
                ) from error
        raise


def _run_confirmed(host: Host, run: Callable[[], Changed], seconds: float) -> Changed:
    journal = journal_of(host)
    token = arm(host, journal, seconds)
    try:
        done = run()
    except Stuck:
        # Half done, and maybe what cut the user off: the watcher tries to undo it.
        raise
    except BaseException:
        # Rolled back: there is nothing that the watcher should roll back.
        journal.pending.remove(token)
        raise
    # Where this cannot be written the watcher finds the change by the process that made it.
    with suppress(KernelError, NotPermitted):
        attach(journal, token, done.transaction)
    return done


def _report_applied(
    context: typer.Context, done: Changed, plan: Plan, confirm_within: float | None
) -> None:
    if wants_json(context):
        output.emit({**done.as_json(), "in_sync": True, "absent": list(plan.absent)})
    elif done.steps:
        print_steps(done.steps)
        output.write((f"applied (change {done.transaction})", "bold green"))
    else:
        output.write("in sync: nothing to do")
    _warn_absent(plan)
    if confirm_within is not None and done.steps:
        output.warn(
            f"vfiotool: rolls back in {confirm_within:g} s unless confirmed; type: vfiotool confirm"
        )


@app.command("confirm", epilog=examples("vfiotool confirm"))
def keep(context: typer.Context) -> int:
    """Keep what was applied with --confirm-within."""
    host = host_of(context)
    numbers = confirm(host, journal_of(host))
    remember_done(context, f"change {', '.join(map(str, numbers))} is confirmed")
    if wants_json(context):
        output.emit({"confirmed": numbers})
    else:
        output.write(f"confirmed: change {', '.join(map(str, numbers))}")
    return 0


@app.command("status", epilog=examples("vfiotool status policy.toml", "vfiotool status - < p.toml"))
def status(context: typer.Context, policy: _Policy, absent_ok: _AbsentOk = False) -> int:
    """Check whether the host matches a policy; exit code 1 if it does not (drift)."""
    host = host_of(context)
    loaded = load(policy)
    rules = loaded.policy if isinstance(loaded, SavedPlan) else loaded
    plan = make_plan(host, _existing(host), rules, absent_ok=absent_ok, collect=True)
    if wants_json(context):
        _print_plan(context, plan)
    else:
        output.write((drift_summary(plan), "yellow" if plan.steps else "green"))
        _print_lines(drift_lines(plan.steps))
        _warn_refusals(plan)
    return 1 if plan.steps or plan.refusals else 0


@app.command("export", epilog=examples("vfiotool export > policy.toml"))
def export(context: typer.Context) -> int:
    """Print the present state of this host's devices as a policy."""
    text = export_policy(host_of(context))
    if wants_json(context):
        output.emit({"policy": text})
    else:
        output.text(text)
    return 0
