"""PCI functions as sysfs shows them: address, identity, driver, BARs, link, resets.

Source: Documentation/ABI/testing/sysfs-bus-pci, Documentation/PCI/sysfs-pci.rst.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import NamedTuple

from vfiotool.devices.identity import (
    as_uevent,
    is_vfio_driver,
    modalias_of,
    parse_id_pair,
    read_uevent,
)
from vfiotool.errors import UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES, SYS_VFIO_DEV

_ADDRESS = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE | re.ASCII
)
# include/linux/ioport.h
_IORESOURCE_IO = 0x100
_IORESOURCE_MEM = 0x200
_IORESOURCE_PREFETCH = 0x2000
_IORESOURCE_MEM_64 = 0x100000
_UNSET = " 0x0000000000000000"
_UNUSED = "0x0000000000000000 0x0000000000000000 0x0000000000000000"
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


# PCI-to-PCI, CardBus and semi-transparent bridges: functions with a bridge's header are refused
# (drivers/vfio/pci/vfio_pci_core.c, vfio_pci_core_register_device).
BRIDGE_CLASSES = ("0604", "0607", "0609")

# An IOMMU as a PCI function, such as AMD's, which has no driver and stays with the host.
IOMMU_CLASS = "0806"


def is_bridge_class(class_code: str | None) -> bool:
    """Whether it is the base class 06h, bridge device (PCI Code and ID Assignment, 1.7), but for
    0680h, "other bridge device": so vendors call what is none, such as NVIDIA's NVSwitch and the
    network cards of nForce chipsets."""
    return class_code is not None and class_code[:2] == "06" and class_code[:4] != "0680"


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
        """As `is_bridge_class`."""
        return is_bridge_class(self.class_code)


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
    `unread`: what of it is there, as far as is known, and could not be read (`"driver"`): it is
    None here and not absent.
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
    unread: tuple[str, ...] = ()

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
        if line == _UNUSED or line.endswith(_UNSET):
            continue
        try:
            first, last, kind = line.split()
            start, end, flags = int(first, 16), int(last, 16), int(kind, 16)
        except ValueError:
            continue
        if not flags & (_IORESOURCE_IO | _IORESOURCE_MEM) or end < start or end == 0:
            continue
        kind = "io" if flags & _IORESOURCE_IO else "mem"
        bits = 64 if flags & _IORESOURCE_MEM_64 else 32
        prefetchable = bool(flags & _IORESOURCE_PREFETCH)
        regions.append(BarRegion(index, start, end - start + 1, kind, prefetchable, bits))
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
    host: Host,
    addresses: Iterable[str],
    *,
    links: bool = True,
    indices: VfIndices | None = None,
    keep_config: Callable[[str, bytes], object] | None = None,
) -> tuple[PciFunction, ...]:
    """The functions of these addresses, in their order; those that are gone are left out.

    Without `links` each function's `link` is None: who reads configuration space anyway finds it
    there, and spares four attributes of each function. `indices` are the caller's, if it needs
    them for more than this. `keep_config` is told the address and configuration space of each
    function as it is read, where it can be read.

    What the kernel answers under the device's lock (`driver_override`, `sriov_numvfs`) is read
    for all at once and with a deadline: it is None for a device that is stuck in an unbind
    (drivers/pci/pci-sysfs.c, driver_override_show; drivers/pci/iov.c, sriov_numvfs_show).
    """
    indices = VfIndices(host) if indices is None else indices
    reader = _FunctionReader(host, indices, keep_config)
    paths = host.realpaths(SYS_PCI_DEVICES, addresses)
    found = [item for item in map(reader.read, paths, paths.values()) if item is not None]
    answers = host.read_guarded(reader.locked)
    return tuple(_complete(host, item, answers, links=links) for item in found)


# What a function's folder tells with one call.
_FILES = (
    *("resource", "modalias", "revision", "numa_node", "reset_method", "power_state"),
    "d3cold_allowed",
)
_LINKS = ("iommu_group", "driver", "iommu", "physfn")
# What the kernel answers for a link that is not there, of a function that may have gone.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.EINVAL)
# These are not looked for below VFs, of which hosts have thousands.
_PF_FILES = ("sriov_totalvfs", "sriov_drivers_autoprobe", "label")


class _Shared(NamedTuple):
    """What functions have in common, so that it is parsed once: see `PciFunction`.

    `ids` are vendor, device, those of the subsystem, and the class code.
    """

    ids: tuple[str | None, str | None, str | None, str | None, str | None]
    driver: str | None
    revision: str | None
    driver_override: str | None
    numa_node: int | None
    physfn: str | None
    reset_methods: tuple[str, ...]
    modalias: str | None
    power_state: str | None
    d3cold_allowed: bool | None
    iommu: str | None
    unread: tuple[str, ...]


class _FunctionReader:
    """Reads one function after another, parsing what they have in common once.

    `locked` has the paths of what the kernel answers under the lock of the devices read; where no
    kernel answers, that is `sriov_numvfs` alone, which few have.
    """

    def __init__(
        self,
        host: Host,
        indices: VfIndices,
        keep_config: Callable[[str, bytes], object] | None = None,
    ) -> None:
        self._host = host
        self._indices = indices
        self._keep_config = keep_config
        self._files = _FILES if host.live else (*_FILES, "driver_override")
        if keep_config is not None:
            self._files = (*self._files, "config")
        self._known: dict[tuple[bytes | str | int, ...], _Shared] = {}
        self.locked: list[str] = []

    def read(self, address: str, path: str) -> PciFunction | None:
        """All but what is read under the device's lock; None if the function is gone."""
        host = self._host
        base = f"{SYS_PCI_DEVICES}/{address}"
        (resource, *files), (group, *links) = host.tree.read_many(base, self._files, _LINKS)
        if self._keep_config is not None and not isinstance(config := files.pop(), int):
            self._keep_config(address, config)
        key = (*files, *links)
        shared = self._known.get(key)
        if shared is None:
            shared = self._share(base, files, links)
            if shared is None:
                return None
            if not isinstance(files[0], int):
                self._known[key] = shared
        if host.live:
            self.locked.append(f"{base}/driver_override")
        ids, driver, revision, override, numa_node, physfn = shared[:6]
        is_display = ids[4] is not None and ids[4].startswith("03")
        number = "" if isinstance(group, int) else group.rpartition("/")[2]
        sriov, label = (None, None) if physfn is not None else self._read_pf(base)
        return PciFunction(
            address,
            *ids,
            driver,
            path,
            revision,
            override,
            int(number) if number.isdecimal() else None,
            numa_node,
            _flag(host.read_int(f"{base}/boot_vga")) if is_display else None,
            sriov,
            physfn,
            None if physfn is None else self._indices.of(physfn).get(address),
            shared.reset_methods,
            parse_resource(_text(resource) or ""),
            None,
            shared.modalias,
            shared.power_state,
            shared.d3cold_allowed,
            shared.iommu,
            label,
            driver is not None and self._has_vfio_devices and host.isdir(f"{base}/vfio-dev"),
            shared.unread,
        )

    def _read_pf(self, base: str) -> tuple[Sriov | None, str | None]:
        """What a function that is no VF may have: VFs of its own, but for their number, and the
        firmware's label."""
        total, autoprobe, label = map(_text, self._host.tree.read_many(base, _PF_FILES)[0])
        if (most := _number(total)) is None:
            return None, label
        self.locked.append(f"{base}/sriov_numvfs")
        return Sriov(most, None, _flag(_number(autoprobe))), label

    @cached_property
    def _has_vfio_devices(self) -> bool:
        """Whether any function may have one; so it is too where that cannot be seen."""
        try:
            return bool(self._host.tree.listdir(SYS_VFIO_DEV))
        except OSError as error:
            return error.errno != errno.ENOENT

    def _share(
        self, base: str, files: Sequence[bytes | int], links: Sequence[str | int]
    ) -> _Shared | None:
        driver, iommu, physfn = links
        known = modalias_of(files[0], driver)
        if known is not None:
            text: str | None = as_uevent(*known, base).decode("utf-8", "backslashreplace")
        else:
            text = read_uevent_text(self._host, base)
        if text is None:
            return None
        keys = parse_uevent(text)
        revision, numa, resets, power, d3cold, *override = map(_text, files[1:])
        numa_node = _number(numa)
        return _Shared(
            ids=_ids(keys),
            driver=keys.get("DRIVER"),
            revision=None if revision is None else revision.removeprefix("0x"),
            driver_override=_override(override[0]) if override else None,
            numa_node=None if numa_node is None or numa_node < 0 else numa_node,
            physfn=_last(physfn),
            reset_methods=tuple((resets or "").split()),
            modalias=keys.get("MODALIAS"),
            power_state=power,
            d3cold_allowed=_flag(_number(d3cold)),
            iommu=_last(iommu),
            unread=tuple(
                name
                for name, link in (("driver", driver), ("physfn", physfn))
                if isinstance(link, int) and link not in _ABSENT
            ),
        )


def _override(text: str | None) -> str | None:
    return None if text in ("", "(null)") else text


def _text(found: bytes | int) -> str | None:
    """As `Host.read` tells a file."""
    return None if isinstance(found, int) else found.decode("utf-8", "backslashreplace").strip()


def _number(text: str | None) -> int | None:
    """As `Host.read_int` tells a file."""
    try:
        return None if text is None else int(text, 0)
    except ValueError:
        return None


def _last(link: str | int) -> str | None:
    """As `Host.linkname` tells a link."""
    return None if isinstance(link, int) else link.rpartition("/")[2]


def _complete(
    host: Host, function: PciFunction, answers: Mapping[str, str | None], *, links: bool
) -> PciFunction:
    """The function with what its device's lock guards, and its link if that is asked for."""
    base = f"{SYS_PCI_DEVICES}/{function.address}"
    override = _override(answers.get(f"{base}/driver_override"))
    if override is not None:
        function = replace(function, driver_override=override)
    count = answers.get(f"{base}/sriov_numvfs")
    if function.sriov is not None and count is not None and count.isdecimal():
        function = replace(function, sriov=replace(function.sriov, num_vfs=int(count)))
    return replace(function, link=read_link(host, function.address)) if links else function


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


def read_vf_indices(host: Host, physfn: str) -> dict[str, int]:
    """The index of each VF of a physical function by the VF's address (its `virtfnN` links)."""
    base = f"{SYS_PCI_DEVICES}/{physfn}"
    names = tuple(
        name for name in host.listdir(base) if name[:6] == "virtfn" and name[6:].isdecimal()
    )
    targets = host.tree.read_many(base, (), names)[1] if names else []
    return {
        target.rpartition("/")[2]: int(name[6:])
        for name, target in zip(names, targets, strict=True)
        if not isinstance(target, int)
    }


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
