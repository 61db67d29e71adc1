"""Is a device ready to be opened by a virtual machine, and what would break the machine's start.

`read_checks` and `read_machine` (facts.py) read; everything here and in memory.py and card.py
decides on their frozen values, so that a recorded host is judged as the running one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vfiotool.devices.inventory import Inventory
from vfiotool.errors import Refused
from vfiotool.host.distribution import read_distribution
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_IOMMU, SYS_IOMMU_GROUPS, SYS_PCI_DEVICES, SYS_VFIO_GROUPS
from vfiotool.usage.blocker import KINDS, Blocker
from vfiotool.usage.case import Case
from vfiotool.usage.verdict import device_notes, explain
from vfiotool.vm.card import judge_card, told_of
from vfiotool.vm.facts import MachineFacts, ReadyCheck, read_checks, read_machine
from vfiotool.vm.finding import BLOCKER, PreflightFinding, WantedGuest, finding
from vfiotool.vm.handed import Handed
from vfiotool.vm.machine import Q35
from vfiotool.vm.memory import judge_memory

_ORDER = {"blocker": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, slots=True)
class Preflight:
    """What is to be said of devices before a virtual machine opens them. `notes` are what to know
    of those that keep no VM from opening them: that one cannot be reset."""

    findings: tuple[PreflightFinding, ...]
    notes: tuple[str, ...]


def examine(
    host: Host,
    inventory: Inventory,
    devices: Sequence[Handed],
    wanted: WantedGuest,
    vf_token: str | None = None,
) -> Preflight:
    """Everything that `vm check` says of these devices in one virtual machine. Reads only, and
    each device's configuration space once: each word of it is a question to the device."""
    machine = read_machine(host, users=wanted.iommufd)
    checks = read_checks(host, inventory, devices)
    found = judge(machine, checks, wanted, vf_token)
    found += judge_memory(machine, checks, wanted, read_distribution(host))
    notes = [note for one in checks if one.case is not None for note in device_notes(one.case)]
    return Preflight(tuple(sorted(found, key=lambda item: _ORDER[item.severity])), tuple(notes))


def check(
    host: Host,
    inventory: Inventory,
    devices: Sequence[Handed],
    wanted: WantedGuest,
    vf_token: str | None = None,
) -> tuple[PreflightFinding, ...]:
    """The findings of `examine`."""
    return examine(host, inventory, devices, wanted, vf_token).findings


def judge(
    machine: MachineFacts,
    checks: Sequence[ReadyCheck],
    wanted: WantedGuest,
    vf_token: str | None = None,
) -> list[PreflightFinding]:
    """The findings of each device, from frozen values alone."""
    chosen = told_of(checks)
    found: list[PreflightFinding] = []
    for one in checks:
        if one.case is not None:
            found += judge_handing(one.case, one.device, vf_token, missing_node=one.missing_node)
        found += judge_card(one, chosen, wanted, machine.guest)
    if wanted.iommufd and not machine.iommufd:
        detail = "the host has no iommufd"
        remedy = "modprobe iommufd (a kernel with CONFIG_IOMMUFD); or leave --iommufd out"
        names = ", ".join(one.device.name for one in checks)
        found.append(
            finding(names, "no-iommufd", BLOCKER, detail, f"{DEV_IOMMU} is absent", remedy)
        )
    return found


def findings(
    host: Host, inventory: Inventory, device: Handed, vf_token: str | None = None
) -> tuple[PreflightFinding, ...]:
    """What keeps a VM from opening the device now; empty if nothing does. Reads only."""
    return findings_of(host, inventory, [device], vf_token)


def findings_of(
    host: Host, inventory: Inventory, devices: Sequence[Handed], vf_token: str | None = None
) -> tuple[PreflightFinding, ...]:
    """As `findings`, of devices in their order, by one look at the host's users of devices; no
    configuration space is read."""
    found: list[PreflightFinding] = []
    for one in read_checks(host, inventory, devices, configs=False):
        if one.case is None:
            judged = judge_card(one, {one.device.name}, WantedGuest(), Q35)
            found += [item for item in judged if item.severity == BLOCKER]
        else:
            found += judge_handing(one.case, one.device, vf_token, missing_node=one.missing_node)
    return tuple(found)


def judge_handing(
    case: Case, device: Handed, vf_token: str | None = None, *, missing_node: str | None = None
) -> tuple[PreflightFinding, ...]:
    """What keeps a VM from opening the device, from `why`'s own blockers and what else it needs.

    `missing_node` is the device node that is not there though it should be.
    """
    verdict = explain(case)
    # The same commands as why gives: none where none leads to the goal.
    why = "vfiotool why {}"
    binds = [line for line in verdict.next if line.startswith(f"vfiotool bind {device.name}")]
    first = bool(binds) and verdict.next[0] == binds[0]
    base = f"{SYS_PCI_DEVICES}/{device.name}"
    found = []
    if device.iommu_group is None:
        evidence = f"{base}/iommu_group is absent"
        found.append(_finding(device, "no-iommu", "it is in no IOMMU group", why, evidence))
    opens = device.is_mdev or (device.function is not None and device.function.on_vfio)
    if not opens:
        driver = device.function.driver if device.function else None
        text = f"it is on {driver}, not on a VFIO driver" if driver else "it is on no driver yet"
        command = "vfiotool bind {}" if first else why
        found.append(_finding(device, "not-bound", text, command, f"{base}/driver"))
    if device.guard not in (None, device.name) and vf_token is None:
        text = f"its physical function {device.guard} is on a VFIO driver: it opens only with the "
        text += "VF token which the program that drives that one has set"
        command = "vfiotool vm qemu {} --vf-token UUID"
        found.append(_finding(device, "vf-token", text, command, f"{base}/physfn/driver"))
    group = case.group
    if group is not None and not group.viable:
        others = [m.address for m in group.devices if m.role == "host" and m.address != device.name]
        if others:
            text = f"group {group.id} is not viable: {', '.join(others)} on host drivers"
            command, evidence = binds[0] if binds else why, f"{SYS_IOMMU_GROUPS}/{group.id}/devices"
            found.append(_finding(device, "group-not-viable", text, command, evidence))
    told = {"group-member", *(one.kind for one in found)}
    found += [
        _blocked(device, blocker, opens) for blocker in verdict.blockers if blocker.kind not in told
    ]
    if opens and missing_node is not None:
        found.append(_no_node(device, missing_node))
    return tuple(found)


def _no_node(device: Handed, node: str) -> PreflightFinding:
    """A node that was removed, or that a container was not given; the kernel knows its numbers."""
    numbers = "/".join((SYS_VFIO_GROUPS, str(device.iommu_group), "dev"))
    command = f"mknod -m 600 {node} c $(tr : ' ' < {numbers})"
    return _finding(device, "no-node", f"{node} does not exist", command, node)


def _blocked(device: Handed, blocker: Blocker, opens: bool) -> PreflightFinding:
    detail = blocker.detail
    if opens and KINDS[blocker.kind].holds and blocker.kind != "unseen":
        command = f"ps -fp {_pid(blocker.evidence)}"
        return finding(device.name, "held", BLOCKER, detail, blocker.evidence, command)
    if blocker.device != device.name:
        detail = f"{blocker.device}: {detail}"
    return _finding(device, blocker.kind, detail, "vfiotool why {}", blocker.evidence)


def require_ready(
    host: Host, inventory: Inventory, devices: list[Handed], vf_token: str | None = None
) -> None:
    """Raise Refused with the first finding of the first device that is not ready."""
    for found in findings_of(host, inventory, devices, vf_token):
        raise Refused(
            f"{found.device} cannot be handed to a VM yet: {found.detail}",
            hint=found.next,
            device=found.device,
        )


def _finding(
    device: Handed, kind: str, detail: str, command: str, evidence: str = ""
) -> PreflightFinding:
    line = command.format(device.name)
    return finding(device.name, kind, BLOCKER, detail, evidence, line)


def _pid(evidence: str) -> str:
    words = evidence.split()
    return words[words.index("pid") + 1] if "pid" in words[:-1] else "PID"
