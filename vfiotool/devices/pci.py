"""PCI functions as sysfs shows them: address, identity, driver, BARs, link, resets.

Source: Documentation/ABI/testing/sysfs-bus-pci, Documentation/PCI/sysfs-pci.rst.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import NamedTuple

from vfiotool.devices.identity import is_vfio_driver, parse_id_pair, read_uevent
from vfiotool.errors import UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES

_ADDRESS = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE | re.ASCII
)
# include/linux/ioport.h
_IORESOURCE_IO = 0x100
_IORESOURCE_MEM = 0x200
_IORESOURCE_PREFETCH = 0x2000
_IORESOURCE_MEM_64 = 0x100000
_UNSET = " 0x0000000000000000"
# Six BARs and the expansion ROM; later lines are SR-IOV BARs and bridge windows.
_OWN_RESOURCES = 7


class Address(NamedTuple):
    """A PCI function's place: domain, bus, device, function. Sorts as the bus is laid out."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `0000:05:01.0` or the short `05:01.0`. Raises UsageError for anything else.

        A domain may have more than four digits (VMD and Hyper-V make such domains).
        """
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{text[:80]!r} is not a PCI address",
                hint="write it as 0000:05:01.0 or 05:01.0; vfiotool devices lists them",
            )
        domain, bus, device, function = match.groups()
        return cls(int(domain or "0", 16), int(bus, 16), int(device, 16), int(function))

    @classmethod
    def is_address(cls, text: str) -> bool:
        return _ADDRESS.fullmatch(text) is not None

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """What one read of `uevent` tells of a function.

    Identifiers are lower-case hexadecimal without 0x; None where the host does not tell.
    """

    address: str
    vendor: str | None
    device: str | None
    subsystem_vendor: str | None
    subsystem_device: str | None
    class_code: str | None
    driver: str | None

    @property
    def is_bridge(self) -> bool:
        """Whether the base class is 06h, bridge device (PCI Code and ID Assignment, 1.7)."""
        return self.class_code is not None and self.class_code.startswith("06")


@dataclass(frozen=True, slots=True)
class BarRegion:
    """A BAR (`index` 0 to 5) or the expansion ROM (6). `start` and `size` are in bytes."""

    index: int
    start: int
    size: int
    kind: str
    prefetchable: bool
    bits: int


@dataclass(frozen=True, slots=True)
class Link:
    """A PCIe link now and at best. Speeds in GT/s; None where the port reports none."""

    speed_gts: float | None
    width: int | None
    max_speed_gts: float | None
    max_width: int | None


@dataclass(frozen=True, slots=True)
class Sriov:
    """A physical function's VFs. `autoprobe`: whether new VFs are offered to host drivers."""

    total_vfs: int | None
    num_vfs: int | None
    autoprobe: bool | None


@dataclass(frozen=True, slots=True)
class PciFunction(PciIdentity):
    """One function as sysfs's attributes show it; configuration space is `capabilities.py`'s.

    `path` is its directory below `/sys/devices`; `iommu` the IOMMU that it sits behind (`dmar0`);
    `label` the firmware's name for it (Documentation/ABI/testing/sysfs-bus-pci, label);
    `has_vfio_device`: its driver has made a VFIO device of it (`vfio-dev/`, since Linux 6.1).
    """

    path: str
    revision: str | None
    driver_override: str | None
    iommu_group: int | None
    numa_node: int | None
    boot_vga: bool | None
    sriov: Sriov | None
    physfn: str | None
    vf_index: int | None
    reset_methods: tuple[str, ...]
    regions: tuple[BarRegion, ...]
    link: Link | None
    modalias: str | None = None
    power_state: str | None = None
    d3cold_allowed: bool | None = None
    iommu: str | None = None
    label: str | None = None
    has_vfio_device: bool = False

    @property
    def on_vfio(self) -> bool:
        """Whether user space opens it through VFIO: what counts is the device node.

        A vendor's driver may make one itself and keep its own name (NVIDIA's vGPUs).
        """
        return self.has_vfio_device or (self.driver is not None and is_vfio_driver(self.driver))


def parse_uevent(text: str) -> dict[str, str]:
    """`KEY=value` lines as a dictionary; lines without `=` are passed over.

    Lines end at newlines alone: other characters that Unicode counts as line ends may stand in a
    value, and must not begin a key.
    """
    return dict(line.split("=", 1) for line in text.split("\n") if "=" in line)


def parse_identity(address: str, uevent: str) -> PciIdentity:
    """A function's identity from its `uevent` text (drivers/pci/pci-driver.c, pci_uevent)."""
    keys = parse_uevent(uevent)
    return PciIdentity(address, *_ids(keys), driver=keys.get("DRIVER"))


def _ids(
    keys: Mapping[str, str],
) -> tuple[str | None, str | None, str | None, str | None, str | None]:
    """Vendor, device, the subsystem's vendor and device, and the class code."""
    class_code = keys.get("PCI_CLASS")
    return (
        *parse_id_pair(keys.get("PCI_ID")),
        *parse_id_pair(keys.get("PCI_SUBSYS_ID")),
        None if class_code is None else class_code.lower().zfill(6),
    )


def parse_resource(text: str) -> tuple[BarRegion, ...]:
    """The BARs and ROM of a `resource` file; unset and malformed lines are passed over."""
    regions = []
    for index, line in enumerate(text.split("\n", _OWN_RESOURCES)[:_OWN_RESOURCES]):
        if line.endswith(_UNSET):
            continue
        try:
            first, last, kind = line.split()
            start, end, flags = int(first, 16), int(last, 16), int(kind, 16)
        except ValueError:
            continue
        if not flags & (_IORESOURCE_IO | _IORESOURCE_MEM) or end < start or end == 0:
            continue
        regions.append(
            BarRegion(
                index=index,
                start=start,
                size=end - start + 1,
                kind="io" if flags & _IORESOURCE_IO else "mem",
                prefetchable=bool(flags & _IORESOURCE_PREFETCH),
                bits=64 if flags & _IORESOURCE_MEM_64 else 32,
            )
        )
    return tuple(regions)


def parse_speed(text: str | None) -> float | None:
    """`"8.0 GT/s PCIe"` -> 8.0; None for `"Unknown"` and the absent."""
    try:
        speed = float((text or "").split()[0])
    except (ValueError, IndexError):
        return None
    # JSON has neither "nan" nor "inf", which float() takes.
    return speed if isfinite(speed) else None


def list_addresses(host: Host) -> list[str]:
    """The addresses of all PCI functions, in bus order; names that are no address are left out."""
    names = host.listdir(SYS_PCI_DEVICES)
    # Sorting text equals sorting the bus as long as all domains have four digits.
    if all(len(name) == 12 for name in names):
        return names
    parsed = sorted(Address.parse(name) for name in names if Address.is_address(name))
    return [str(address) for address in parsed]


def read_identity(host: Host, address: str) -> PciIdentity | None:
    """The function's identity, or None if it is gone."""
    text = read_uevent_text(host, f"{SYS_PCI_DEVICES}/{address}")
    return None if text is None else parse_identity(address, text)


def read_uevent_text(host: Host, base: str) -> str | None:
    """What a function's `uevent` tells, read past the device's lock; None if it is gone."""
    data = read_uevent(host.tree, base)
    return None if data is None else data.decode("utf-8", "backslashreplace")


def read_function(host: Host, address: str) -> PciFunction | None:
    """All that sysfs tells of one function, or None if it is gone (hot-unplugged meanwhile)."""
    found = read_functions(host, [address])
    return found[0] if found else None


def read_functions(
    host: Host, addresses: Iterable[str], *, links: bool = True, indices: VfIndices | None = None
) -> tuple[PciFunction, ...]:
    """The functions of these addresses, in their order; those that are gone are left out.

    Without `links` each function's `link` is None: who reads configuration space anyway finds it
    there, and spares four attributes of each function. `indices` are the caller's, if it needs
    them for more than this.

    What the kernel answers under the device's lock (`driver_override`, `sriov_numvfs`) is read
    for all at once and with a deadline: it is None for a device that is stuck in an unbind
    (drivers/pci/pci-sysfs.c, driver_override_show; drivers/pci/iov.c, sriov_numvfs_show).
    """
    parents: dict[str, str | None] = {}
    totals: dict[str, int | None] = {}
    locked = []
    for name in addresses:
        base = f"{SYS_PCI_DEVICES}/{name}"
        parents[name] = host.linkname(f"{base}/physfn")
        # A VF has no VFs: an attribute less to look for on hosts that have thousands of them.
        totals[name] = host.read_int(f"{base}/sriov_totalvfs") if parents[name] is None else None
        locked.append(f"{base}/driver_override")
        if totals[name] is not None:
            locked.append(f"{base}/sriov_numvfs")
    answers = host.read_guarded(locked)
    indices = VfIndices(host) if indices is None else indices
    found = []
    for name, parent in parents.items():
        index = None if parent is None else indices.of(parent).get(name)
        function = _read_function(host, name, answers, totals[name], parent, index)
        if function is not None and links:
            function = replace(function, link=read_link(host, name))
        if function is not None:
            found.append(function)
    return tuple(found)


def _read_function(
    host: Host,
    address: str,
    answers: Mapping[str, str | None],
    total_vfs: int | None,
    physfn: str | None,
    vf_index: int | None,
) -> PciFunction | None:
    base = f"{SYS_PCI_DEVICES}/{address}"
    text = read_uevent_text(host, base)
    path = host.realpath(base)
    if text is None or path is None:
        return None
    keys = parse_uevent(text)
    vendor, device, subsystem_vendor, subsystem_device, class_code = _ids(keys)

    def read(name: str) -> str | None:
        return host.read(f"{base}/{name}")

    def number(name: str) -> int | None:
        return host.read_int(f"{base}/{name}")

    def link(name: str) -> str | None:
        return host.linkname(f"{base}/{name}")

    is_display = (class_code or "").startswith("03")
    group, revision = link("iommu_group"), read("revision")
    override, numa_node = answers.get(f"{base}/driver_override"), number("numa_node")
    return PciFunction(
        address=address,
        vendor=vendor,
        device=device,
        subsystem_vendor=subsystem_vendor,
        subsystem_device=subsystem_device,
        class_code=class_code,
        driver=keys.get("DRIVER"),
        path=path,
        revision=None if revision is None else revision.removeprefix("0x"),
        driver_override=None if override in (None, "", "(null)") else override,
        iommu_group=int(group) if group is not None and group.isdecimal() else None,
        numa_node=None if numa_node is None or numa_node < 0 else numa_node,
        boot_vga=_flag(number("boot_vga")) if is_display else None,
        sriov=_sriov(number, total_vfs, answers.get(f"{base}/sriov_numvfs")),
        physfn=physfn,
        vf_index=vf_index,
        reset_methods=tuple((read("reset_method") or "").split()),
        regions=parse_resource(read("resource") or ""),
        link=None,
        modalias=keys.get("MODALIAS"),
        power_state=read("power_state"),
        d3cold_allowed=_flag(number("d3cold_allowed")),
        iommu=link("iommu"),
        label=read("label") if physfn is None else None,
        has_vfio_device="DRIVER" in keys and host.isdir(f"{base}/vfio-dev"),
    )


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def read_link(host: Host, address: str) -> Link | None:
    """A function's link from its attributes; None if it is no PCI Express function."""
    base = f"{SYS_PCI_DEVICES}/{address}"
    width = host.read_int(f"{base}/max_link_width")
    if width is None:
        return None
    return Link(
        speed_gts=parse_speed(host.read(f"{base}/current_link_speed")),
        width=_lanes(host.read_int(f"{base}/current_link_width")),
        max_speed_gts=parse_speed(host.read(f"{base}/max_link_speed")),
        max_width=_lanes(width),
    )


def _lanes(width: int | None) -> int | None:
    """A link's width; 0 and 255 are the kernel's "not known" (include/linux/pci.h)."""
    return None if width in (0, 255) else width


def _sriov(
    number: Callable[[str], int | None], total_vfs: int | None, num_vfs: str | None
) -> Sriov | None:
    if total_vfs is None:
        return None
    return Sriov(
        total_vfs=total_vfs,
        num_vfs=int(num_vfs) if num_vfs is not None and num_vfs.isdecimal() else None,
        autoprobe=_flag(number("sriov_drivers_autoprobe")),
    )


def read_vf_indices(host: Host, physfn: str) -> dict[str, int]:
    """The index of each VF of a physical function by the VF's address (its `virtfnN` links)."""
    base = f"{SYS_PCI_DEVICES}/{physfn}"
    indices = {}
    for name in host.listdir(base):
        number = name.removeprefix("virtfn")
        address = host.linkname(f"{base}/{name}") if number.isdecimal() else None
        if number != name and address is not None:
            indices[address] = int(number)
    return indices


class VfIndices:
    """`read_vf_indices` for one physical function after another, each read once."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[str, dict[str, int]] = {}

    def of(self, physfn: str) -> dict[str, int]:
        known = self._known.get(physfn)
        if known is None:
            known = self._known[physfn] = read_vf_indices(self._host, physfn)
        return known
