"""What planning needs to know of a host, read once into a frozen value.

Only the devices that a command or a policy is about are read whole: a host may have thousands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from vfiotool.change.journal import Journal
from vfiotool.change.steps.state import (
    Binding,
    Identity,
    read_binding,
    read_num_vfs,
    read_pci_identity,
)
from vfiotool.devices.pci import Address, parse_uevent, read_uevent_text
from vfiotool.devices.sriov import read_eswitch_mode, read_vfs
from vfiotool.errors import NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    PROC_OSRELEASE,
    SYS_IOMMU_GROUPS,
    SYS_MODULE,
    SYS_PCI_DEVICES,
    SYS_PCI_DRIVERS,
)
from vfiotool.host.tree import Tree

DEFAULT_DRIVER = "vfio-pci"
_VFIO_ALIAS = "alias vfio_pci:"


@dataclass(frozen=True)
class SriovFacts:
    """A physical function's VFs; `vfs` by index. `offset` and `stride` place VFs not yet made.

    `eswitch` is as `read_eswitch_mode` gives it; None as well where nobody asked for it.
    """

    total: int
    num: int
    autoprobe: bool | None
    offset: int | None
    stride: int | None
    vf_device: str | None
    vfs: tuple[str, ...]
    eswitch: str | None = None


@dataclass(frozen=True)
class DeviceFacts:
    """One PCI function. `best_driver` is the VFIO driver made for it, else vfio-pci."""

    address: str
    identity: Identity
    class_code: str | None
    binding: Binding
    group: int | None
    physfn: str | None
    sriov: SriovFacts | None
    origin: Binding | None
    best_driver: str

    @property
    def is_bridge(self) -> bool:
        return self.class_code is not None and self.class_code.startswith("06")


@dataclass(frozen=True)
class Facts:
    """The devices read, the members of their groups by name, and the drivers registered.

    `vfio_makes_vfs` is vfio-pci's `enable_sriov`; None if it is not loaded or has no such option.
    """

    devices: Mapping[str, DeviceFacts]
    members: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    drivers: frozenset[str] = frozenset()
    noiommu: bool = False
    vfio_makes_vfs: bool | None = None

    def device(self, address: str) -> DeviceFacts:
        """Raises NotFound."""
        found = self.devices.get(address)
        if found is None:
            raise NotFound(
                f"there is no PCI device {address}",
                hint="vfiotool devices lists what there is",
                device=address,
            )
        return found


def read_facts(
    host: Host,
    addresses: Iterable[str],
    journal: Journal | None = None,
    *,
    whole_groups: bool = False,
    variants_wanted: bool = True,
    eswitch_wanted: bool = False,
) -> Facts:
    """Facts of these functions, their VFs and, with `whole_groups`, all of their groups.

    Functions that are not there are left out; without `variants_wanted` the best driver of all is
    vfio-pci, without `eswitch_wanted` no card is asked for its mode. Raises Stuck if a device's
    lock is held.
    """
    variants = read_variants(host) if variants_wanted else ()
    devices: dict[str, DeviceFacts] = {}
    members: dict[int, tuple[str, ...]] = {}
    pending = list(dict.fromkeys(addresses))
    while pending:
        address = pending.pop()
        if address in devices:
            continue
        try:
            device = _read_device(host, address, journal, variants, eswitch_wanted)
        except NotFound:
            continue
        devices[address] = device
        if device.sriov is not None:
            pending.extend(device.sriov.vfs)
        if device.group is not None and device.group not in members:
            names = host.listdir(f"{SYS_IOMMU_GROUPS}/{device.group}/devices")
            members[device.group] = tuple(names)
            if whole_groups:
                pending.extend(name for name in names if Address.is_address(name))
    noiommu = host.read(f"{SYS_MODULE}/vfio/parameters/enable_unsafe_noiommu_mode") == "Y"
    makes_vfs = host.read(f"{SYS_MODULE}/vfio_pci/parameters/enable_sriov")
    return Facts(
        devices,
        members,
        frozenset(host.listdir(SYS_PCI_DRIVERS)),
        noiommu,
        None if makes_vfs is None else makes_vfs == "Y",
    )


def _read_device(
    host: Host,
    address: str,
    journal: Journal | None,
    variants: tuple[Variant, ...],
    eswitch_wanted: bool,
) -> DeviceFacts:
    base = f"{SYS_PCI_DEVICES}/{address}"
    identity = read_pci_identity(host, address)
    uevent = parse_uevent(read_uevent_text(host, base) or "")
    class_code = uevent.get("PCI_CLASS")
    group = host.linkname(f"{base}/iommu_group")
    return DeviceFacts(
        address=address,
        identity=identity,
        class_code=None if class_code is None else class_code.lower().zfill(6),
        binding=read_binding(host, "pci", address),
        group=int(group) if group is not None and group.isdecimal() else None,
        physfn=host.linkname(f"{base}/physfn"),
        sriov=_read_sriov(host, address, eswitch_wanted),
        origin=None if journal is None else journal.origin("pci", address, identity),
        best_driver=best_driver(uevent.get("MODALIAS"), variants),
    )


def _read_sriov(host: Host, pf: str, eswitch_wanted: bool) -> SriovFacts | None:
    base = f"{SYS_PCI_DEVICES}/{pf}"
    total = host.read_int(f"{base}/sriov_totalvfs")
    if total is None:
        return None
    autoprobe = host.read_int(f"{base}/sriov_drivers_autoprobe")
    vf_device = host.read(f"{base}/sriov_vf_device")
    return SriovFacts(
        total=total,
        num=read_num_vfs(host, pf),
        autoprobe=None if autoprobe is None else bool(autoprobe),
        offset=host.read_int(f"{base}/sriov_offset"),
        stride=host.read_int(f"{base}/sriov_stride"),
        # Written with %x, so without leading zeros (drivers/pci/iov.c, sriov_vf_device_show).
        vf_device=None if vf_device is None else vf_device.zfill(4),
        vfs=tuple(vf.address for vf in read_vfs(host, pf)),
        eswitch=read_eswitch_mode(host, pf) if eswitch_wanted else None,
    )


def vf_address(pf: str, sriov: SriovFacts, index: int) -> str | None:
    """Where a VF will appear (SR-IOV Specification 2.1.2), or None if the host does not tell."""
    if index < len(sriov.vfs):
        return sriov.vfs[index]
    if sriov.offset is None or sriov.stride is None:
        return None
    place = Address.parse(pf)
    routing = (place.bus << 8) + (place.device << 3) + place.function
    routing += sriov.offset + sriov.stride * index
    return str(Address(place.domain, routing >> 8, (routing >> 3) & 0x1F, routing & 7))


@dataclass(frozen=True)
class Variant:
    """A `vfio_pci:` alias: which functions a VFIO driver is made for."""

    pattern: re.Pattern[str]
    exactness: int
    driver: str


# Reading a megabyte of aliases is what planning a bind costs most: once a tree is enough.
_VARIANTS: WeakKeyDictionary[Tree, tuple[Variant, ...]] = WeakKeyDictionary()


def read_variants(host: Host) -> tuple[Variant, ...]:
    """The VFIO drivers that the kernel's modules offer, most exact first; read once a host.

    Source: include/linux/mod_devicetable.h, PCI_ID_F_VFIO_DRIVER_OVERRIDE.
    """
    found = _VARIANTS.get(host.tree)
    if found is None:
        release = host.read(PROC_OSRELEASE)
        text = host.read(f"/lib/modules/{release}/modules.alias") if release else None
        found = _VARIANTS[host.tree] = parse_variants(text or "")
    return found


def parse_variants(text: str) -> tuple[Variant, ...]:
    """The `alias vfio_pci:… module` lines of a modules.alias."""
    found = []
    for line in _alias_lines(text):
        words = line.split()
        if len(words) != 3:
            continue
        alias = words[1].removeprefix("vfio_pci:")
        # Globs of modprobe: `*` alone occurs in these aliases.
        pattern = re.compile(
            ".*".join(re.escape(piece) for piece in alias.split("*")), re.IGNORECASE
        )
        found.append(Variant(pattern, len(alias.replace("*", "")), driver_of_module(words[2])))
    return tuple(sorted(found, key=lambda variant: -variant.exactness))


def _alias_lines(text: str) -> Iterator[str]:
    """The few lines of a megabyte, found as fast as memory is read."""
    at = text.find(_VFIO_ALIAS)
    while at >= 0:
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if at == 0 or text[at - 1] == "\n":
            yield text[at:end]
        at = text.find(_VFIO_ALIAS, end)


def driver_of_module(module: str) -> str:
    """The name under which a VFIO module registers its driver.

    All but one write it with dashes (drivers/vfio/pci; qat's is "qat_vfio_pci").
    """
    return module if module == "qat_vfio_pci" else module.replace("_", "-")


def best_driver(modalias: str | None, variants: tuple[Variant, ...]) -> str:
    """The most exact VFIO driver for a device's `pci:v…` modalias, else vfio-pci."""
    name = (modalias or "").removeprefix("pci:")
    for variant in variants:
        if variant.pattern.fullmatch(name):
            return variant.driver
    return DEFAULT_DRIVER
