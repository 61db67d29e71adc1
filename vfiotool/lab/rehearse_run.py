"""A rehearsal, played in a twin: the acts in their order, and the faults that they need."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vfiotool.errors import KernelError, NotFound
from vfiotool.lab.channel import Kind
from vfiotool.lab.guest import Guest, GuestTimeout, waited_s
from vfiotool.lab.inside import rehearsal as inside
from vfiotool.lab.rehearse import (
    ACTS,
    Done,
    Rehearsal,
    findings,
    taken,
    translated,
    translated_json,
    unlike_for,
)
from vfiotool.lab.twin_facts import TwinHost
from vfiotool.lab.twin_plan import TwinPlan
from vfiotool.lab.twin_run import Twin, running_twin

POLICY = "/run/policy.toml"
_PART_LIMIT_S = 600.0
# A twin that waited for a processor for more than this part of a command's time was kept from it.
_BUSY_SHARE = 4
# In a twin a reset that hangs must not hang QEMU, and with it the whole guest: as from hardware,
# there is no answer but all ones.
_IN_A_TWIN = {"reset-hangs": "reset-lost"}


def refuse_faults(plan: TwinPlan, faults: Mapping[str, str]) -> None:
    """Raises NotFound for a fault of a device that no model plays in the twin."""
    played = sorted(one.original.address for one in plan.replays)
    for address in faults:
        if address not in played:
            raise NotFound(
                f"{address} is not played by a model in the twin: it can have no fault",
                hint=f"played are: {', '.join(played) or 'none'}",
            )


def unplayed(planned: Any, exit_code: int) -> Rehearsal:
    """The rehearsal of a policy that has no plan on the host: `planned` is what `plan --json` said
    of it there."""
    done = (Done(ACTS[0], "plan", exit_code, found=planned),)
    return Rehearsal(done, findings=findings(done))


def rehearse(
    host: TwinHost,
    plan: TwinPlan,
    policy: str,
    kernel: str,
    *,
    faults: Mapping[str, str] | None = None,
    qemu: bool = True,
    report: Callable[[Done], object] = lambda _: None,
) -> Rehearsal:
    """Play the policy (its text) in the twin of `host`. `faults` are what devices do wrong, by the
    host's addresses (`FAULT_NAMES`); `report` is told of each command as it ends.

    Raises what `running_twin` raises, NotFound for a fault of a device that is none of the twin's,
    KernelError.
    """
    refuse_faults(plan, faults or {})
    with running_twin(host, plan, kernel) as twin:
        return _Play(twin, plan, qemu, report).play(policy, faults or {})


class _Play:
    """The acts, in a twin that runs."""

    def __init__(
        self, twin: Twin, plan: TwinPlan, qemu: bool, report: Callable[[Done], object]
    ) -> None:
        self.report = report
        self.twin = twin
        self.plan = plan
        self.qemu = qemu
        self.back = {new: old for old, new in plan.addresses.items()}
        self.done: list[Done] = []
        self.devices: list[str] = []
        self._waited_s = self._all_waited_s()

    def _all_waited_s(self) -> tuple[float, float]:
        """The seconds that the twin has waited for a processor: its guest, and the models here."""
        return self.twin.guest.waited_s(), waited_s(os.getpid())

    def refuse_busy(self, one: Done) -> None:
        """Raises GuestTimeout where a command did not end in time since this machine did not let
        the twin run: that says nothing of the host."""
        before, self._waited_s = self._waited_s, self._all_waited_s()
        waited = max(now - then for now, then in zip(self._waited_s, before, strict=True))
        slow = one.exit_code is None and one.seconds >= inside.COMMAND_LIMIT_S
        if slow and waited > one.seconds / _BUSY_SHARE:
            raise GuestTimeout(
                f"the rehearsal broke off: {one.name} did not end in {one.seconds:.0f} s, of which "
                f"the twin waited {waited:.0f} s for a processor: this machine is too busy",
                hint="rehearse again when it has less to do",
            )

    def play(self, policy: str, faults: Mapping[str, str]) -> Rehearsal:
        guest, addresses = self.twin.guest, self.plan.addresses
        text = translated(policy, addresses).encode()
        guest.exec(["sh", "-c", f"cat > {POLICY}"], input=text)
        self.actor = _Actor(guest)
        for address, name in faults.items():
            self.twin.models[address].faults.set(_IN_A_TWIN.get(name, name))
        held = None
        self.part("as-planned", ACTS[0])
        self.devices = taken(self.of("plan").found) if self.has("plan") else []
        if self.has("start twice") and self.of("start twice").exit_code is None:
            self.part("undo", ACTS[0])
            self.lift(faults)
            self.part("after", ACTS[0])
        elif self.has("apply") and self.of("apply").exit_code == 0 and self.devices:
            # An act begins where the one before it left the host as it was.
            if self.restored():
                self.part("killed", ACTS[1])
            if self.restored():
                held = self.hold()
        return Rehearsal(
            tuple(self.done), held, unlike_for(self.devices, self.plan), findings(self.done)
        )

    def hold(self) -> str | None:
        """The last act: a device that does not come back from its reset when its VM has gone."""
        able = [one for one in self.devices if one in self.twin.models]
        able = [one for one in able if self.twin.models[one].has_reset]
        self.part("held", ACTS[2])
        if self.done[-1].exit_code:
            return None
        if not able:
            self.part("let-go", ACTS[2])
        else:
            faults = self.twin.models[able[0]].faults
            before, faults.reset = faults.reset, "lost"
            self.part("let-go", ACTS[2])
            faults.reset = before
        self.part("after", ACTS[2])
        return able[0] if able else None

    def lift(self, faults: Mapping[str, str]) -> None:
        """The faults end, so that the twin can be brought to its end."""
        for address in faults:
            self.twin.models[address].faults.reset = "none"

    def restored(self) -> bool:
        """Whether the last act ended with everything as before."""
        return self.done[-1].name == "compare" and self.done[-1].exit_code == 0

    def has(self, name: str) -> bool:
        return any(one.name == name for one in self.done)

    def of(self, name: str) -> Done:
        return next(one for one in self.done if one.name == name)

    def part(self, name: str, act: str) -> None:
        """Play a part of the rehearsal in the guest, and keep what its commands did."""
        addresses = self.plan.addresses
        told = {
            "policy": POLICY,
            "devices": [addresses.get(one, one) for one in self.devices],
            "mark": [addresses[one] for one in self.twin.models],
            "qemu": self.qemu,
        }

        def take(row: dict[str, Any]) -> None:
            one = Done(
                act,
                row["name"],
                row["exit_code"],
                row.get("seconds", 0.0),
                translated_json(row.get("json"), self.back),
                translated(row.get("text", ""), self.back),
            )
            self.refuse_busy(one)
            self.done.append(one)
            self.report(one)

        self.actor.play(name, told, take)
        for address, why in self.twin.failed.items():
            raise KernelError(
                f"the rehearsal broke off: what plays {address} in the twin failed: {why}",
                hint="this is the twin's fault, not the host's: please report it",
            )


class _Actor:
    """The process in the guest that plays the parts: it imports what the commands need once."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._number = guest.begin([str(Path(sys.prefix) / "bin/python"), "-m", inside.__name__])

    def play(
        self, name: str, told: Mapping[str, Any], take: Callable[[dict[str, Any]], object]
    ) -> None:
        """Play a part, and hand on the report of each of its commands as it comes.

        Raises KernelError where the process ends before the part does.
        """
        rest, noise, ended = b"", bytearray(), False

        def split(kind: Kind, data: bytes) -> None:
            nonlocal rest, ended
            if kind is not Kind.OUTPUT:
                noise.extend(data)
                return
            *lines, rest = (rest + data).split(b"\n")
            for row in map(json.loads, lines):
                if "end" in row:
                    ended = True
                else:
                    take(row)

        line = json.dumps({**told, "part": name}).encode() + b"\n"
        code = self._guest.tell(self._number, line, split, lambda: ended, _PART_LIMIT_S)
        if code is not None:
            raise KernelError(f"the rehearsal broke off: {noise.decode(errors='replace')[-600:]}")
