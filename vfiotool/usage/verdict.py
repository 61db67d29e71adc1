"""Whether a device can be passed through, why not, and what to type next.

The questions, in the kernel's order: does an IOMMU translate for it, can a VFIO driver take it,
is its group viable (Documentation/driver-api/vfio.rst), may its group be assigned
(Documentation/ABI/testing/sysfs-kernel-iommu_groups: reserved_regions), and, before all, does
the host itself use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vfiotool.devices.acs import reasons
from vfiotool.devices.iommu import IommuGroup, group_as_json
from vfiotool.devices.pci import BRIDGE_CLASSES, PciFunction
from vfiotool.devices.vgpu import Vgpu, type_path
from vfiotool.host.paths import (
    SYS_IOMMU,
    SYS_IOMMU_GROUPS,
    SYS_PCI_DEVICES,
    SYS_PCI_DRIVERS,
)
from vfiotool.usage.blocker import Blocker
from vfiotool.usage.case import Case, HostFacts
from vfiotool.usage.remedies import advise

# The three words of a device's verdict: a virtual machine can open it now; nothing stands against
# it and `bind` makes it ready; the blockers say why not.
READY = "ready"
AVAILABLE = "available"
BLOCKED = "blocked"

# drivers/vfio/pci/vfio_pci.c, vfio_pci_dev_in_denylist: known to be unsafe to assign.
_DENIED = {
    f"8086:{device}"
    for device in (
        *("0435", "0443", "19e2", "19e3", "37c8", "37c9"),
        *("0b25", "0cfe"),
    )
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of `why`. `word` is READY, AVAILABLE or BLOCKED.

    `next`: commands to type in this order; `warnings`: what the host cannot do without; `notes`:
    what to know.
    """

    address: str
    passable: bool
    word: str
    group: IommuGroup | None
    blockers: tuple[Blocker, ...]
    next: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The contract's object of `why`, with `notes` and `warnings`."""
        return {
            "address": self.address,
            "passable": self.passable,
            "verdict": self.word,
            "group": None if self.group is None else group_as_json(self.group),
            "blockers": [blocker.as_json() for blocker in self.blockers],
            "next": list(self.next),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def judge(case: Case) -> tuple[Blocker, ...]:
    """Everything that stands between a device and a virtual machine, each thing once."""
    found = list(case.usages[case.name].blockers)
    if case.function is None:
        return tuple(dict.fromkeys([*found, *_mdev_blockers(case)]))
    function, group = case.function, case.group
    found += _iommu_blockers(case, function)
    found += _driver_blockers(case.facts, function)
    for member in _other_members(case.name, group):
        found.append(_group_member(*member, None if group is None else group.id))
        found += case.usages[member[0]].blockers
    return tuple(dict.fromkeys(found)) if len(found) > 1 else tuple(found)


def word_of(case: Case, blockers: tuple[Blocker, ...]) -> str:
    """`ready`, `available` or `blocked`: the one place that decides which.

    `blockers` are `judge`'s of the same case.
    """
    if blockers:
        return BLOCKED
    viable = case.group is not None and case.group.viable
    opens = case.function.on_vfio if case.function is not None else _mdev_driver(case) is not None
    return READY if opens and viable else AVAILABLE


def explain(case: Case) -> Verdict:
    """The whole answer of `why`: what stands in the way, and what to type next."""
    found = judge(case)
    usage = case.usages[case.name]
    notes = [f"not seen: {text}" for text in usage.unknown]
    notes += reasons(case.mergers)
    if case.function is not None and case.facts.lockdown is not None:
        # Nothing in VFIO asks for it (security/security.c, LOCKDOWN_PCI_ACCESS's users).
        mode = case.facts.lockdown
        notes.append(f"the kernel is locked down ({mode}), which does not stop VFIO")
    advice = advise(case, found)
    if any(step.startswith("vfiotool vm ") for step in advice.steps):
        notes += device_notes(case)
    steps = advice.steps
    if not found and case.vgpu is not None and not case.vgpu.current:
        steps = _vgpu_steps(case, case.vgpu)
    return Verdict(
        address=case.name,
        passable=not found,
        word=word_of(case, found),
        group=case.group,
        blockers=found,
        next=steps,
        notes=tuple(dict.fromkeys((*advice.notes, *notes))),
        warnings=advice.warnings,
    )


def _vgpu_steps(case: Case, vgpu: Vgpu) -> tuple[str, ...]:
    """A VF that is to be a vGPU gets a type and stays on its driver: vfio-pci is not for it."""
    if not vgpu.creatable:
        return ()
    name = case.name
    return (
        f"echo {min(vgpu.creatable)} > {type_path(name)}",
        f"vfiotool vm check {name}",
        f"vfiotool vm qemu {name}",
    )


def device_notes(case: Case) -> list[str]:
    """What to know of a device that no blocker says, whether or not it can be passed through."""
    if case.vgpu is not None and not case.vgpu.current:
        index = None if case.function is None else case.function.vf_index
        return [
            f"its vGPU type is 0, which is none: it stays on its driver and is ready once it has a "
            f"type; it can create {case.vgpu.listed} (in a policy: vf = [ {{ index = {index}, "
            "vgpu_type = … } ])"
        ]
    if case.vgpu is not None:
        return [f"it is a vGPU of type {case.vgpu.current}, which a change of its driver destroys"]
    if not case.no_reset or (case.function is not None and case.function.is_bridge):
        return []
    return [
        f"the kernel has no reset method for {case.name}: it keeps its state when a guest ends, so "
        "that a second start may need a reboot of the host (a reset of the whole slot, or a module "
        "such as vendor-reset, may help)"
    ]


def _mdev_driver(case: Case) -> str | None:
    members = case.group.devices if case.group is not None else ()
    return next((member.driver for member in members if member.address == case.name), None)


def _mdev_blockers(case: Case) -> list[Blocker]:
    """An mdev needs no IOMMU of the host's: its parent's driver isolates it."""
    if _mdev_driver(case) is not None:
        return []
    uuid = case.name
    detail = "no VFIO driver is bound to the mediated device"
    evidence = f"mediated device {uuid} has no driver link"
    # No driver matches an mdev later on (drivers/vfio/mdev/mdev_driver.c, mdev_match).
    return [Blocker("no-driver", uuid, uuid, detail, evidence, f"vfiotool mdev remove {uuid}")]


def _other_members(address: str, group: IommuGroup | None) -> list[tuple[str, str]]:
    """The group's other members that stand in its way, with their drivers."""
    return [
        (member.address, member.driver or "")
        for member in (group.devices if group is not None else ())
        if member.role == "host" and member.address != address
    ]


# Each member of a group is asked about by all the others.
@lru_cache(maxsize=4096)
def _group_member(address: str, driver: str, group: int | None) -> Blocker:
    where = "" if group is None else f"{SYS_IOMMU_GROUPS}/{group}/devices/{address}"
    number = "" if group is None else f" {group}"
    detail = f"{address} in the same group{number} is on the host's driver {driver}"
    return Blocker("group-member", address, address, detail, where)


def _iommu_blockers(case: Case, function: PciFunction) -> list[Blocker]:
    address, group, facts = function.address, case.group, case.facts
    if group is None or case.noiommu:
        return [_no_iommu(facts, address, noiommu=group is not None)]
    found = []
    for region in group.reserved_regions:
        if region.type == "direct":
            span = f"{region.start:#x}-{region.end:#x}"
            detail = f"the firmware demands direct access to {span}, which assignment cannot give"
            evidence = f"{SYS_IOMMU_GROUPS}/{group.id}/reserved_regions"
            found.append(Blocker("reserved-direct", address, span, detail, evidence))
    if facts.platform.remapping.enabled is False and facts.platform.unsafe_interrupts is None:
        detail = "interrupts are not remapped, so VFIO refuses the group"
        evidence = facts.platform.remapping.evidence
        found.append(Blocker("no-interrupt-remapping", address, "interrupts", detail, evidence))
    return found


def _no_iommu(facts: HostFacts, address: str, *, noiommu: bool) -> Blocker:
    if noiommu:
        detail = "its group is a no-IOMMU group: DMA would reach all of the host's memory"
    elif facts.platform.units:
        detail = "no IOMMU translates for it, although the host has one"
    else:
        tables = facts.platform.tables
        detail = "the kernel drives no IOMMU; "
        if tables is None:
            detail += "whether the firmware has one is not known here"
        else:
            known = ", ".join(tables)
            detail += f"the firmware has one ({known})" if known else "the firmware shows none"
    evidence = f"{SYS_IOMMU} has {len(facts.platform.units)} entries, "
    evidence += f"{SYS_PCI_DEVICES}/{address} has no iommu_group of its own"
    return Blocker("no-iommu", address, address, detail, evidence)


def _driver_blockers(facts: HostFacts, function: PciFunction) -> list[Blocker]:
    """Functions that no VFIO driver takes, and hosts that have none."""
    address = function.address
    base = f"{SYS_PCI_DEVICES}/{address}"
    if function.is_bridge and not function.on_vfio:
        detail = "it is a bridge, and vfio-pci takes devices only"
        if (function.class_code or "")[:4] not in BRIDGE_CLASSES:
            # Such as a host or an ISA bridge: the kernel would let vfio-pci have it.
            detail = "it is a bridge of the platform, and stays with the host"
        evidence = f"{base}/class is {function.class_code}"
        return [Blocker("no-driver", address, address, detail, evidence)]
    if f"{function.vendor}:{function.device}" in _DENIED and not facts.denylist_off:
        detail = "vfio-pci refuses this device as unsafe (its deny list)"
        evidence = f"{base}/device, drivers/vfio/pci/vfio_pci.c vfio_pci_dev_in_denylist"
        return [Blocker("no-driver", address, address, detail, evidence)]
    if function.on_vfio or facts.has_vfio_pci is not False:
        return []
    detail = f"kernel {facts.platform.release} has no vfio-pci, neither loaded nor as a module"
    modules = f"/lib/modules/{facts.platform.release}"
    evidence = f"{SYS_PCI_DRIVERS}/vfio-pci and {modules}/kernel/drivers/vfio/pci"
    return [Blocker("no-driver", address, address, detail, evidence)]
