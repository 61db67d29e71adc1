"""`lab rehearse POLICY`: a policy's life played in a host's twin, before the host is touched."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import wants_json
from vfiotool.cli.lab_twin import KernelOption, asked_here, planned
from vfiotool.errors import Ambiguous, KernelError, NotFound, Refused, Unsupported, UsageError
from vfiotool.lab.kernels import catalogue as kernels

if TYPE_CHECKING:
    from vfiotool.lab.rehearse import Done, Rehearsal
    from vfiotool.lab.twin_plan import TwinPlan

_SNAPSHOT_LIMIT_S = 120.0
# The errors of a plan that are the host's answer: no device is as the policy says, several are, or
# what it wants cannot be there. By kind, with their exit codes.
_ANSWERS = {
    kind.kind: kind.exit_code for kind in (NotFound, Ambiguous, Refused, KernelError, Unsupported)
}
_MOST_TOLD = 3


def rehearse(
    context: typer.Context,
    policy: Annotated[
        Path,
        typer.Argument(
            metavar="POLICY", help="A policy file (TOML).", autocompletion=candidates.files
        ),
    ],
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="SNAPSHOT",
            help="The host, as a snapshot; default: one of this machine is taken first.",
            autocompletion=candidates.files,
        ),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--fault",
            metavar="DEVICE=FAULT",
            help="What a device does wrong, such as 01:00.0=reset-nothing (repeatable).",
        ),
    ] = None,
    qemu: Annotated[
        bool, typer.Option(help="Open the devices with a QEMU in the twin as well.")
    ] = True,
    kernel: KernelOption = kernels.DEFAULT,
) -> int:
    """Rehearse a policy in the twin of a host: what would happen, before the host is touched.

    Plays plan, apply, status, vm check, two starts of a VM, and undo; again with kill -9 on the
    way; again with a device that does not come back from its reset. Exit code 1: it found
    something.
    """
    from vfiotool.lab import rehearse_run
    from vfiotool.lab.twin_run import refuse_unready

    faults = _faults(fault or [])
    text = _text(policy)
    begun = time.monotonic()
    with ExitStack() as stack:
        snapshot = host or _snapshot_of_this_machine(stack)
        original, plan = planned(snapshot)
        rehearse_run.refuse_faults(plan, faults)
        told = _asked(policy, snapshot)
        if "error" in told:
            output.say("rehearse: no twin has to boot: on that host nothing would be done")
            played = rehearse_run.unplayed(told, _ANSWERS[told["error"]["kind"]])
        else:
            _refuse_what_is_left_out(plan, told)
            refuse_unready(plan, kernel)
            output.say(f"rehearse: a twin of {host or 'this machine'} boots")
            played = rehearse_run.rehearse(
                original, plan, text, kernel, faults=faults, qemu=qemu, report=_progress
            )
    _show(context, str(policy), host, plan, played, time.monotonic() - begun)
    return 1 if played.findings else 0


def _text(policy: Path) -> str:
    try:
        return policy.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{policy} cannot be read: {error}") from error


def _asked(policy: Path, snapshot: str) -> dict[str, Any]:
    """The policy's plan on the host itself: no twin has to boot for what is known from that.

    Raises UsageError for a policy with faults; what that host answers to it is returned as it is.
    """
    told = asked_here(snapshot, "plan", str(policy))
    error = told.get("error")
    if error and error["kind"] not in _ANSWERS:
        kind = UsageError if error["kind"] in ("usage", "policy") else KernelError
        raise kind(error["message"], hint=error["hint"])
    refusals = told.get("refusals", [])
    for row in refusals[:_MOST_TOLD]:
        output.say(f"rehearse: on that host apply refuses: {row['device']}: {row['detail']}")
    if not error and not told.get("steps") and not refusals:
        output.say("rehearse: on that host the policy holds already, or is about nothing")
    return told


def _refuse_what_is_left_out(plan: TwinPlan, told: dict[str, Any]) -> None:
    """Raises NotFound where the policy takes a device that the twin has not: what it would say of
    the policy is nothing about the host."""
    from vfiotool.lab.rehearse import taken

    lost = [one for one in taken(told) if one not in plan.addresses]
    if lost:
        why = [line for line in plan.differences if any(one in line for one in lost)]
        raise NotFound(
            f"the twin cannot have {', '.join(lost)}, which the policy takes"
            + "".join(f"; {line}" for line in why[:_MOST_TOLD]),
            hint="rehearse a policy without them; all that differs: vfiotool lab twin --plan",
            device=lost[0],
        )


def _progress(one: Done) -> None:
    from vfiotool.lab.rehearse import said

    output.say(f"rehearse: {one.act}: {one.name}: {said(one)}")


def _faults(texts: list[str]) -> dict[str, str]:
    """What each device does wrong, by its address. Raises UsageError."""
    from vfiotool.models import FAULT_NAMES

    found: dict[str, str] = {}
    for text in texts:
        device, _, name = text.partition("=")
        if name not in FAULT_NAMES:
            raise UsageError(
                f"--fault {text[:60]!r} is not DEVICE=FAULT",
                hint=f"a device's address, and one of: {', '.join(FAULT_NAMES)}",
            )
        address = (device if device.count(":") > 1 else f"0000:{device}").lower()
        if found.setdefault(address, name) != name:
            raise UsageError(f"--fault: {address} has two of them, {found[address]} and {name}")
    return found


def _snapshot_of_this_machine(stack: ExitStack) -> str:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vfiotool-rehearse-"))
    file = str(Path(folder) / "host.vfiosnap")
    words = [sys.executable, "-m", "vfiotool", "snapshot", file]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=_SNAPSHOT_LIMIT_S, check=False
    )
    if done.returncode:
        raise KernelError(f"no snapshot of this machine: {done.stderr.strip()[:300]}")
    return file


def _show(
    context: typer.Context,
    policy: str,
    host: str | None,
    plan: TwinPlan,
    played: Rehearsal,
    seconds: float,
) -> None:
    from vfiotool.lab.rehearse import said

    if wants_json(context):
        rows = [
            {
                "act": one.act,
                "name": one.name,
                "exit_code": one.exit_code,
                "seconds": one.seconds,
                "said": said(one),
            }
            for one in played.done
        ]
        output.emit(
            {
                "policy": policy,
                "host": host,
                "addresses": dict(plan.addresses),
                "commands": rows,
                "held": played.held,
                "findings": [one.as_json() for one in played.findings],
                "unlike": list(played.unlike),
                "seconds": round(seconds, 1),
            }
        )
        return
    output.write((f"{policy} on a twin of {host or 'this machine'}", "bold"))
    act = ""
    for one in played.done:
        if one.act != act:
            act = one.act
            about = f": {played.held}" if played.held and one.name == "apply" and one.act else ""
            output.write("")
            output.write((act.capitalize() + (about if act.startswith("a device") else ""), "bold"))
        if one.name != "kernel log":
            output.write(f"  {one.name:22} {one.seconds:5.1f} s  {said(one)}")
    _show_findings(played)
    output.write(f"{seconds:.0f} s in all.")


def _show_findings(played: Rehearsal) -> None:
    output.write("")
    if not played.findings:
        output.write(("On the host: applied, handed over twice, taken back as it was.", "green"))
    else:
        output.write(("On the host this would go wrong", "bold red"))
    for one in played.findings:
        output.write(f"  {one.device or 'the policy'}: {one.kind}: {one.detail}")
        output.write(f"    evidence: {one.evidence}")
        if one.next:
            output.write(f"    next: {one.next}")
    if played.unlike:
        output.write("")
        output.write(("What the twin lacks of these devices", "bold"))
        for line in played.unlike:
            output.write(f"  {line}")
