"""A node of the tree that `vfiotool tree` shows as text and as a picture."""

from __future__ import annotations

from dataclasses import dataclass, field

from vfiotool.devices.pci import Address, Link


@dataclass(frozen=True)
class Node:
    """A device in the tree. `kind`: root, bridge, endpoint, vf, mdev; `number`: a VF's index.

    `role` is the contract's; `shared` tells whether another endpoint is in the same group, and
    `viable` whether the kernel would open that group now; `verdict` is `why`'s, in one word.
    """

    kind: str
    address: str
    pci_id: str | None = None
    name: str | None = None
    driver: str | None = None
    role: str | None = None
    group: int | None = None
    viable: bool | None = None
    shared: bool = False
    number: int | None = None
    numa_node: int | None = None
    link: Link | None = None
    verdict: str | None = None
    interfaces: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()
    serial: str | None = None
    children: list[Node] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "address": self.address,
            "id": self.pci_id,
            "name": self.name,
            "driver": self.driver,
            "role": self.role,
            "iommu_group": self.group,
            "viable": self.viable,
            "verdict": self.verdict,
            "interfaces": list(self.interfaces),
            "disks": list(self.disks),
            "serial": self.serial,
            "vf_index": self.number,
            "numa_node": self.numa_node,
            "children": [child.as_json() for child in self.children],
        }


def summary_of(vfs: list[Node]) -> str:
    """Many VFs in one line: how many, on which drivers, in which groups."""
    drivers: dict[str, int] = {}
    for vf in vfs:
        drivers[vf.driver or "no driver"] = drivers.get(vf.driver or "no driver", 0) + 1
    groups = sorted(vf.group for vf in vfs if vf.group is not None)
    text = f"{len(vfs)} VFs: " + ", ".join(f"{count} × {name}" for name, count in drivers.items())
    return f"{text}; groups {groups[0]}–{groups[-1]}" if groups else text


def short(address: str) -> str:
    """An address without its domain where that is 0000."""
    return address.removeprefix("0000:") if Address.is_address(address) else address
