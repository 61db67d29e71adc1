"""What planning needs to know of a host, read once into a frozen value.

Only the devices that a command or a policy is about are read whole: a host may have thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vfiotool.change.journal import Journal
from vfiotool.change.steps.state import (
    Binding,
    Identity,
    read_binding,
    read_num_vfs,
    read_pci_identity,
)
from vfiotool.devices.drivers import (
    Variant,
    best_driver,
    kernel_name,
    read_missing,
    read_variants,
)
from vfiotool.devices.pci import (
    IOMMU_CLASS,
    Address,
    is_bridge_class,
    parse_uevent,
    read_uevent_text,
)
from vfiotool.devices.sriov import read_eswitch_mode, read_vfs
from vfiotool.devices.vgpu import type_path
from vfiotool.errors import NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    SYS_IOMMU_GROUPS,
    SYS_MODULE,
    SYS_PCI_DEVICES,
    SYS_PCI_DRIVERS,
)


@dataclass(frozen=True)
class SriovFacts:
    """A physical function's VFs; `vfs` by index. `offset` and `stride` place VFs not yet made.

    `last_bus` is the highest bus number that its VFs can have; `vf_memory` is False where none of
    the VFs' memory has been given addresses; both are None where the host does not tell.
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
    last_bus: int | None = None
    vf_memory: bool | None = None


@dataclass(frozen=True)
class DeviceFacts:
    """One PCI function. `best_driver` is the VFIO driver made for it, else vfio-pci.

    `vgpu_type` is that of a VF on NVIDIA's driver, 0 for none; None for all else.
    """

    address: str
    identity: Identity
    class_code: str | None
    binding: Binding
    group: int | None
    physfn: str | None
    sriov: SriovFacts | None
    origin: Binding | None
    best_driver: str
    vgpu_type: int | None = None

    @property
    def is_bridge(self) -> bool:
        return is_bridge_class(self.class_code)

    @property
    def stays(self) -> bool:
        """Whether it is no endpoint that goes along with its group."""
        return self.is_bridge or (self.class_code or "").startswith(IOMMU_CLASS)


@dataclass(frozen=True)
class Facts:
    """The devices read, the members of their groups by name, and the drivers registered.

    `vfio_makes_vfs` is vfio-pci's `enable_sriov`; None if it is not loaded or has no such option.
    `missing` are those of the drivers asked about that neither the kernel nor a module has.
    """

    devices: Mapping[str, DeviceFacts]
    members: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    drivers: frozenset[str] = frozenset()
    noiommu: bool = False
    vfio_makes_vfs: bool | None = None
    missing: frozenset[str] = frozenset()

    def driver(self, name: str) -> str:
        """A driver's name as this kernel has it, however it was spelt."""
        return kernel_name(name, self.drivers)

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
    drivers_wanted: Iterable[str] = (),
) -> Facts:
    """Facts of these functions, their VFs and, with `whole_groups`, all of their groups.

    `drivers_wanted` are the drivers that somebody asks for by name: the facts tell which of them
    nobody has. Functions that are not there are left out; without `variants_wanted` the best
    driver of all is vfio-pci, without `eswitch_wanted` no card is asked for its mode. Raises Stuck
    if a device's lock is held.
    """
    variants = read_variants(host) if variants_wanted else ()
    drivers = frozenset(host.listdir(SYS_PCI_DRIVERS))
    devices: dict[str, DeviceFacts] = {}
    members: dict[int, tuple[str, ...]] = {}
    pending = list(dict.fromkeys(addresses))
    while pending:
        address = pending.pop()
        if address in devices:
            continue
        try:
            device = _read_device(host, address, journal, variants, drivers, eswitch_wanted)
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
        drivers,
        noiommu,
        None if makes_vfs is None else makes_vfs == "Y",
        read_missing(host, drivers_wanted, drivers),
    )


def _read_device(
    host: Host,
    address: str,
    journal: Journal | None,
    variants: tuple[Variant, ...],
    drivers: frozenset[str],
    eswitch_wanted: bool,
) -> DeviceFacts:
    base = f"{SYS_PCI_DEVICES}/{address}"
    identity = read_pci_identity(host, address)
    uevent = parse_uevent(read_uevent_text(host, base) or "")
    class_code = uevent.get("PCI_CLASS")
    group = host.linkname(f"{base}/iommu_group")
    physfn = host.linkname(f"{base}/physfn")
    return DeviceFacts(
        address=address,
        identity=identity,
        class_code=None if class_code is None else class_code.lower().zfill(6),
        binding=read_binding(host, "pci", address),
        group=int(group) if group is not None and group.isdecimal() else None,
        physfn=physfn,
        sriov=_read_sriov(host, address, eswitch_wanted),
        origin=None if journal is None else journal.origin("pci", address, identity),
        best_driver=kernel_name(best_driver(uevent.get("MODALIAS"), variants), drivers),
        vgpu_type=None if physfn is None else host.read_int(type_path(address)),
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
        last_bus=_read_last_bus(host, pf),
        vf_memory=_read_vf_memory(host, pf),
    )


def _read_last_bus(host: Host, pf: str) -> int | None:
    """The subordinate bus number of the bridge above (drivers/pci/iov.c: bus out of range)."""
    path = host.realpath(f"{SYS_PCI_DEVICES}/{pf}") or ""
    bridge = path.split("/")[-2] if path.count("/") > 1 else ""
    if not Address.is_address(bridge):
        return None
    return host.read_int(f"{SYS_PCI_DEVICES}/{bridge}/subordinate_bus_number")


def _read_vf_memory(host: Host, pf: str) -> bool | None:
    """Whether any BAR of the VFs has addresses: lines 8 to 13 of `resource`.

    Source: drivers/pci/pci-sysfs.c, resource_show; include/linux/pci.h, PCI_IOV_RESOURCES. None
    where the file ends before them, or where the function itself has no memory either.
    """
    lines = (host.read(f"{SYS_PCI_DEVICES}/{pf}/resource") or "").split("\n")
    if len(lines) < 13 or not any(map(_is_window, lines[:6])):
        return None
    return any(map(_is_window, lines[7:13]))


def _is_window(line: str) -> bool:
    return any(word.strip("0x") for word in line.split())


def vf_routing(pf: str, sriov: SriovFacts, index: int) -> int | None:
    """A VF's routing id: bus, device and function in 16 bits, or more where no bus holds it.

    Source: SR-IOV Specification 2.1.2. None if the host does not tell.
    """
    if sriov.offset is None or sriov.stride is None:
        return None
    place = Address.parse(pf)
    routing = (place.bus << 8) + (place.device << 3) + place.function
    return routing + sriov.offset + sriov.stride * index


def vf_address(pf: str, sriov: SriovFacts, index: int) -> str | None:
    """Where a VF will appear, or None if the host does not tell or no bus holds it."""
    if index < len(sriov.vfs):
        return sriov.vfs[index]
    routing = vf_routing(pf, sriov, index)
    if routing is None or routing > 0xFFFF:
        return None
    domain = Address.parse(pf).domain
    return str(Address(domain, routing >> 8, (routing >> 3) & 0x1F, routing & 7))
