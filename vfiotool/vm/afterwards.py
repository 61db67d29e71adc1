"""What became of devices that a virtual machine had: read again after its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.errors import NotFound
from vfiotool.host.host import Host
from vfiotool.vm import preflight
from vfiotool.vm.finding import PreflightFinding
from vfiotool.vm.handed import VDPA, Handed, handed, handed_vdpa


@dataclass(frozen=True, slots=True)
class Afterwards:
    """One device after the machine has ended.

    `changes` says in words what is not as it was before the start; `findings` is what keeps the
    next machine from opening it: none if it can be started again.
    """

    device: str
    gone: bool
    driver: str | None
    group: int | None
    group_viable: bool | None
    changes: tuple[str, ...]
    findings: tuple[PreflightFinding, ...]

    @property
    def ready(self) -> bool:
        return not self.gone and not self.findings

    def as_json(self) -> dict[str, object]:
        return {
            "device": self.device,
            "gone": self.gone,
            "ready": self.ready,
            "driver": self.driver,
            "iommu_group": self.group,
            "group_viable": self.group_viable,
            "changes": list(self.changes),
            "findings": [item.as_json() for item in self.findings],
        }


def read_afterwards(
    host: Host, before: Sequence[Handed], vf_token: str | None = None
) -> list[Afterwards]:
    """Each device of `before` as it is on the host now, its group with it. Reads only."""
    inventory = read_inventory(host)
    result = []
    for device in before:
        try:
            now = _again(host, inventory, device)
        except NotFound:
            result.append(Afterwards(device.name, True, None, None, None, ("it is gone",), ()))
            continue
        group = inventory.by_group.get(now.iommu_group) if now.iommu_group is not None else None
        result.append(
            Afterwards(
                device=device.name,
                gone=False,
                driver=now.function.driver if now.function else None,
                group=now.iommu_group,
                group_viable=None if group is None else group.viable,
                changes=tuple(_changes(device, now)),
                findings=preflight.findings(host, inventory, now, vf_token),
            )
        )
    return result


def _again(host: Host, inventory: Inventory, device: Handed) -> Handed:
    """The same device anew. Raises NotFound if it is gone."""
    if device.model == VDPA:
        return handed_vdpa(host, device.name, device.virtio)
    return handed(inventory, device.name) if device.through_vfio else device


def _changes(before: Handed, now: Handed) -> list[str]:
    found = []
    old, new = before.function, now.function
    if old is not None and new is not None:
        if old.driver != new.driver:
            found.append(f"driver {old.driver or 'none'} is now {new.driver or 'none'}")
        if (old.vendor, old.device) != (new.vendor, new.device):
            found.append(f"{old.vendor}:{old.device} is now {new.vendor}:{new.device}")
    if before.iommu_group != now.iommu_group:
        found.append(f"group {before.iommu_group} is now {now.iommu_group}")
    if before.path != now.path:
        found.append(f"{before.path or 'no node'} is now {now.path or 'no node'}")
    return found
