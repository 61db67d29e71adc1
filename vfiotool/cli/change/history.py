"""`undo`, `history`, `recover`: what was changed, and the way back."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime, timedelta
from typing import Annotated

import typer

from vfiotool.change.audit import Audited, Caller, read_audit
from vfiotool.change.confirm import revert_unconfirmed
from vfiotool.change.guard import Allowance
from vfiotool.change.journal import RUN_FOLDER, Journal, Record
from vfiotool.change.recover import Recovered, recover
from vfiotool.change.steps.registry import steps_as_json
from vfiotool.change.undo import NothingToUndo, inverses, last_standing, undo
from vfiotool.cli import output
from vfiotool.cli.change.changing import (
    DEADLINE_S,
    Allow,
    DryRun,
    Timeout,
    check_seconds,
    journal_of,
    print_steps,
    progress_line,
)
from vfiotool.cli.context import area, examples, host_of, remember_done, wants_json
from vfiotool.errors import Stuck, UsageError
from vfiotool.host.tree import read_only_root

app = area()
_OUTCOMES = {"committed": "green", "rolled-back": "yellow", "stuck": "bold red", "open": "yellow"}


@app.command("undo", epilog=examples("vfiotool undo --dry-run", "vfiotool undo"))
def revert(
    context: typer.Context,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
    unconfirmed: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> int:
    """Revert the last change, whichever command made it. `vfiotool history` lists them."""
    check_seconds("--timeout", timeout)
    host = host_of(context)
    journal = journal_of(host)
    if unconfirmed is not None:
        output.write(revert_unconfirmed(host, journal, unconfirmed, timeout) or "confirmed")
        return 0
    if dry_run:
        record = last_standing(journal.history())
        steps = inverses(record.steps)
        if wants_json(context):
            found = {"steps": steps_as_json(steps), "in_sync": not steps, "notes": []}
            output.emit({**found, "refusals": []})
        else:
            print_steps(steps)
        return 0
    try:
        allowed = [Allowance.parse(text) for text in allow or []]
        record = undo(host, journal, allowed, timeout_s=timeout, progress=progress_line())
    except NothingToUndo as error:
        output.say(f"vfiotool: {error.message}")
        if wants_json(context):
            output.emit({"undone": None, "title": None})
        return 0
    remember_done(context, f"change {record.number} is undone")
    if wants_json(context):
        output.emit({"undone": record.number, "title": record.title})
    else:
        output.write(f"undone: change {record.number} ({record.title})")
    return 0


@app.command(
    "history",
    epilog=examples(
        "vfiotool history",
        "vfiotool history --since yesterday",
        "vfiotool history --since 2026-11-01 --json",
    ),
)
def history(
    context: typer.Context,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN",
            help="From the audit trail, earlier boots too, with who made each change: today, "
            "yesterday, 90m, 12h, 7d, 2026-11-30, 2026-11-30T08:00. Needs no root.",
        ),
    ] = None,
) -> int:
    """List the changes since the last boot, with what became of each."""
    host = host_of(context)
    if not host.live:
        raise read_only_root(host.name)
    if since is not None:
        return _show_audit(context, read_audit(moment_of(since, time.time())))
    # Looking at what was done makes no folder; where there is none nothing was.
    records = Journal(host).history() if os.path.isdir(RUN_FOLDER) else []
    undone = {record.undoes for record in records if record.outcome == "committed"}
    if wants_json(context):
        output.emit({"history": [_record_as_json(record, undone) for record in records]})
        return 0
    if not records:
        output.say("vfiotool: nothing was changed since this boot")
    rows: list[list[output.Part]] = []
    for record in records:
        outcome = _outcome(record)
        reverted = ", undone" if record.number in undone else ""
        rows.append(
            [
                str(record.number),
                local_time(record.at),
                (outcome + reverted, _OUTCOMES.get(outcome, "")),
                record.title,
                record.error or record.stuck or "",
            ]
        )
    output.table(("CHANGE", "TIME", "RESULT", "COMMAND", "ERROR"), rows)
    return 0


def moment_of(text: str, now: float) -> float:
    """What --since means, in seconds since 1970. Raises UsageError for what is no moment."""
    match = re.fullmatch(r"(\d{1,6})([mhd])", text, re.ASCII)
    if match is not None:
        return now - int(match[1]) * {"m": 60, "h": 3600, "d": 86400}[match[2]]
    today = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
    if text in ("today", "yesterday"):
        return (today - timedelta(days=text == "yesterday")).timestamp()
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"--since {text[:40]!r} is not a moment",
            hint="today, yesterday, 90m, 12h, 7d, 2026-11-30 or 2026-11-30T08:00",
        ) from error


def _show_audit(context: typer.Context, found: tuple[Audited, ...]) -> int:
    undone = {(one.boot, one.undoes) for one in found if one.outcome == "committed"}
    if wants_json(context):
        rows = [
            {
                "number": one.number,
                "at": one.at,
                "title": one.title,
                "outcome": one.outcome or "open",
                "error": one.error,
                "undoes": one.undoes,
                "undone": (one.boot, one.number) in undone,
                "steps": list(one.steps),
                "boot": one.boot,
                "by": dict(one.by),
                "command": list(one.command),
            }
            for one in found
        ]
        output.emit({"history": rows})
        return 0
    if not found:
        output.say("vfiotool: no change is recorded since then")
        return 0
    lines: list[list[output.Part]] = []
    for one in found:
        outcome = one.outcome or "open"
        reverted = ", undone" if (one.boot, one.number) in undone else ""
        by = Caller(one.by["uid"], one.by["user"], one.by["login"], one.by["sudo"]).words
        result = (outcome + reverted, _OUTCOMES.get(outcome, ""))
        lines.append([str(one.number), local_time(one.at), result, by, one.title, one.error or ""])
    output.table(("CHANGE", "TIME", "RESULT", "BY", "COMMAND", "ERROR"), lines)
    return 0


def local_time(at: float) -> str:
    """A time of day of this machine, with its difference from UTC."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


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


@app.command("recover", epilog=examples("vfiotool recover", "vfiotool recover --undo"))
def resume(
    context: typer.Context,
    finish: Annotated[
        bool | None,
        typer.Option("--finish/--undo", help="Go forwards or back; default: what is safe."),
    ] = None,
    allow: Allow = None,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Finish or roll back an interrupted change, after a crash or a device that was held."""
    check_seconds("--timeout", timeout)
    host = host_of(context)
    begun = time.monotonic()
    allowed = [Allowance.parse(text) for text in allow or []]
    results = recover(host, journal_of(host), allowed, timeout_s=timeout, finish=finish)
    code = Stuck.exit_code if any(entry.result == "stuck" for entry in results) else 0
    if results:
        words = "; ".join(f"{entry.number}: {entry.result}" for entry in results)
        remember_done(context, f"recovered: {words}", code)
    if wants_json(context):
        rows = [
            {
                "number": entry.number,
                "title": entry.title,
                "result": entry.result,
                "detail": entry.detail,
            }
            for entry in results
        ]
        output.emit({"recovered": rows, "seconds": round(time.monotonic() - begun, 3)})
    else:
        _print_recovered(results)
    return code


def _print_recovered(results: tuple[Recovered, ...]) -> None:
    if not results:
        output.write("nothing to recover")
    for entry in results:
        output.write(f"{entry.number} {entry.title}: {entry.result}")
        if entry.detail:
            output.write(f"    {entry.detail}")
