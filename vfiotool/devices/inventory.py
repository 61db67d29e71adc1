"""A whole host as one frozen value: what `verdict`, `plan` and the commands decide on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from vfiotool.devices.iommu import IommuGroup, has_iommu, read_groups
from vfiotool.devices.mdev import Mdev, MdevType, read_mdev_types, read_mdevs
from vfiotool.devices.pci import PciFunction, list_addresses, read_functions
from vfiotool.devices.sriov import VirtualFunction, read_vfs
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES


@dataclass(frozen=True)
class Inventory:
    """Everything read at one time. Functions in bus order, groups by id, mdevs by UUID.

    `zpci`: its functions are s390x's, each with a function id in place of bridges above it
    (Documentation/arch/s390/pci.rst).
    """

    boot_id: str | None
    iommu: bool
    functions: tuple[PciFunction, ...]
    groups: tuple[IommuGroup, ...]
    vfs: tuple[VirtualFunction, ...]
    mdev_types: tuple[MdevType, ...]
    mdevs: tuple[Mdev, ...]
    zpci: bool = False

    @cached_property
    def by_address(self) -> dict[str, PciFunction]:
        return {function.address: function for function in self.functions}

    @cached_property
    def by_group(self) -> dict[int, IommuGroup]:
        return {group.id: group for group in self.groups}


def read_inventory(host: Host) -> Inventory:
    """Read the whole host. What vanishes meanwhile is left out; nothing is raised for it."""
    functions = read_functions(host, list_addresses(host))
    return Inventory(
        boot_id=host.boot_id(),
        iommu=has_iommu(host),
        functions=functions,
        groups=read_groups(host),
        vfs=tuple(
            vf
            for function in functions
            if function.sriov
            for vf in read_vfs(host, function.address)
        ),
        mdev_types=read_mdev_types(host),
        mdevs=read_mdevs(host),
        zpci=any(
            host.exists(f"{SYS_PCI_DEVICES}/{function.address}/function_id")
            for function in functions[:1]
        ),
    )
