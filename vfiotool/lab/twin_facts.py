"""What of a snapshot a twin is made from: PCI functions, their places, the IOMMU. Frozen values."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from vfiotool.lab.machines import Iommu
from vfiotool.models import Resource, parse_resources
from vfiotool.snapshot.load import open_root

_DEVICES = "/sys/bus/pci/devices"
_IOMMUS = "/sys/class/iommu"
_NODES = "/sys/devices/system/node"
_NODE = re.compile(r"node[0-9]+", re.ASCII)
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.ASCII)
_DRIVER = re.compile("^DRIVER=(.+)$", re.MULTILINE)
_EXPRESS = 0x10
_PCI_BRIDGE = 0x0604
_HEADER_BYTES, _WITH_CAPABILITIES = 64, 256
# PCI Express Base 5.0, 7.5.3.2: Device/Port Type.
PORT_TYPES = {4: "root port", 5: "upstream", 6: "downstream", 7: "pcie to pci", 8: "pci to pcie"}


@dataclass(frozen=True, slots=True)
class TwinFunction:
    """One function of the original. `parents` are the bridges above it, the topmost first; `port`
    is what kind of bridge it is itself, or None. `group` is its IOMMU group's number as a name,
    `physfn` the function that a VF is of, `serial` what an NVMe controller tells."""

    address: str
    root: str
    parents: tuple[str, ...]
    port: str | None
    class_code: int
    vendor: int
    device: int
    config: bytes
    resources: tuple[Resource, ...]
    group: str | None
    numa_node: int
    driver: str | None
    is_vf: bool
    vfs: int
    acs_on: bool | None
    physfn: str | None = None
    serial: str | None = None

    @property
    def slot(self) -> int:
        return int(self.address.rpartition(":")[2][:2], 16)

    @property
    def function(self) -> int:
        return int(self.address[-1])

    @property
    def is_cut(self) -> bool:
        """Whether its capabilities could not be read: not by root, asleep, or gone."""
        return len(self.config) < _WITH_CAPABILITIES or not self.config[:4].strip(b"\xff")

    @property
    def ids(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x}"


@dataclass(frozen=True, slots=True)
class TwinHost:
    """The original: its functions by address, its IOMMU's kind and address width, how many NUMA
    nodes it has."""

    name: str
    functions: tuple[TwinFunction, ...]
    iommu: Iommu
    iommu_bits: int | None
    reserved: tuple[str, ...]
    nodes: int = 1

    def by_address(self) -> dict[str, TwinFunction]:
        return {one.address: one for one in self.functions}


def read_twin_host(path: str) -> TwinHost:
    """The host in a snapshot file, or in a folder laid out like /. Raises what `open_root` does."""
    host = open_root(path)
    functions = []
    for address in sorted(host.listdir(_DEVICES)):
        place = host.realpath(f"{_DEVICES}/{address}") if _ADDRESS.fullmatch(address) else None
        if place is None:
            continue
        parts = place.split("/")
        parents = tuple(part for part in parts[:-1] if _ADDRESS.fullmatch(part))
        root = next((part for part in parts if part.startswith("pci")), "pci0000:00")
        config = _bytes(host, f"{place}/config")
        word = host.read(f"{place}/class") or "0"
        functions.append(
            TwinFunction(
                address=address,
                root=root.removeprefix("pci"),
                parents=parents,
                port=_port(config),
                class_code=_number(word),
                vendor=_number(host.read(f"{place}/vendor") or "0"),
                device=_number(host.read(f"{place}/device") or "0"),
                config=config,
                resources=parse_resources(host.read(f"{place}/resource") or ""),
                group=host.linkname(f"{place}/iommu_group"),
                numa_node=host.read_int(f"{place}/numa_node") or 0,
                physfn=host.linkname(f"{place}/physfn"),
                serial=_serial(host, place),
                driver=_driver(host, place),
                is_vf=host.exists(f"{place}/physfn"),
                vfs=host.read_int(f"{place}/sriov_totalvfs") or 0,
                acs_on=_acs(config),
            )
        )
    kind, bits = _iommu(host)
    nodes = sum(bool(_NODE.fullmatch(name)) for name in host.listdir(_NODES)) or 1
    return TwinHost(path, _with_ports(functions), kind, bits, _reserved(host), nodes)


def _with_ports(functions: list[TwinFunction]) -> tuple[TwinFunction, ...]:
    """What kind of port a bridge is whose capabilities are not known: pcieport is on PCIe ports
    alone, whose kinds alternate; one that is in a group of its own isolates."""
    groups = Counter(one.group for one in functions)
    ports = {one.address: one.port for one in functions}
    found = {}
    for one in sorted(functions, key=lambda one: len(one.parents)):
        if one.class_code >> 8 == _PCI_BRIDGE and one.is_cut:
            above = ports.get(one.parents[-1]) if one.parents else None
            port = "pci"
            if one.driver == "pcieport":
                below = "downstream" if above == "upstream" else "upstream"
                port = below if one.parents else "root port"
            ports[one.address] = port
            alone = one.group is not None and groups[one.group] == 1
            found[one.address] = replace(one, port=port, acs_on=alone)
    return tuple(found.get(one.address, one) for one in functions)


def _driver(host: Any, place: str) -> str | None:
    """By its link, or by what the kernel tells udev, which a snapshot may have alone."""
    told = _DRIVER.search(host.read(f"{place}/uevent") or "")
    return host.linkname(f"{place}/driver") or (told[1] if told else None)


def _serial(host: Any, place: str) -> str | None:
    for name in host.listdir(f"{place}/nvme"):
        text = host.read(f"{place}/nvme/{name}/serial")
        if text and text.strip():
            return str(text).strip()
    return None


def _bytes(host: Any, path: str) -> bytes:
    try:
        return bytes(host.read_bytes(path))
    except OSError:
        return b""


def _number(text: str) -> int:
    try:
        return int(text.strip(), 16)
    except ValueError:
        return 0


def _port(config: bytes) -> str | None:
    if len(config) < _HEADER_BYTES or config[0x0E] & 0x7F != 1:
        return None
    place = config[0x34] & ~3 if config[0x06] & 0x10 else 0
    for _ in range(48):
        if not 0x40 <= place < min(len(config), 256) - 4:
            break
        if config[place] == _EXPRESS:
            return PORT_TYPES.get(config[place + 2] >> 4, "pci")
        place = config[place + 1] & ~3
    return "pci"


def _acs(config: bytes) -> bool | None:
    """Whether a port isolates: source validation and the redirects are on; None without ACS."""
    place = 0x100
    for _ in range(48):
        if place < 0x100 or place + 8 > len(config):
            return None
        head = int.from_bytes(config[place : place + 4], "little")
        if head & 0xFFFF == 0x0D:
            control = int.from_bytes(config[place + 6 : place + 8], "little")
            return control & 0x1D == 0x1D
        place = head >> 20
    return None


def _iommu(host: Any) -> tuple[Iommu, int | None]:
    names = host.listdir(_IOMMUS)
    for name in sorted(names):
        if name.startswith("dmar"):
            text = host.read(f"{_IOMMUS}/{name}/intel-iommu/cap")
            return "intel", (_number(text) >> 16 & 0x3F) + 1 if text else None
        if name.startswith("ivhd"):
            return "amd", None
    return ("virtio" if names else "none"), None


def _reserved(host: Any) -> tuple[str, ...]:
    """The groups with a direct reserved region, which a guest's firmware cannot have."""
    base = "/sys/kernel/iommu_groups"
    return tuple(
        group
        for group in host.listdir(base)
        if " direct\n" in (host.read(f"{base}/{group}/reserved_regions") or "")
    )
