"""What the installed units call: apply the policy to what is there, and report what is absent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vfiotool.boot.places import SERVICE
from vfiotool.boot.texts import STARTED
from vfiotool.change.apply import change
from vfiotool.change.folder import Folder
from vfiotool.change.journal import RUN_FOLDER, Journal
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.registry import steps_as_json
from vfiotool.errors import VfiotoolError
from vfiotool.host.child import CALLOUT_ENVIRONMENT
from vfiotool.host.clock import Clock
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_VDPA_DEVICES
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.model import Policy
from vfiotool.policy.plan import Plan, plan_policy

RECORD = "boot.json"
SYSTEMD_RUNS = "/run/systemd/system"
# While udev handles events, drivers still come and make devices (systemd-udevd's own mark).
UDEV_QUEUE = "/run/udev/queue"
_IDLE_S = 2.0
_POLL_S = 0.25


@dataclass(frozen=True)
class BootRun:
    """What one run did: its steps, and the rules whose devices were absent, as text."""

    steps: tuple[Step, ...]
    absent: tuple[str, ...]
    waited_s: float

    def as_json(self) -> dict[str, object]:
        return {
            "steps": steps_as_json(self.steps),
            "absent": list(self.absent),
            "waited_s": round(self.waited_s, 3),
        }


def plan_present(host: Host, policy: Policy, journal: Journal | None) -> Plan:
    """The policy's plan for what is there now; a kernel without vDPA lacks those devices only."""
    absent: tuple[str, ...] = ()
    if policy.vdpas and not host.isdir(SYS_VDPA_DEVICES):
        absent = tuple(
            f"{policy.name}:{rule.place[0]}: [[vdpa]] {rule.name}: no vDPA on this host (yet)"
            for rule in policy.vdpas
        )
        policy = replace(policy, vdpas=())
    plan = plan_policy(policy, read_policy_facts(host, policy, journal), absent_ok=True)
    return Plan(plan.steps, (*plan.absent, *absent))


def wait_for_devices(
    absent: Callable[[], bool],
    timeout_s: float,
    *,
    queue: str = UDEV_QUEUE,
    idle_s: float = _IDLE_S,
    clock: Clock | None = None,
) -> float:
    """Wait until nothing is absent, udev has been idle for `idle_s`, or `timeout_s` has passed.

    Returns the seconds waited. Nothing is waited for when everything is there at once.
    """
    clock = clock or Clock()
    begun = clock.monotonic()
    busy_at = begun
    while absent():
        now = clock.monotonic()
        if os.path.exists(queue):
            busy_at = now
        if now - begun >= timeout_s or now - busy_at >= idle_s:
            break
        clock.sleep(_POLL_S)
    return clock.monotonic() - begun


def run_policy(
    host: Host,
    policy: Policy,
    *,
    wait_s: float = 0.0,
    timeout_s: float = 30.0,
    run_folder: str = RUN_FOLDER,
    queue: str = UDEV_QUEUE,
) -> BootRun:
    """Apply the policy to the devices that are there; a second run finds nothing to do.

    `wait_s` bounds the waiting for absent devices, `timeout_s` each write. The outcome is kept for
    `boot status`. Raises what `change` raises, with the host as it was before.
    """
    journal = Journal(host, run_folder)
    _mark_started(run_folder)
    absent: tuple[str, ...] = ()

    def plan() -> tuple[Step, ...]:
        nonlocal absent
        found = plan_present(host, policy, journal)
        absent = found.absent
        return found.steps

    def lacking() -> bool:
        plan()
        return bool(absent)

    try:
        waited = wait_for_devices(lacking, wait_s, queue=queue, clock=host.clock)
        title = f"boot {policy.name}"
        outcome = change(host, journal, title, plan, timeout_s=timeout_s)
    except VfiotoolError as error:
        _record(run_folder, {"error": error.as_json()["error"], "absent": list(absent)})
        raise
    done = BootRun(outcome.steps, absent, waited)
    _record(run_folder, {"error": None, **done.as_json()})
    return done


def _mark_started(run_folder: str) -> None:
    """Before the devices are looked at: what appears later starts a unit of its own."""
    folder = Folder(run_folder)
    try:
        folder.replace(STARTED.rpartition("/")[2], b"")
    finally:
        folder.close()


def _record(run_folder: str, outcome: dict[str, Any]) -> None:
    folder = Folder(run_folder)
    try:
        text = json.dumps({"at": time.time(), **outcome}, indent=1)
        folder.replace(RECORD, text.encode())
    finally:
        folder.close()


def read_record(run_folder: str = RUN_FOLDER) -> dict[str, Any] | None:
    """The outcome of this boot's last run, or None if there was none (or it cannot be read)."""
    if not os.path.isdir(run_folder):
        return None
    with contextlib.suppress(VfiotoolError, OSError, ValueError, RecursionError):
        folder = Folder(run_folder)
        try:
            data = folder.read(RECORD)
        finally:
            folder.close()
        found = None if data is None else json.loads(data)
        return found if isinstance(found, dict) else None
    return None


def reload_managers() -> list[str]:
    """Have systemd and udev read their files again; returns the commands that failed.

    Only on a machine that systemd runs; elsewhere there is nobody to tell.
    """
    if not os.path.isdir(SYSTEMD_RUNS):
        return []
    commands = (["systemctl", "daemon-reload"], ["udevadm", "control", "--reload"])
    return [" ".join(command) for command in commands if _output_of(command, 60) is None]


def unit_state() -> str | None:
    """systemd's word on the boot unit (`active`, `failed`, …), None where there is no systemd."""
    if not os.path.isdir(SYSTEMD_RUNS):
        return None
    return (
        _output_of(["systemctl", "show", "--property=ActiveState", "--value", SERVICE], 20) or None
    )


def _output_of(command: list[str], timeout_s: float) -> str | None:
    """What a program printed; None if it failed or took too long."""
    try:
        done = subprocess.run(
            command,
            env=CALLOUT_ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()
