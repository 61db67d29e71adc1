"""`vfiotool why`: can a device be passed through, and what to type next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from vfiotool.cli import output
from vfiotool.cli.context import DeviceArgument, area, examples, host_of, wants_json
from vfiotool.cli.look.roles import print_group

if TYPE_CHECKING:
    from vfiotool.usage.verdict import Verdict

app = area()

_ANSWERS = {
    "ready": ("can be passed through: it is on a VFIO driver", "bold green"),
    "available": ("can be passed through: nothing uses it, bind makes it ready", "bold green"),
    "blocked": ("cannot be passed through yet", "bold red"),
}


@app.command(
    "why",
    epilog=examples(
        "vfiotool why 0000:05:01.0",
        "vfiotool why net:eth0",
        "vfiotool why block:nvme0n1 --json",
    ),
)
def why(context: typer.Context, device: DeviceArgument) -> int:
    """Explain whether a device can be passed through to a virtual machine.

    Each reason against it is named, with the evidence that one can check by hand; then come the
    commands to type next. Exit code 1 if it cannot be passed through yet.
    """
    from vfiotool.devices.selector import resolve
    from vfiotool.usage.case import read_case
    from vfiotool.usage.verdict import explain

    chosen = host_of(context)
    verdict = explain(read_case(chosen, resolve(chosen, device), reasons=True))
    if wants_json(context):
        output.emit(verdict.as_json())
    else:
        print_verdict(verdict)
    return 0 if verdict.passable else 1


def print_verdict(verdict: Verdict) -> None:
    """Yes or no, every reason with its evidence, and the commands to type next."""
    answer = _ANSWERS[verdict.word]
    if verdict.word == "available" and any(note.startswith("not seen") for note in verdict.notes):
        answer = ("can be passed through, if what was not seen does not use it", "bold yellow")
    if verdict.word == "blocked" and {b.kind for b in verdict.blockers} == {"unseen"}:
        answer = ("cannot be told: what may use it was not looked at", "bold yellow")
    elif verdict.word == "blocked" and not verdict.next:
        answer = ("cannot be passed through", "bold red")
    output.write((verdict.address, "bold"), " ", answer, f"  ({verdict.word})")
    for blocker in verdict.blockers:
        other = blocker.device != verdict.address and blocker.device not in blocker.detail
        whose = f"{blocker.device}: " if other else ""
        output.write((f"  {blocker.kind}", "red"), f"  {whose}{blocker.detail}")
        output.write((f"      {blocker.evidence}", "dim"))
    for warning in verdict.warnings:
        output.write(("  warning: ", "yellow"), warning)
    for note in verdict.notes:
        output.write(f"  note: {note}")
    print_group(verdict.group, verdict.address if verdict.next else None)
    if verdict.next:
        output.write(("next", "bold"))
    for command in verdict.next:
        output.write((f"  {command}", "cyan"))
