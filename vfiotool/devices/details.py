"""What a function's own attributes do not tell: configuration space, slot, VFIO, children.

Most of it is kept elsewhere in sysfs for all functions together, so it is looked up once a host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from vfiotool.devices.attached import Attached
from vfiotool.devices.config.decode import (
    HEADER_BYTES,
    SPACES_KEPT,
    ConfigSpace,
    Once,
    parse_config,
    read_config,
)
from vfiotool.devices.config.layout import Value
from vfiotool.devices.config.vpd import Vpd, parse_vpd
from vfiotool.devices.drivers import canonical_name
from vfiotool.devices.pci import (
    BRIDGE_CLASSES,
    Link,
    PciFunction,
    VfIndices,
    list_addresses,
    read_functions,
    read_link,
)
from vfiotool.devices.serial import serial_of
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    DEV_VFIO,
    PROC_OSRELEASE,
    SYS_MDEV_DEVICES,
    SYS_MDEV_PARENTS,
    SYS_PCI_DEVICES,
    SYS_PCI_DRIVERS,
    SYS_PCI_SLOTS,
    SYS_VDPA_DEVICES,
    SYS_VFIO_DEV,
)

_ALIAS = re.compile(rb"^alias vfio_pci:(\S+) (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Details:
    """One function's further facts.

    `config` is None where configuration space could not be read at all. `link` is the PCI Express
    link, from configuration space or else from the attributes. `slot` is the physical
    slot's name. `vfio_driver` is the VFIO driver that fits
    the function best and is there to be loaded, None where none is. `group_node` and `device_node`
    are the VFIO nodes that open it now (group, cdev). `mdev_parent` says whether mediated devices
    can be made of it; `mdevs` and `vdpas` name the children there are, `vfs` the enabled VFs.
    `interfaces` and `disks` are its own, as this network namespace shows them; `serial` is its
    Device Serial Number, or else that of its drive.
    """

    config: ConfigSpace | None
    link: Link | None
    slot: str | None
    vfio_driver: str | None
    group_node: str | None
    device_node: str | None
    mdev_parent: bool
    mdevs: tuple[str, ...]
    vdpas: tuple[str, ...]
    vfs: tuple[str, ...]
    interfaces: tuple[str, ...]
    disks: tuple[str, ...]
    serial: str | None


class DetailReader:
    """Reads functions' details; what they share is read once, on first need."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._drivers: dict[str, str | None] = {}
        self._vf_indices = VfIndices(host)
        self._link_of = Once(link_of, SPACES_KEPT)
        self._serial_of = Once(_serial_number, SPACES_KEPT)
        self._attached = Attached(host)
        self._configs: dict[str, ConfigSpace] = {}

    def functions(self, addresses: Iterable[str]) -> tuple[PciFunction, ...]:
        """The functions of these addresses, in their order; those that are gone are left out."""
        return read_functions(
            self._host,
            addresses,
            links=False,
            indices=self._vf_indices,
            keep_config=self._keep_config,
        )

    def _keep_config(self, address: str, data: bytes) -> None:
        self._configs[address] = parse_config(data)

    def read_all(self, addresses: Iterable[str]) -> Iterator[tuple[PciFunction, Details]]:
        """`functions` with their details."""
        for function in self.functions(addresses):
            yield function, self.read(function)

    def read(self, function: PciFunction) -> Details:
        """The details of one function; what vanished meanwhile is None or empty."""
        host, address = self._host, function.address
        vfs: tuple[str, ...] = ()
        if function.sriov is not None:
            indices = self._vf_indices.of(address)
            vfs = tuple(sorted(indices, key=lambda vf: indices[vf]))
        # What was read with the function is used once, and read anew if it is asked for again.
        config = self._configs.pop(address, None) or read_config(host, address)
        return Details(
            config=config,
            link=self._link(address, config),
            slot=self._slots.get(address.rpartition(".")[0]),
            vfio_driver=self.vfio_driver(function),
            group_node=self._group_node(function.iommu_group),
            device_node=self._device_nodes.get(address),
            mdev_parent=address in self._mdev_parents,
            mdevs=tuple(self._mdevs.get(address, ())),
            vdpas=tuple(self._vdpas.get(address, ())),
            vfs=vfs,
            interfaces=self._attached.interfaces(function.path),
            disks=self._attached.disks(function.path),
            serial=serial_of(host, function, None if config is None else self._serial_of(config)),
        )

    def _link(self, address: str, config: ConfigSpace | None) -> Link | None:
        if config is None or not config.complete or config.size <= HEADER_BYTES:
            return read_link(self._host, address)
        return self._link_of(config)

    def vfio_driver(self, function: PciFunction) -> str | None:
        """The best VFIO driver there is for a function: the alias with the fewest wildcards wins.

        Variant drivers (migration, quirks) carry an alias for their own devices, vfio-pci one for
        all (Documentation/driver-api/vfio.rst; kmod's modules.alias, include/linux/pci.h,
        PCI_DRIVER_OVERRIDE_DEVICE_VFIO). One that is built in shows as a registered driver.
        """
        if function.modalias is None or (function.class_code or "").startswith(BRIDGE_CLASSES):
            return None
        if function.modalias not in self._drivers:
            self._drivers[function.modalias] = self._best_driver(function.modalias)
        return self._drivers[function.modalias]

    def _best_driver(self, modalias: str) -> str | None:
        identity = modalias.removeprefix("pci:")
        fitting = [
            (pattern.count("*"), module)
            for pattern, module in self._aliases
            if fnmatchcase(identity, pattern)
        ]
        if fitting:
            module = min(fitting)[1]
            return canonical_name(module)
        return "vfio-pci" if self._host.isdir(f"{SYS_PCI_DRIVERS}/vfio-pci") else None

    @cached_property
    def _aliases(self) -> list[tuple[str, str]]:
        release = self._host.read(PROC_OSRELEASE)
        try:
            table = self._host.read_bytes(f"/lib/modules/{release}/modules.alias")
        except OSError:
            return []
        return [(line.decode(), module.decode()) for line, module in _ALIAS.findall(table)]

    @cached_property
    def _slots(self) -> dict[str, str]:
        """Slot names by domain, bus and device (`0000:05:00`)."""
        slots = {}
        for name in self._host.listdir(SYS_PCI_SLOTS):
            address = self._host.read(f"{SYS_PCI_SLOTS}/{name}/address")
            if address:
                slots[address] = name
        return slots

    @cached_property
    def _device_nodes(self) -> dict[str, str]:
        """The cdev of each function on a VFIO driver, on kernels that have them."""
        present = set(self._host.listdir(f"{DEV_VFIO}/devices"))
        parents = _children(self._host, SYS_VFIO_DEV, depth=3)
        return {
            parent: f"{DEV_VFIO}/devices/{name}"
            for parent, names in parents.items()
            for name in names
            if name in present
        }

    @cached_property
    def _group_nodes(self) -> frozenset[str]:
        return frozenset(self._host.listdir(DEV_VFIO))

    def _group_node(self, group: int | None) -> str | None:
        if not self._group_nodes:
            return None
        for name in (f"{group}", f"noiommu-{group}"):
            if name in self._group_nodes:
                return f"{DEV_VFIO}/{name}"
        return None

    @cached_property
    def _mdev_parents(self) -> frozenset[str]:
        return frozenset(self._host.listdir(SYS_MDEV_PARENTS))

    @cached_property
    def _mdevs(self) -> dict[str, list[str]]:
        return _children(self._host, SYS_MDEV_DEVICES, depth=2)

    @cached_property
    def _vdpas(self) -> dict[str, list[str]]:
        return _children(self._host, SYS_VDPA_DEVICES, depth=2)


def link_of(space: ConfigSpace) -> Link | None:
    """The link as the kernel's attributes tell it of the same registers.

    Source: drivers/pci/pci-sysfs.c, current_link_speed_show and following; drivers/pci/pci.c,
    pcie_get_speed_cap: the supported speeds of Link Capabilities 2 go before Link Capabilities.
    """
    express = space.find("pcie")
    if express is None:
        return None
    ability, status = express.fields.get("link_capabilities"), express.fields.get("link_status")
    if not isinstance(ability, dict) or not isinstance(status, dict):
        return Link(None, None, None, None)
    more = express.fields.get("link_capabilities_2")
    speeds = more["speeds_gts"] if isinstance(more, dict) else None
    best = speeds[-1] if isinstance(speeds, list) and speeds else ability["max_speed_gts"]
    return Link(
        speed_gts=_speed(status["speed_gts"]),
        width=_width(status["width"]),
        max_speed_gts=_speed(best),
        max_width=_width(ability["max_width"]),
    )


def _serial_number(space: ConfigSpace) -> str | None:
    return space.serial


def _speed(value: Value) -> float | None:
    return value if isinstance(value, float) else None


def _width(value: Value) -> int | None:
    return value if isinstance(value, int) and value else None


def read_details(host: Host) -> tuple[Details, ...]:
    """Every function's details, in bus order (and, for a snapshot, everything they are made of)."""
    return tuple(details for _, details in DetailReader(host).read_all(list_addresses(host)))


def read_vpd(host: Host, address: str) -> Vpd | None:
    """A function's Vital Product Data, or None: it has none, or it needs root.

    Reading takes the device's own time (a few milliseconds for each hundred bytes).
    """
    try:
        data = host.read_bytes(f"{SYS_PCI_DEVICES}/{address}/vpd")
    except OSError:
        return None
    return parse_vpd(data) if data else None


def _children(host: Host, directory: str, depth: int) -> dict[str, list[str]]:
    """The names in a class or bus folder by the device `depth - 1` levels above each of them."""
    found: dict[str, list[str]] = {}
    for name in host.listdir(directory):
        path = host.realpath(f"{directory}/{name}")
        pieces = [] if path is None else path.split("/")
        if len(pieces) > depth:
            found.setdefault(pieces[-depth], []).append(name)
    return found
