"""`lab twin SNAPSHOT`: a host's twin as a guest, compared with the host, or to run a command in."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import wants_json
from vfiotool.errors import KernelError, NotFound, TimedOut, UsageError
from vfiotool.lab.kernels import catalogue as kernels

if TYPE_CHECKING:
    from vfiotool.lab.guest import Guest
    from vfiotool.lab.twin_compare import TwinDifference
    from vfiotool.lab.twin_facts import TwinHost
    from vfiotool.lab.twin_plan import StandIn, TwinPlan

SnapshotArgument = Annotated[
    str,
    typer.Argument(
        metavar="SNAPSHOT",
        help="A snapshot file, or a folder laid out like /.",
        autocompletion=candidates.files,
    ),
]
PlanOption = Annotated[
    bool, typer.Option("--plan", help="Say what the twin would be, and start nothing.")
]
KernelOption = Annotated[
    str,
    typer.Option(
        "--kernel",
        metavar="NAME",
        help="A name that `lab kernels` lists, or a bzImage.",
        autocompletion=candidates.kernels,
    ),
]
TimeoutOption = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="End the command after this time.")
]
_NVME, _NETWORK, _SATA = "0108", "0200", "0106"
# What is acted out in the twin: by a mount, or by the default route.
_USES = ("mounted", "swap", "storage-member", "route", "bridge-or-bond")
# Endpoints of these classes can be wanted for a VM: the policy that is compared takes them.
_NOT_WANTED = ("05", "06", "08")
_FREE = ("vfio-pci", "pci-stub")
_ASK_LIMIT_S = 120.0
_POLICY = "/run/everything.toml"


def twin(
    context: typer.Context,
    snapshot: SnapshotArgument,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND…", help="What to run in the twin.")
    ] = None,
    plan: PlanOption = False,
    kernel: KernelOption = kernels.DEFAULT,
    timeout: TimeoutOption = 600.0,
) -> int:
    """Boot a guest made like the host in SNAPSHOT; compare it with the host, or run COMMAND in it.

    Endpoints are played from their configuration spaces, ports and switches are QEMU's. What the
    twin cannot have is said. Compared are groups, what `why` says of each device, and the plan of
    a policy that takes all of them. Exit code 1: they differ, and no lack of the twin explains it.
    """
    from vfiotool.lab.twin_compare import is_explained
    from vfiotool.lab.twin_run import refuse_unready, running_twin

    # What follows the snapshot's name is the command's, and click leaves it as it is.
    words = command[1:] if command and command[0] == "--" else command
    if words and words is command and words[0].startswith("-"):
        raise UsageError(
            f"{words[0][:40]!r} is not a command: options stand before SNAPSHOT",
            hint="vfiotool lab twin [OPTIONS] SNAPSHOT -- COMMAND",
        )
    host, made = planned(snapshot)
    if plan:
        _show_plan(context, made)
        return 0
    refuse_unready(made, kernel)
    for lack in made.lacks:
        output.say(f"twin: {lack.kind}: {lack.line}")
    with running_twin(host, made, kernel) as running:
        if words:
            return _run(running.guest, words, timeout)
        found = compare_with(running.guest, snapshot, made)
    told = [one for one in found if not is_explained(one, made.lacks)]
    _show_comparison(context, made, found, told)
    return 1 if told else 0


def _run(guest: Guest, command: list[str], timeout: float) -> int:
    from vfiotool.lab.channel import Kind

    def forward(kind: Kind, data: bytes) -> None:
        output.forward(data, error=kind is not Kind.OUTPUT)

    return guest.exec(command, timeout_s=timeout, sink=forward).exit_code


def planned(snapshot: str) -> tuple[TwinHost, TwinPlan]:
    """The host in a snapshot, and the twin that is planned for it."""
    from vfiotool.lab.twin_facts import read_twin_host
    from vfiotool.lab.twin_plan import plan_twin

    host = read_twin_host(snapshot)
    if not host.functions:
        raise NotFound(f"{snapshot}: no PCI functions, and so nothing that a twin is made of")
    devices = asked_here(snapshot, "devices")
    if "devices" not in devices:
        raise UsageError(f"{snapshot}: {devices['error']['message']}")
    return host, plan_twin(host, stand_ins_of(devices), in_use_of(devices))


def stand_ins_of(devices: dict[str, Any]) -> dict[str, StandIn]:
    """Which endpoints a driver has to work on, by what `devices --json` says: NVMe disks, network
    cards with virtual functions, and what else the host uses as a disk or a network card."""
    used = in_use_of(devices)
    slots = Counter(one["address"][:-2] for one in devices["devices"] if not one["physfn"])
    found: dict[str, StandIn] = {}
    for one in devices["devices"]:
        address, code = one["address"], one["class"]
        if code.startswith(_NVME) and one["driver"] == "nvme":
            found[address] = "nvme"
        elif code.startswith(_NETWORK) and one["sriov"] and one["driver"] not in _FREE:
            # Behind igb's first function Linux looks for no other (alternative routing-ID).
            if slots[address[:-2]] == 1:
                found[address] = "sriov"
        elif code.startswith(_NETWORK) and one["interfaces"] and address in used:
            found[address] = "network"
        elif code.startswith(_SATA) and one["disks"] and address in used:
            found[address] = "sata"
    return found


def in_use_of(devices: dict[str, Any]) -> frozenset[str]:
    """The devices that the host uses themselves, not only others of their groups."""
    return frozenset(
        one["address"]
        for one in devices["devices"]
        for blocker in one["blockers"]
        if blocker["device"] == one["address"] and blocker["kind"] in _USES
    )


def compare_with(guest: Guest, snapshot: str, plan: TwinPlan) -> list[TwinDifference]:
    """Where groups, verdicts and the plan of a policy for everything differ from the host's."""
    from vfiotool.lab import twin_compare as compare

    places = plan.addresses
    devices = asked_here(snapshot, "devices")["devices"]
    # Without an IOMMU both say that there are none, which is an error.
    here, there = asked_here(snapshot, "groups"), _asked_there(guest, "groups")
    found = compare.compare_groups(here.get("groups", []), there.get("groups", []), places)
    found += compare.compare_verdicts(devices, _asked_there(guest, "devices")["devices"], places)
    wanted = [one["address"] for one in devices if _is_wanted(one) and one["address"] in places]
    if wanted:
        script = f"cat > {_POLICY}"
        policy = _policy_for(places[one] for one in wanted)
        guest.exec(["sh", "-c", script], input=policy.encode())
        with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
            file.write(_policy_for(wanted))
            file.flush()
            ours = asked_here(snapshot, "plan", file.name)
        found += compare.compare_plans(ours, _asked_there(guest, "plan", _POLICY), places)
    return found


def _is_wanted(device: dict[str, Any]) -> bool:
    return device["verdict"] is not None and not device["class"].startswith(_NOT_WANTED)


def _policy_for(addresses: Iterable[str]) -> str:
    rules = [f'[[device]]\nmatch = {{ address = "{one}" }}\ngroup = "whole"\n' for one in addresses]
    return "\n".join(["version = 1", *rules])


def _asked_there(guest: Guest, *command: str) -> dict[str, Any]:
    """What a reading command says in the twin, as JSON."""
    done = guest.exec([*_program(), *command, "--json"], timeout_s=_ASK_LIMIT_S)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.decode(errors="replace")
        raise KernelError(f"{command[0]} failed in the twin: {said.strip()[:300]}") from error
    return found


def _program() -> list[str]:
    return [str(Path(sys.prefix) / "bin/python"), "-m", "vfiotool"]


def asked_here(snapshot: str, *command: str) -> dict[str, Any]:
    """What a reading command says of the snapshot, as JSON."""
    words = [sys.executable, "-m", "vfiotool", "--root", snapshot, *command, "--json"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_ASK_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimedOut(
            f"{command[0]} of {snapshot} did not end in {_ASK_LIMIT_S:g} s", errno_name="ETIMEDOUT"
        ) from error
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise KernelError(
            f"{command[0]} of {snapshot} failed: {done.stderr.strip()[:300]}"
        ) from error
    return found


def _show_plan(context: typer.Context, plan: TwinPlan) -> None:
    if wants_json(context):
        _emit(plan, [], [])
        return
    found = sorted(plan.addresses.items())
    rows = [[old, new, plan.stand_ins.get(old, "")] for old, new in found]
    output.table(("HOST", "TWIN", "STAND-IN"), rows)
    for lack in plan.lacks:
        output.write(f"differs: {lack.kind}: {lack.line}")


def _emit(plan: TwinPlan, found: list[TwinDifference], told: list[TwinDifference]) -> None:
    rows = [
        {
            "device": one.device,
            "what": one.what,
            "host": one.original,
            "twin": one.twin,
            "explained": one not in told,
        }
        for one in found
    ]
    output.emit(
        {
            "addresses": dict(plan.addresses),
            "stand_ins": dict(plan.stand_ins),
            "unlike": list(plan.differences),
            "differences": rows,
        }
    )


def _show_comparison(
    context: typer.Context,
    plan: TwinPlan,
    found: list[TwinDifference],
    told: list[TwinDifference],
) -> None:
    if wants_json(context):
        _emit(plan, found, told)
        return
    for one in found:
        output.write(("explained: " if one not in told else "differs: ") + one.line())
    alike = len(plan.addresses) - len({one.device for one in found})
    output.write(
        f"{alike} of {len(plan.addresses)} functions have the same group, verdict and plan "
        "as on the host"
    )
