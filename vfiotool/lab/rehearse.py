"""What a rehearsal found, from what its commands did. Pure: reports in, findings out.

A rehearsal has three acts: the policy's life as planned, a change that is killed on the way, and a
device that does not let go. In the twin addresses can be others than on the host: the policy is
translated on its way in, and all that commands say on its way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfiotool.lab.twin_plan import TwinPlan

ACTS = ("as planned", "killed in mid-change", "a device that does not let go")
_ADDRESS = re.compile(r"(?<![0-9a-f:.])(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7](?!\w)")
_NOT_FOUND, _REFUSED, _STUCK = 3, 4, 6


@dataclass(frozen=True, slots=True)
class Done:
    """What one command of a rehearsal did. `exit_code` is None where it did not end in time;
    `found` is the JSON that it printed, `text` the end of what it said to people."""

    act: str
    name: str
    exit_code: int | None
    seconds: float = 0.0
    found: Any = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class RehearsalFinding:
    """What would go wrong on the host: `kind` as docs/twin.md lists them, `next` what to do."""

    kind: str
    device: str | None
    detail: str
    evidence: str
    next: str

    def as_json(self) -> dict[str, str | None]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsal that was played: its commands, what they show, the device of the last act."""

    done: tuple[Done, ...]
    held: str | None = None
    unlike: tuple[str, ...] = ()
    findings: tuple[RehearsalFinding, ...] = field(default=())


def translated(text: str, addresses: Mapping[str, str]) -> str:
    """`text` with each PCI address that `addresses` has replaced; short ones stay short."""

    def other(match: re.Match[str]) -> str:
        short = match[0].count(":") == 1
        new = addresses.get(f"0000:{match[0]}" if short else match[0])
        if new is None:
            return match[0]
        return new.removeprefix("0000:") if short else new

    return _ADDRESS.sub(other, text)


def translated_json(found: Any, addresses: Mapping[str, str]) -> Any:
    """A JSON value with the addresses in all its texts replaced."""
    if isinstance(found, str):
        return translated(found, addresses)
    if isinstance(found, list):
        return [translated_json(one, addresses) for one in found]
    if isinstance(found, dict):
        return {
            translated(key, addresses): translated_json(one, addresses)
            for key, one in found.items()
        }
    return found


def taken(plan: Any) -> list[str]:
    """The functions that a plan binds to a driver for a VM, by what `plan --json` printed."""
    steps = plan.get("steps", []) if isinstance(plan, dict) else []
    return [
        step["target"]
        for step in steps
        if step["verb"] == "bind-driver" and _ADDRESS.fullmatch(step["target"])
    ]


def unlike_for(devices: Iterable[str], plan: TwinPlan) -> tuple[str, ...]:
    """What the twin lacks of the devices that a policy takes."""
    wanted = tuple(devices)
    return tuple(line for line in plan.differences if any(one in line for one in wanted))


def findings(done: Sequence[Done]) -> tuple[RehearsalFinding, ...]:
    """What the host would see go wrong; nothing of the last act, where a fault was made, but that
    its end is not as its beginning."""
    found: list[RehearsalFinding] = []
    for one in done:
        decide = _DECIDERS.get(one.name, _failure)
        if one.act != ACTS[2] or one.name == "compare":
            found += decide(one)
    if any(one.kind == "reset-hangs" for one in found):
        # What fails after that fails because of it.
        found = [one for one in found if one.kind not in ("stuck", "failed")]
    logs = [one for one in done if one.name == "kernel log" and one.act == ACTS[0]]
    return tuple(_with_log(one, logs) for one in dict.fromkeys(found))


def _with_log(finding: RehearsalFinding, logs: Sequence[Done]) -> RehearsalFinding:
    """Which device did not answer is in the kernel's log."""
    if finding.kind != "reset-hangs":
        return finding
    lines = [line for one in logs for line in one.text.splitlines()]
    names = list(dict.fromkeys(match for line in lines for match in _ADDRESS.findall(line)))
    return RehearsalFinding(
        finding.kind,
        names[0] if names else None,
        finding.detail,
        lines[-1].strip() if lines else finding.evidence,
        finding.next,
    )


def _message(one: Done) -> str:
    if isinstance(one.found, dict) and isinstance(one.found.get("error"), dict):
        return str(one.found["error"]["message"])
    return one.text.strip().splitlines()[-1] if one.text.strip() else ""


def _hint(one: Done, otherwise: str) -> str:
    if isinstance(one.found, dict) and isinstance(one.found.get("error"), dict):
        return str(one.found["error"].get("hint") or otherwise)
    return otherwise


def _failure(one: Done) -> list[RehearsalFinding]:
    if one.exit_code == 0:
        return []
    evidence = f"{one.name}: exit code {one.exit_code}"
    if one.exit_code is None:
        evidence = f"{one.name}: did not end in {one.seconds:g} s"
    kind = "stuck" if one.exit_code in (None, _STUCK) else "failed"
    device = None
    if isinstance(one.found, dict) and isinstance(one.found.get("error"), dict):
        device = one.found["error"].get("device")
    return [RehearsalFinding(kind, device, _message(one), evidence, _hint(one, ""))]


def _plan(one: Done) -> list[RehearsalFinding]:
    if one.exit_code == 0:
        return []
    if one.exit_code == _REFUSED and isinstance(one.found, dict):
        return [
            RehearsalFinding(
                "refused",
                row["device"],
                f"apply refuses: {row['detail']}",
                row["evidence"],
                f"vfiotool why {row['device']}" if row["device"] else "vfiotool plan POLICY",
            )
            for row in one.found.get("refusals", [])
        ]
    if one.exit_code == _NOT_FOUND:
        return [
            RehearsalFinding(
                "no-match", None, _message(one), "plan: exit code 3", _hint(one, "vfiotool devices")
            )
        ]
    return _failure(one)


def _apply(one: Done) -> list[RehearsalFinding]:
    # What is refused is in the plan already, reason by reason.
    return [] if one.exit_code == _REFUSED else _failure(one)


def _status(one: Done) -> list[RehearsalFinding]:
    if one.exit_code == 0:
        return []
    return [
        RehearsalFinding(
            "not-in-sync",
            None,
            _message(one) or "the policy does not hold once it is applied",
            f"status: exit code {one.exit_code}",
            _hint(one, "vfiotool status POLICY"),
        )
    ]


def _status_after_a_reboot(one: Done) -> list[RehearsalFinding]:
    if one.exit_code == 0:
        return []
    return [
        RehearsalFinding(
            "serial-lost",
            None,
            "once bound the device does not tell its serial number: after a reboot that binds it "
            f"early, the policy does not match it ({_message(one)})",
            f"status, with /run/vfiotool empty: exit code {one.exit_code}",
            "match by address, slot or path, or let boot enable bind it after its host driver",
        )
    ]


def _vm_check(one: Done) -> list[RehearsalFinding]:
    rows = one.found.get("findings", []) if isinstance(one.found, dict) else []
    blockers = [row for row in rows if row["severity"] == "blocker"]
    if not blockers:
        return _failure(one)
    return [
        RehearsalFinding(
            "not-ready",
            row["device"],
            row["detail"],
            row["evidence"] or "vm check",
            row["next"] or row["remedy"] or "",
        )
        for row in blockers
    ]


def _start(one: Done) -> list[RehearsalFinding]:
    if one.exit_code is None:
        return [
            RehearsalFinding(
                "reset-hangs",
                None,
                "the device does not come back from its reset: a VM's start waits for it, and so "
                "does everything that would take it back",
                f"the start did not end in {one.seconds:g} s",
                "vfiotool show DEVICE lists its reset methods; try another in reset_method",
            )
        ]
    if one.exit_code:
        found = one.found if isinstance(one.found, dict) else {}
        detail = str(found.get("error") or _message(one))
        return [
            RehearsalFinding(
                "second-start",
                found.get("device"),
                f"it cannot be opened as a VM does: {detail}",
                f"exit code {one.exit_code}",
                "vfiotool vm check DEVICE",
            )
        ]
    return [
        RehearsalFinding(
            "second-start",
            device,
            "it is not reset between two starts: the second VM finds what the first one left",
            "a value that was written at the first start was read at the second",
            f"reboot the host between two VMs, or find a reset that works: vfiotool show {device}",
        )
        for device in (one.found or {}).get("kept", [])
    ]


def _qemu(one: Done) -> list[RehearsalFinding]:
    # No QEMU in the guest, or one that takes too long here, is nothing about the host.
    return [] if one.exit_code in (127, None) else _failure(one)


def _compare(one: Done) -> list[RehearsalFinding]:
    changed = one.found if isinstance(one.found, dict) else {}
    return [
        RehearsalFinding(
            "not-restored",
            device,
            f"after {one.act} it is not as before: {was} before, {now} now",
            "driver, override and virtual functions in sysfs",
            "vfiotool recover",
        )
        for device, (was, now) in changed.items()
    ]


def _nothing(_one: Done) -> list[RehearsalFinding]:
    return []


_DECIDERS = {
    "plan": _plan,
    "apply": _apply,
    "apply, killed": _nothing,
    "status": _status,
    "status after a reboot": _status_after_a_reboot,
    "vm check": _vm_check,
    "start twice": _start,
    "qemu": _qemu,
    "compare": _compare,
    "kernel log": _nothing,
}


def said(one: Done) -> str:
    """One line of what a command did, for the page."""
    found = one.found if isinstance(one.found, dict) else {}
    if one.exit_code is None:
        return f"did not end in {one.seconds:g} s"
    if one.name == "compare":
        return "as before" if not found else f"{len(found)} functions are not as before"
    if one.name == "apply, killed":
        if one.exit_code > 0:
            return f"failed with exit code {one.exit_code}"
        return "killed" if one.exit_code else "over before it could be killed"
    if "error" in found:
        return _message(one)
    if one.name == "start twice":
        kept = found.get("kept", [])
        return f"kept its state: {', '.join(kept)}" if kept else "opened, let go, opened again"
    if one.name == "plan":
        refusals = len(found.get("refusals", []))
        steps = f"{len(found.get('steps', []))} steps"
        return f"{steps}, refused for {refusals} reasons" if refusals else steps
    if one.name == "recover":
        rows = [f"{row['title']}: {row['result']}" for row in found.get("recovered", [])]
        return "; ".join(rows) or "nothing to recover"
    if one.exit_code == 0:
        return "done"
    return _message(one) or f"exit code {one.exit_code}"
