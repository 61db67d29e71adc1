"""IOMMU groups: members, their roles, viability, domain type and reserved regions.

A role says what a member means for the group's viability, as the kernel counts it
(drivers/iommu/iommu.c, iommu_device_use_default_domain; Documentation/driver-api/vfio.rst).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vfiotool.host import SYS_IOMMU, SYS_IOMMU_GROUPS, SYS_MDEV_DEVICES, SYS_PCI_DEVICES, Host
from vfiotool.pci import Address, PciIdentity, parse_identity

# Drivers with `driver_managed_dma` that are not VFIO drivers: they never claim the group's DMA.
# drivers/pci/pcie/portdrv.c, drivers/pci/pci-stub.c.
NO_DMA_DRIVERS = frozenset({"pcieport", "pci-stub"})
_VFIO_DRIVERS = frozenset({"nvgrace-gpu-vfio-pci", "qat_vfio_pci", "vfio-fsl-mc", "vfio-platform"})


@dataclass(frozen=True, slots=True)
class ReservedRegion:
    """An IOVA window, both ends included. `type`: direct, direct-relaxable, reserved, msi."""

    start: int
    end: int
    type: str


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One device of a group. `address` is an mdev's UUID or a platform device's name too."""

    address: str
    vendor: str | None
    device: str | None
    class_code: str | None
    driver: str | None
    role: str


@dataclass(frozen=True, slots=True)
class IommuGroup:
    """One group. `viable` is what VFIO_GROUP_GET_STATUS would say now."""

    id: int
    type: str | None
    viable: bool
    reserved_regions: tuple[ReservedRegion, ...]
    devices: tuple[GroupMember, ...]


def is_vfio_driver(driver: str) -> bool:
    """Whether a driver's name is that of a VFIO driver (vfio-pci or a variant of it)."""
    name = driver.replace("_", "-")
    return name in _VFIO_DRIVERS or driver in _VFIO_DRIVERS or "vfio-pci" in name


def role_of(driver: str | None) -> str:
    """A PCI or platform member's role: `unbound`, `vfio`, `bridge` or `host`."""
    if driver is None:
        return "unbound"
    if is_vfio_driver(driver):
        return "vfio"
    return "bridge" if driver in NO_DMA_DRIVERS else "host"


def parse_reserved_regions(text: str) -> tuple[ReservedRegion, ...]:
    """Lines of `start end type`; malformed ones are passed over."""
    regions = []
    for line in text.splitlines():
        words = line.split()
        try:
            regions.append(ReservedRegion(int(words[0], 16), int(words[1], 16), words[2]))
        except (ValueError, IndexError):
            continue
    return tuple(regions)


def list_groups(host: Host) -> list[int]:
    """The ids of all groups, ascending."""
    return sorted(int(name) for name in host.listdir(SYS_IOMMU_GROUPS) if name.isdecimal())


def has_iommu(host: Host) -> bool:
    """Whether the kernel drives an IOMMU: the ground truth is the class, not the command line."""
    return bool(host.listdir(SYS_IOMMU))


def read_group(host: Host, group: int) -> IommuGroup | None:
    """One group, or None if there is none of that id (any more)."""
    base = f"{SYS_IOMMU_GROUPS}/{group}"
    names = host.listdir(f"{base}/devices")
    if not names and not host.isdir(base):
        return None
    members = tuple(read_member(host, name) for name in names)
    return IommuGroup(
        id=group,
        type=host.read(f"{base}/type"),
        viable=is_viable(members),
        reserved_regions=parse_reserved_regions(host.read(f"{base}/reserved_regions") or ""),
        devices=members,
    )


def is_viable(members: tuple[GroupMember, ...]) -> bool:
    """No member is on a host driver that does DMA of its own."""
    return all(member.role != "host" for member in members)


def read_groups(host: Host) -> tuple[IommuGroup, ...]:
    """All groups, by id."""
    found = (read_group(host, group) for group in list_groups(host))
    return tuple(group for group in found if group is not None)


def read_member(host: Host, name: str) -> GroupMember:
    """A group's member by its name in `devices/`; unknown fields are None if it vanished."""
    text = host.read(f"{SYS_PCI_DEVICES}/{name}/uevent")
    if text is not None:
        return member_of(parse_identity(name, text))
    if host.exists(f"{SYS_MDEV_DEVICES}/{name}"):
        driver = host.linkname(f"{SYS_MDEV_DEVICES}/{name}/driver")
        return GroupMember(name, None, None, None, driver, "mdev")
    if Address.is_address(name):
        return GroupMember(name, None, None, None, None, "unbound")
    return _foreign_member(host, name)


def _foreign_member(host: Host, name: str) -> GroupMember:
    for group in list_groups(host):
        link = f"{SYS_IOMMU_GROUPS}/{group}/devices/{name}"
        target = host.realpath(link)
        if target is not None and host.exists(target):
            driver = host.linkname(f"{target}/driver")
            return GroupMember(name, None, None, None, driver, role_of(driver))
    return GroupMember(name, None, None, None, None, "unbound")


def member_of(identity: PciIdentity) -> GroupMember:
    """A PCI function as a member of its group."""
    return GroupMember(
        address=identity.address,
        vendor=identity.vendor,
        device=identity.device,
        class_code=identity.class_code,
        driver=identity.driver,
        role=role_of(identity.driver),
    )


def group_as_json(group: IommuGroup) -> dict[str, object]:
    """The contract's shape of one group."""
    return {
        "id": group.id,
        "type": group.type,
        "viable": group.viable,
        "reserved_regions": [
            {"start": region.start, "end": region.end, "type": region.type}
            for region in group.reserved_regions
        ],
        "devices": [_member_as_json(member) for member in group.devices],
    }


def _member_as_json(member: GroupMember) -> Mapping[str, object]:
    return {
        "address": member.address,
        "vendor": member.vendor,
        "device": member.device,
        "class": member.class_code,
        "driver": member.driver,
        "role": member.role,
    }
