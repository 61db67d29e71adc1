"""Is a device ready to be opened by a virtual machine, and what is missing if not."""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.devices.inventory import Inventory
from vfiotool.devices.pci import Address, PciFunction
from vfiotool.errors import NotFound, Refused
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_IOMMU, DEV_VFIO, SYS_MDEV_DEVICES, SYS_PCI_DEVICES
from vfiotool.usage.blocker import KINDS, Blocker
from vfiotool.usage.case import Case, CaseReader
from vfiotool.usage.verdict import device_notes, explain


@dataclass(frozen=True)
class Handed:
    """One device as a hypervisor is told of it.

    `path` is its sysfs path as hypervisors take it (`sysfsdev=`); `model` is the mdev type's
    `device_api` (`vfio-pci`, `vfio-ccw`, `vfio-ap`), and `vfio-pci` for every PCI function.
    """

    name: str
    path: str
    model: str
    iommu_group: int | None
    function: PciFunction | None
    # The physical function on a VFIO driver that guards this one with a VF token, itself maybe.
    guard: str | None = None
    # A function of s390x, which has no bus above it that a guest would see (zPCI).
    zpci: bool = False

    @property
    def is_mdev(self) -> bool:
        return self.function is None

    @property
    def address(self) -> Address:
        """The PCI address. Raises ValueError for an mdev, which has none on the host."""
        if self.function is None:
            raise ValueError(f"{self.name} is a mediated device")
        return Address.parse(self.name)


@dataclass(frozen=True)
class PreflightFinding:
    """One thing that stands between a device and a VM, with the command that removes it."""

    device: str
    kind: str
    detail: str
    next: str

    def as_json(self) -> dict[str, object]:
        return {
            "device": self.device,
            "kind": self.kind,
            "detail": self.detail,
            "next": self.next,
        }


def handed(inventory: Inventory, name: str) -> Handed:
    """The device of that address or UUID. Raises NotFound if the host has none."""
    function = inventory.by_address.get(name)
    if function is not None:
        path = f"{SYS_PCI_DEVICES}/{name}"
        guard = _guard(inventory, function)
        return Handed(name, path, "vfio-pci", function.iommu_group, function, guard, inventory.zpci)
    for mdev in inventory.mdevs:
        if mdev.uuid == name:
            api = next(
                (
                    kind.device_api
                    for kind in inventory.mdev_types
                    if (kind.parent, kind.type) == (mdev.parent, mdev.type)
                ),
                None,
            )
            path = f"{SYS_MDEV_DEVICES}/{name}"
            return Handed(name, path, api or "vfio-pci", mdev.iommu_group, None)
    raise NotFound(
        f"no device {name} on this host", hint="vfiotool devices lists them", device=name
    )


def _guard(inventory: Inventory, function: PciFunction) -> str | None:
    """Who sets the VF token that opening this function takes: none where the host drives the PF.

    Source: drivers/vfio/pci/vfio_pci_core.c, vfio_pci_validate_vf_token.
    """
    if function.physfn is None:
        makes_vfs = function.sriov is not None and function.sriov.num_vfs
        return function.address if makes_vfs and function.on_vfio else None
    owner = inventory.by_address.get(function.physfn)
    return owner.address if owner is not None and owner.on_vfio else None


def findings(
    host: Host, inventory: Inventory, device: Handed, vf_token: str | None = None
) -> tuple[PreflightFinding, ...]:
    """What keeps a VM from opening the device now; empty if nothing does. Reads only."""
    case = CaseReader(host, inventory.by_address, inventory.by_group).read(device.name)
    node = f"{DEV_VFIO}/{device.iommu_group}"
    missing = host.live and device.iommu_group is not None and not host.exists(node)
    return judge_handing(case, device, vf_token, missing_node=node if missing else None)


def notes(host: Host, inventory: Inventory, device: Handed) -> tuple[str, ...]:
    """What to know of a device that keeps no VM from opening it: that it cannot be reset."""
    case = CaseReader(host, inventory.by_address, inventory.by_group).read(device.name)
    return tuple(device_notes(case))


def judge_handing(
    case: Case, device: Handed, vf_token: str | None = None, *, missing_node: str | None = None
) -> tuple[PreflightFinding, ...]:
    """The findings of one device, from `why`'s own blockers and what a VM needs besides.

    `missing_node` is the device node that is not there though it should be.
    """
    verdict = explain(case)
    # The same commands as why gives: none where none leads to the goal.
    why = "vfiotool why {}"
    binds = [line for line in verdict.next if line.startswith(f"vfiotool bind {device.name}")]
    first = bool(binds) and verdict.next[0] == binds[0]
    found = []
    if device.iommu_group is None:
        found.append(_finding(device, "no-iommu", "it is in no IOMMU group", why))
    opens = device.is_mdev or (device.function is not None and device.function.on_vfio)
    if not opens:
        driver = (device.function.driver if device.function else None) or "no driver"
        text = f"it is on {driver}, not on a VFIO driver"
        found.append(_finding(device, "not-bound", text, "vfiotool bind {}" if first else why))
    if device.guard not in (None, device.name) and vf_token is None:
        text = f"its physical function {device.guard} is on a VFIO driver: it opens only with the "
        text += "VF token which the program that drives that one has set"
        command = "vfiotool vm qemu {} --vf-token UUID"
        found.append(_finding(device, "vf-token", text, command))
    group = case.group
    if group is not None and not group.viable:
        others = [m.address for m in group.devices if m.role == "host" and m.address != device.name]
        if others:
            text = f"group {group.id} is not viable: {', '.join(others)} on host drivers"
            found.append(_finding(device, "group-not-viable", text, binds[0] if binds else why))
    told = {"group-member", *(finding.kind for finding in found)}
    found += [
        _blocked(device, blocker, opens) for blocker in verdict.blockers if blocker.kind not in told
    ]
    if opens and missing_node is not None:
        text = f"{missing_node} does not exist"
        found.append(_finding(device, "no-node", text, why))
    return tuple(found)


def _blocked(device: Handed, blocker: Blocker, opens: bool) -> PreflightFinding:
    if opens and KINDS[blocker.kind].holds:
        command = f"ps -fp {_pid(blocker.evidence)}"
        return PreflightFinding(device.name, "held", blocker.detail, command)
    detail = blocker.detail
    if blocker.device != device.name:
        detail = f"{blocker.device}: {detail}"
    return _finding(device, blocker.kind, detail, "vfiotool why {}")


def require_ready(
    host: Host, inventory: Inventory, devices: list[Handed], vf_token: str | None = None
) -> None:
    """Raise Refused with the first finding of the first device that is not ready."""
    for device in devices:
        for finding in findings(host, inventory, device, vf_token):
            raise Refused(
                f"{device.name} cannot be handed to a VM yet: {finding.detail}",
                hint=finding.next,
                device=device.name,
            )


def has_iommufd(host: Host) -> bool:
    """Whether the host offers iommufd (Documentation/userspace-api/iommufd.rst)."""
    return host.exists(DEV_IOMMU)


def _finding(device: Handed, kind: str, detail: str, command: str) -> PreflightFinding:
    return PreflightFinding(device.name, kind, detail, command.format(device.name))


def _pid(evidence: str) -> str:
    words = evidence.split()
    return words[words.index("pid") + 1] if "pid" in words[:-1] else "PID"
