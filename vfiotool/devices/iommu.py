"""IOMMU groups: members, their roles, viability, domain type and reserved regions.

A role says what a member means for the group's viability, as the kernel counts it
(drivers/iommu/iommu.c, iommu_device_use_default_domain; Documentation/driver-api/vfio.rst).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from vfiotool.devices.identity import (
    NO_DMA_DRIVERS,
    GroupScan,
    is_vfio_driver,
    list_groups,
    parse_windows,
    role_of,
)
from vfiotool.devices.pci import PciFunction, is_bridge_class
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_IOMMU

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfiotool.devices.identity import Facts

__all__ = [
    "NO_DMA_DRIVERS",
    "GroupMember",
    "GroupReader",
    "GroupWriter",
    "IommuGroup",
    "ReservedRegion",
    "bridge_in_the_way",
    "group_as_json",
    "has_iommu",
    "is_vfio_driver",
    "is_viable",
    "iter_groups",
    "list_groups",
    "parse_reserved_regions",
    "read_group",
    "read_groups",
    "role_of",
]


# What is read of a group: all of it, what its listing shows, what a verdict asks for.
_FILES = ("type", "reserved_regions", "name")
_SHOWN = _FILES[:2]
_JUDGED = _FILES[1:]


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
    """One group. `viable` is what VFIO_GROUP_GET_STATUS would say now; `noiommu`: VFIO made it for
    a device without an IOMMU (drivers/vfio/group.c, vfio_noiommu_group_alloc)."""

    id: int
    type: str | None
    viable: bool
    reserved_regions: tuple[ReservedRegion, ...]
    devices: tuple[GroupMember, ...]
    noiommu: bool = False

    @property
    def bridges_in_the_way(self) -> tuple[str, ...]:
        """The addresses of the bridges that have to be parked (`bridge_in_the_way`)."""
        return tuple(
            member.address
            for member in self.devices
            if bridge_in_the_way(member.class_code, member.driver)
        )


def parse_reserved_regions(text: str) -> tuple[ReservedRegion, ...]:
    """Lines of `start end type`; malformed ones are passed over."""
    return tuple(ReservedRegion(*window) for window in parse_windows(text))


def has_iommu(host: Host) -> bool:
    """Whether the kernel drives an IOMMU: the ground truth is the class, not the command line."""
    return bool(host.listdir(SYS_IOMMU))


def bridge_in_the_way(class_code: str | None, driver: str | None) -> bool:
    """Whether a function is a bridge whose driver keeps its group from user space, such as shpchp
    or lpc_ich, and which can be parked: what lies behind it stays when that driver goes.

    Not CardBus bridges (class 0607), which take their cards along (drivers/pcmcia/yenta_socket.c).
    """
    if not is_bridge_class(class_code) or (class_code or "").startswith("0607"):
        return False
    return role_of(driver) == "host"


class GroupReader:
    """`read_group` for one group after another, parsing what they have in common once.

    Members that are among `functions` (by address) are not read again. Without `types` each
    group's `type` is None: what is asked of thousands of groups can do without.
    """

    def __init__(
        self,
        host: Host,
        functions: Mapping[str, PciFunction] | None = None,
        *,
        types: bool = True,
    ) -> None:
        self._files = _FILES if types else _JUDGED
        given = {name: _facts_of(function) for name, function in (functions or {}).items()}
        self._scan = GroupScan(host, given)

    def read(self, group: int) -> IommuGroup | None:
        """One group, or None if there is none of that id (any more)."""
        return _read_group(self._scan, group, self._files)


def read_group(host: Host, group: int) -> IommuGroup | None:
    """One group, or None if there is none of that id (any more)."""
    return _read_group(GroupScan(host), group)


def _read_group(scan: GroupScan, group: int, files: tuple[str, ...] = _FILES) -> IommuGroup | None:
    found = scan.members(group)
    if found is None:
        return None
    members = tuple(GroupMember(name, *facts) for name, facts in found)
    domain, regions, noiommu = _attributes(files, scan.attributes(group, files))
    return IommuGroup(
        id=group,
        type=domain,
        viable=is_viable(members),
        reserved_regions=regions,
        devices=members,
        noiommu=noiommu,
    )


# Most groups of a host have the same.
@lru_cache(maxsize=64)
def _attributes(
    names: tuple[str, ...], contents: tuple[bytes | None, ...]
) -> tuple[str | None, tuple[ReservedRegion, ...], bool]:
    """A group's domain type, its reserved regions, and whether VFIO made it without an IOMMU."""
    found = {
        name: content.strip().decode("utf-8", "backslashreplace")
        for name, content in zip(names, contents, strict=True)
        if content is not None
    }
    return (
        found.get("type"),
        parse_reserved_regions(found.get("reserved_regions", "")),
        found.get("name") == "vfio-noiommu",
    )


def is_viable(members: tuple[GroupMember, ...]) -> bool:
    """No member is on a host driver that does DMA of its own."""
    return all(member.role != "host" for member in members)


def read_groups(host: Host) -> tuple[IommuGroup, ...]:
    """All groups, by id."""
    return tuple(iter_groups(host))


def iter_groups(host: Host, *, plain: bool = False) -> Iterator[IommuGroup]:
    """As `read_groups`, one at a time; `plain`: without asking which are no-IOMMU groups."""
    scan = GroupScan(host)
    for number in list_groups(host):
        group = _read_group(scan, number, _SHOWN if plain else _FILES)
        if group is not None:
            yield group


def _facts_of(function: PciFunction) -> Facts:
    role = "vfio" if function.on_vfio else role_of(function.driver)
    return (function.vendor, function.device, function.class_code, function.driver, role)


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


class GroupWriter:
    """`group_as_json` as text, one group after another: what groups have in common is encoded
    once, which is all of them but their numbers and addresses."""

    def __init__(self) -> None:
        from json import JSONEncoder

        self._encode = JSONEncoder().encode
        self._members: dict[tuple[str | None, ...], str] = {}
        self._frames: dict[object, tuple[str, str]] = {}

    def text(self, group: IommuGroup) -> str:
        """The group on one line."""
        key = (group.type, group.viable, group.reserved_regions)
        frame = self._frames.get(key)
        if frame is None:
            whole = self._encode(group_as_json(replace(group, id=0, devices=())))
            frame = self._frames[key] = (whole[len('{"id": 0') : -len("]}")], "]}")
        members = ", ".join([self._member(member) for member in group.devices])
        return f'{{"id": {group.id}{frame[0]}{members}{frame[1]}'

    def _member(self, member: GroupMember) -> str:
        key = (member.vendor, member.device, member.class_code, member.driver, member.role)
        rest = self._members.get(key)
        if rest is None:
            whole = self._encode(_member_as_json(replace(member, address="")))
            rest = self._members[key] = whole[len('{"address": ""') :]
        return f'{{"address": {self._encode(member.address)}{rest}'
