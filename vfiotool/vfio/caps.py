"""The structures that the kernel's info calls return, decoded without trust.

An info call gives a fixed head and, behind it, a chain of capabilities that point to each other
by offsets into the same buffer (`struct vfio_info_cap_header` in <linux/vfio.h>). A chain that
leaves the buffer, loops, or is cut short raises KernelError: to map a region whose sparse areas
were lost would be wrong.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vfiotool.errors import KernelError

HOP_LIMIT = 64
# VFIO_PCI_CONFIG_REGION_INDEX.
CONFIG_REGION = 7
_HEADER = struct.Struct("=HHI")

CAP_SPARSE_MMAP = 1
CAP_TYPE = 2
CAP_MSIX_MAPPABLE = 3
CAP_IOVA_RANGE = 1
CAP_TYPE1_MIGRATION = 2
CAP_DMA_AVAIL = 3

REGION_FLAGS = {1: "read", 2: "write", 4: "mmap", 8: "caps"}
IRQ_FLAGS = {1: "eventfd", 2: "maskable", 4: "automasked", 8: "noresize"}
DEVICE_FLAGS = {
    1: "reset",
    2: "pci",
    4: "platform",
    8: "amba",
    16: "ccw",
    32: "ap",
    64: "fsl-mc",
    128: "caps",
    256: "cdx",
}


def names(flags: int, table: dict[int, str]) -> tuple[str, ...]:
    """The names of the bits set; a bit without a name appears as hexadecimal."""
    found = [name for bit, name in table.items() if flags & bit]
    rest = flags & ~sum(table)
    return tuple(found + ([hex(rest)] if rest else []))


@dataclass(frozen=True, slots=True)
class InfoCapability:
    """One link of a chain: `body` is what follows its header, up to the end of the buffer."""

    id: int
    version: int
    body: bytes


def walk(buffer: bytes, offset: int, head_bytes: int, what: str) -> list[InfoCapability]:
    """The capabilities from `offset` on (0: none; a set CAPS flag can come with offset 0)."""
    found: list[InfoCapability] = []
    seen: set[int] = set()
    while offset:
        if offset in seen or len(seen) >= HOP_LIMIT:
            raise KernelError(f"{what}: its chain of capabilities loops at {offset:#x}")
        if offset < head_bytes or offset + _HEADER.size > len(buffer):
            raise KernelError(f"{what}: a capability lies outside the answer, at {offset:#x}")
        seen.add(offset)
        number, version, following = _HEADER.unpack_from(buffer, offset)
        found.append(InfoCapability(number, version, buffer[offset + _HEADER.size :]))
        offset = following
    return found


def _take(layout: str, body: bytes, what: str, at: int = 0) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, body, at)
    except struct.error:
        raise KernelError(f"{what}: the kernel's answer is cut short") from None


@dataclass(frozen=True, slots=True)
class Area:
    """A part of a region: `offset` and `size` in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """`struct vfio_region_info`.

    `position` is where the region lies in the device's file. `areas` are the parts that can be
    mapped: the whole region, or what its sparse-mmap capability lists, or nothing. `type` and
    `subtype` are those of a device-specific region.
    """

    index: int
    size: int
    position: int
    readable: bool
    writable: bool
    areas: tuple[Area, ...]
    msix_mappable: bool
    type: int | None
    subtype: int | None
    flags: tuple[str, ...]


def parse_region(buffer: bytes, index: int) -> RegionInfo:
    """From the bytes of VFIO_DEVICE_GET_REGION_INFO."""
    what = f"region {index}"
    _, flags, _, cap_offset, size, position = _take("=IIIIQQ", buffer, what)
    areas: tuple[Area, ...] = (Area(0, size),) if flags & 4 and size else ()
    kind: tuple[int | None, int | None] = (None, None)
    msix = False
    for capability in walk(buffer, cap_offset if flags & 8 else 0, 32, what):
        if capability.id == CAP_SPARSE_MMAP:
            areas = _sparse(capability.body, size, what) if flags & 4 else ()
        elif capability.id == CAP_TYPE:
            number, subnumber = _take("=II", capability.body, what)
            kind = (number, subnumber)
        elif capability.id == CAP_MSIX_MAPPABLE:
            msix = True
    return RegionInfo(
        index=index,
        size=size,
        position=position,
        readable=bool(flags & 1),
        writable=bool(flags & 2),
        areas=areas,
        msix_mappable=msix,
        type=kind[0],
        subtype=kind[1],
        flags=names(flags, REGION_FLAGS),
    )


def _sparse(body: bytes, size: int, what: str) -> tuple[Area, ...]:
    count, _ = _take("=II", body, what)
    areas = []
    for index in range(min(count, len(body) // 16 + 1)):
        offset, length = _take("=QQ", body, what, 8 + 16 * index)
        if offset + length > size:
            raise KernelError(f"{what}: a mappable area lies outside it, at {offset:#x}")
        if length:
            areas.append(Area(offset, length))
    return tuple(areas)


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """`struct vfio_irq_info`: `count` interrupts of one index."""

    index: int
    count: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """`struct vfio_device_info`. `kinds` are the flags by name; `capabilities` their ids."""

    num_regions: int
    num_irqs: int
    kinds: tuple[str, ...]
    capabilities: tuple[int, ...]

    @property
    def has_reset(self) -> bool:
        """VFIO_DEVICE_FLAGS_RESET."""
        return "reset" in self.kinds

    @property
    def is_pci(self) -> bool:
        """VFIO_DEVICE_FLAGS_PCI: the fixed PCI indices of regions and interrupts hold."""
        return "pci" in self.kinds


def parse_device(buffer: bytes) -> DeviceInfo:
    """From the bytes of VFIO_DEVICE_GET_INFO."""
    _, flags, regions, irqs, cap_offset = _take("=IIIII", buffer, "device info")
    chain = walk(buffer, cap_offset if flags & 128 else 0, 20, "device info")
    return DeviceInfo(regions, irqs, names(flags, DEVICE_FLAGS), tuple(cap.id for cap in chain))


@dataclass(frozen=True, slots=True)
class Type1Info:
    """`struct vfio_iommu_type1_info`.

    `page_sizes` is a bitmap; `ranges` are (start, last) pairs, or None where the kernel tells
    none (a container of mdevs alone); `mappings_left` is None before 5.10.
    """

    page_sizes: int
    ranges: tuple[tuple[int, int], ...] | None
    mappings_left: int | None
    dirty_page_sizes: int


def parse_type1(buffer: bytes) -> Type1Info:
    """From the bytes of VFIO_IOMMU_GET_INFO."""
    what = "container info"
    _, flags, page_sizes, cap_offset = _take("=IIQI", buffer, what)
    ranges: tuple[tuple[int, int], ...] | None = None
    left: int | None = None
    dirty = 0
    for capability in walk(buffer, cap_offset if flags & 2 else 0, 20, what):
        body = capability.body
        if capability.id == CAP_IOVA_RANGE:
            count = _take("=II", body, what)[0]
            pairs = [_take("=QQ", body, what, 8 + 16 * i) for i in range(min(count, len(body)))]
            ranges = tuple((pair[0], pair[1]) for pair in pairs)
        elif capability.id == CAP_TYPE1_MIGRATION:
            dirty = _take("=IIQQ", body, what)[2]
        elif capability.id == CAP_DMA_AVAIL:
            left = _take("=I", body, what)[0]
    return Type1Info(page_sizes if flags & 1 else 4096, ranges, left, dirty)
