"""Whether a device can be passed through, why not, and what to type next.

The questions, in the kernel's order: does an IOMMU translate for it, can a VFIO driver take it,
is its group viable (Documentation/driver-api/vfio.rst), may its group be assigned
(Documentation/ABI/testing/sysfs-kernel-iommu_groups: reserved_regions), and, before all, does
the host itself use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.devices.acs import find_mergers, reasons
from vfiotool.devices.inventory import Inventory
from vfiotool.devices.iommu import IommuGroup, group_as_json, is_vfio_driver, read_group
from vfiotool.devices.mdev import Mdev
from vfiotool.devices.pci import PciFunction, read_function
from vfiotool.devices.remapping import interrupt_remapping, unsafe_interrupts_allowed
from vfiotool.errors import NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    PROC_OSRELEASE,
    SYS_FIRMWARE_ACPI_TABLES,
    SYS_IOMMU,
    SYS_IOMMU_GROUPS,
    SYS_LOCKDOWN,
    SYS_MODULE,
    SYS_PCI_DEVICES,
    SYS_PCI_DRIVERS,
)
from vfiotool.usage.remedies import advise, advise_mdev, read_setup
from vfiotool.usage.survey import Blocker, survey

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
    """The answer of `why`. `next`: commands to type in this order; `warnings`: what the host
    cannot do without; `notes`: what to know."""

    address: str
    passable: bool
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
            "group": None if self.group is None else group_as_json(self.group),
            "blockers": [blocker.as_json() for blocker in self.blockers],
            "next": list(self.next),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def explain(host: Host, inventory: Inventory, address: str) -> Verdict:
    """The verdict on one PCI function (full address) or mdev (UUID).

    Raises NotFound if there is no such device.
    """
    function = inventory.by_address.get(address) or read_function(host, address)
    if function is not None:
        return _explain_function(host, inventory, function)
    for mdev in inventory.mdevs:
        if mdev.uuid == address:
            return _explain_mdev(host, inventory, mdev)
    raise NotFound(
        f"no PCI function or mediated device {address}",
        hint="vfiotool devices and vfiotool mdev list name them",
        device=address,
    )


def _explain_function(host: Host, inventory: Inventory, function: PciFunction) -> Verdict:
    number = function.iommu_group
    group = None if number is None else inventory.by_group.get(number) or read_group(host, number)
    usage = survey(host, function.address, inventory.by_address)
    blockers = list(usage.blockers)
    notes = [f"not seen: {text}" for text in usage.unseen]
    blockers += _iommu_blockers(host, inventory, function, group)
    blockers += _driver_blockers(host, function)
    others = _other_members(function.address, group)
    for member in others:
        blockers.append(_group_member(function.address, member, group))
        blockers += survey(host, member[0], inventory.by_address).blockers
    if group is not None and len(group.devices) > 1:
        members = {member.address for member in group.devices}
        mergers = find_mergers(host, function.address, function.path, members)
        notes += reasons(mergers)
    lockdown = re.search(r"\[(\w+)\]", host.read(SYS_LOCKDOWN) or "")
    if lockdown is not None and lockdown[1] != "none":
        # No part of VFIO asks for it (security/security.c, LOCKDOWN_PCI_ACCESS and its users).
        notes.append(f"the kernel is locked down ({lockdown[1]}), which does not stop VFIO")
    found = tuple(dict.fromkeys(blockers))
    advice = advise(function, group, found, inventory.by_address, read_setup(host))
    return Verdict(
        address=function.address,
        passable=not found,
        group=group,
        blockers=found,
        next=advice.steps,
        notes=tuple(dict.fromkeys((*advice.notes, *notes))),
        warnings=advice.warnings,
    )


def _explain_mdev(host: Host, inventory: Inventory, mdev: Mdev) -> Verdict:
    """An mdev needs no IOMMU of the host's: its parent's driver isolates it."""
    group = None if mdev.iommu_group is None else inventory.by_group.get(mdev.iommu_group)
    usage = survey(host, mdev.uuid, inventory.by_address)
    found = list(usage.blockers)
    driver = next(
        (m.driver for m in (group.devices if group else ()) if m.address == mdev.uuid), None
    )
    if driver is None:
        detail = "no VFIO driver is bound to the mediated device"
        evidence = f"mediated device {mdev.uuid} has no driver link"
        # No driver matches an mdev later on (drivers/vfio/mdev/mdev_driver.c, mdev_match).
        remedy = f"vfiotool mdev remove {mdev.uuid}"
        found.append(Blocker("no-driver", mdev.uuid, mdev.uuid, detail, evidence, remedy))
    notes = [f"not seen: {text}" for text in usage.unseen]
    advice = advise_mdev(mdev.uuid, tuple(found))
    return Verdict(mdev.uuid, not found, group, tuple(found), advice.steps, tuple(notes))


def _other_members(address: str, group: IommuGroup | None) -> list[tuple[str, str]]:
    """The group's other members that stand in its way, with their drivers."""
    return [
        (member.address, member.driver or "")
        for member in (group.devices if group is not None else ())
        if member.role == "host" and member.address != address
    ]


def _group_member(address: str, member: tuple[str, str], group: IommuGroup | None) -> Blocker:
    where = "" if group is None else f"{SYS_IOMMU_GROUPS}/{group.id}/devices/{member[0]}"
    number = "" if group is None else f" {group.id}"
    detail = f"{member[0]} in the same group{number} is on the host's driver {member[1]}"
    return Blocker("group-member", member[0], member[0], detail, where)


def _iommu_blockers(
    host: Host, inventory: Inventory, function: PciFunction, group: IommuGroup | None
) -> list[Blocker]:
    address = function.address
    name = None if group is None else host.read(f"{SYS_IOMMU_GROUPS}/{group.id}/name")
    if group is None or name == "vfio-noiommu":
        return [_no_iommu(host, inventory, address, noiommu=group is not None)]
    found = []
    for region in group.reserved_regions:
        if region.type == "direct":
            span = f"{region.start:#x}-{region.end:#x}"
            detail = f"the firmware demands direct access to {span}, which assignment cannot give"
            evidence = f"{SYS_IOMMU_GROUPS}/{group.id}/reserved_regions"
            found.append(Blocker("reserved-direct", address, span, detail, evidence))
    state = interrupt_remapping(host)
    if state.enabled is False and unsafe_interrupts_allowed(host) is None:
        detail = "interrupts are not remapped, so VFIO refuses the group"
        found.append(
            Blocker("no-interrupt-remapping", address, "interrupts", detail, state.evidence)
        )
    return found


def _no_iommu(host: Host, inventory: Inventory, address: str, *, noiommu: bool) -> Blocker:
    if noiommu:
        detail = "its group is a no-IOMMU group: DMA would reach all of the host's memory"
    elif inventory.iommu:
        detail = "no IOMMU translates for it, although the host has one"
    else:
        tables = set(host.listdir(SYS_FIRMWARE_ACPI_TABLES))
        known = sorted(tables & {"DMAR", "IVRS", "IORT", "VIOT"})
        detail = "the kernel drives no IOMMU; " + (
            f"the firmware has one ({', '.join(known)})" if known else "the firmware shows none"
        )
    evidence = f"{SYS_IOMMU} has {len(host.listdir(SYS_IOMMU))} entries, "
    evidence += f"{SYS_PCI_DEVICES}/{address} has no iommu_group of its own"
    return Blocker("no-iommu", address, address, detail, evidence)


def _driver_blockers(host: Host, function: PciFunction) -> list[Blocker]:
    """Functions that no VFIO driver takes, and hosts that have none."""
    address = function.address
    base = f"{SYS_PCI_DEVICES}/{address}"
    if (function.class_code or "")[:4] in ("0604", "0607"):
        detail = "it is a bridge, and vfio-pci takes devices only"
        evidence = f"{base}/class is {function.class_code}"
        return [Blocker("no-driver", address, address, detail, evidence)]
    allowed = host.read(f"{SYS_MODULE}/vfio_pci/parameters/disable_denylist") in ("Y", "1")
    if f"{function.vendor}:{function.device}" in _DENIED and not allowed:
        detail = "vfio-pci refuses this device as unsafe (its deny list)"
        evidence = f"{base}/device, drivers/vfio/pci/vfio_pci.c vfio_pci_dev_in_denylist"
        return [Blocker("no-driver", address, address, detail, evidence)]
    if function.driver and is_vfio_driver(function.driver):
        return []
    if host.isdir(f"{SYS_PCI_DRIVERS}/vfio-pci"):
        return []
    release = host.read(PROC_OSRELEASE)
    modules = f"/lib/modules/{release}"
    files = host.listdir(f"{modules}/kernel/drivers/vfio/pci")
    if not host.listdir(modules) or any(name.startswith("vfio-pci.ko") for name in files):
        return []
    detail = f"kernel {release} has no vfio-pci, neither loaded nor as a module"
    evidence = f"{SYS_PCI_DRIVERS}/vfio-pci and {modules}/kernel/drivers/vfio/pci"
    return [Blocker("no-driver", address, address, detail, evidence)]
