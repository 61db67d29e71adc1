"""What changed between two captures as a person asks it: device by device, and the mounts."""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.devices.attached import Attached
from vfiotool.devices.inventory import read_inventory
from vfiotool.host.host import Host
from vfiotool.host.paths import MOUNTS, PROC_MOUNTINFO
from vfiotool.snapshot.load import tree_of
from vfiotool.snapshot.text import Snapshot

# File systems of the kernel's own, which come and go without anybody's doing.
_KERNEL_FILE_SYSTEMS = frozenset(
    {"proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "securityfs", "nsfs"}
    | {"debugfs", "tracefs", "configfs", "pstore", "bpf", "autofs", "hugetlbfs", "efivarfs"}
)
# A fact's name that says whether the device is there at all.
_PRESENT = "device"


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact of one device that differs. `device` is an address, a UUID, or a mount point.

    `before` and `after` are None where there is no such device, or it has none of it.
    """

    device: str
    what: str
    before: str | None
    after: str | None

    def as_json(self) -> dict[str, object]:
        return {
            "device": self.device,
            "what": self.what,
            "before": self.before,
            "after": self.after,
        }

    def line(self) -> str:
        """The difference for people."""
        if self.what in (_PRESENT, "mount"):
            sign, text = ("+", self.after) if self.before is None else ("-", self.before)
            if self.before is None or self.after is None:
                return f"{sign} {self.device}: {text}"
        return f"~ {self.device}: {self.what} {self.before or 'none'} => {self.after or 'none'}"


def differences(before: Snapshot, after: Snapshot) -> list[Difference]:
    """By device: driver, override, group, VFs, disks, interfaces; mediated devices; mounts.

    Of a device that came or went, that alone.
    """
    old, new = _facts(before), _facts(after)
    found = []
    for device in sorted(old.keys() | new.keys()):
        one, two = old.get(device, {}), new.get(device, {})
        names = [_PRESENT] if not one or not two else sorted(one.keys() | two.keys())
        if device.startswith("/"):
            names = ["mount"]
        found += [
            Difference(device, name, one.get(name), two.get(name))
            for name in names
            if one.get(name) != two.get(name)
        ]
    return found


def _facts(snapshot: Snapshot) -> dict[str, dict[str, str]]:
    host = Host(tree_of(snapshot, "snapshot"), live=False, name="snapshot")
    inventory, attached = read_inventory(host), Attached(host)
    found: dict[str, dict[str, str]] = {}
    for function in inventory.functions:
        group = inventory.by_group.get(-1 if function.iommu_group is None else function.iommu_group)
        facts = {
            _PRESENT: f"{function.vendor}:{function.device} class {function.class_code}",
            "driver": function.driver,
            "driver_override": function.driver_override,
            "group": None if function.iommu_group is None else str(function.iommu_group),
            "group type": None if group is None else group.type,
            "VFs": None if function.sriov is None else str(function.sriov.num_vfs),
            "disks": ", ".join(attached.disks(function.path)),
            "interfaces": ", ".join(attached.interfaces(function.path)),
        }
        found[function.address] = {name: text for name, text in facts.items() if text}
    for mdev in inventory.mdevs:
        found[mdev.uuid] = {_PRESENT: f"{mdev.type} of {mdev.parent}"}
    return {**found, **_mounts(host)}


def _mounts(host: Host) -> dict[str, dict[str, str]]:
    """By mount point, what is mounted there in the captured command's own namespace."""
    told = (host.read(MOUNTS) or "").splitlines()
    lines = [line.partition("\t")[2] for line in told if line.startswith("self\t")]
    found = {}
    for line in lines or (host.read(PROC_MOUNTINFO) or "").splitlines():
        left, _, right = line.partition(" - ")
        head, tail = left.split(), right.split()
        if len(head) >= 5 and len(tail) >= 2 and tail[0] not in _KERNEL_FILE_SYSTEMS:
            found[head[4]] = {"mount": f"{tail[1]} ({tail[0]})"}
    return found
