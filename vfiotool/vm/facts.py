"""All that `vm check` judges, read once: the machine's memory and widths, and each device."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vfiotool.devices.config.decode import ConfigSpace, read_config
from vfiotool.devices.inventory import Inventory
from vfiotool.devices.pci import PciFunction
from vfiotool.devices.platform import read_platform
from vfiotool.doctor.facts import HugePages, MemoryLock, read_hugepages, read_memory_lock
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    DEV_IOMMU,
    DEV_VFIO,
    OPEN_NODES,
    PROC,
    SYS_DEBUG_VFIO,
    SYS_IOMMU,
    SYS_MODULE,
    SYS_NET,
    SYS_NODES,
    SYS_PCI_DEVICES,
)
from vfiotool.usage.case import Case, CaseReader
from vfiotool.vm.handed import Handed
from vfiotool.vm.machine import GuestMachine, machine_of

# drivers/vfio/vfio_iommu_type1.c, dma_entry_limit.
DEFAULT_MAPPINGS = 65535
_HEXADECIMAL = re.compile("0x[0-9a-f]{1,8}")


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One node: its processors, its free memory, and how far the others are (10 is itself)."""

    number: int
    cpus: int
    free_bytes: int | None
    distances: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VfioUser:
    """A process that has VFIO open, and how much memory it has pinned (`VmPin`)."""

    pid: int
    command: str
    node: str
    uid: int | None
    pinned_bytes: int | None


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What counts for all devices: limits, memory by node, address widths in bits.

    `iommu_bits` has the width of each IOMMU unit that tells it; `uid` is the asking process's;
    `guest` is QEMU's machine for guests of this host's architecture.
    """

    memory_lock: MemoryLock | None
    hugepages: tuple[HugePages, ...]
    nodes: tuple[NumaNode, ...]
    cpu_bits: int | None
    iommu_bits: Mapping[str, int] = field(hash=False)
    mappings: int
    users: tuple[VfioUser, ...]
    uid: int | None
    iommufd: bool
    guest: GuestMachine


@dataclass(frozen=True, slots=True)
class ReadyCheck:
    """One device for the check. `case` is None of what is not opened through VFIO.

    `card` has the other functions of its slot, `bus` those on its bus (VFs left out in both),
    `members` the functions of its group; `features` what the kernel's debugfs says of migration;
    `missing_node` is the device node that is not there though it should be; `interfaces_down` are
    the interfaces of a VF's PF, where all of them are down.
    """

    device: Handed
    case: Case | None
    config: ConfigSpace | None
    card: tuple[PciFunction, ...]
    bus: tuple[PciFunction, ...]
    members: tuple[PciFunction, ...]
    features: str | None
    missing_node: str | None
    exists: bool = True
    interfaces_down: tuple[str, ...] = ()


def read_machine(host: Host, *, users: bool = True) -> MachineFacts:
    """The machine's part. What is absent or unreadable is None or empty.

    Without `users` the tables of all processes are not looked through.
    """
    limit = host.read_int(f"{SYS_MODULE}/vfio_iommu_type1/parameters/dma_entry_limit")
    cpu = re.search(r"^address sizes\s*:\s*(\d+) bits physical", _cpuinfo(host), re.MULTILINE)
    return MachineFacts(
        memory_lock=read_memory_lock(host),
        hugepages=read_hugepages(host),
        nodes=_nodes(host),
        cpu_bits=int(cpu[1]) if cpu else None,
        iommu_bits=_iommu_bits(host),
        mappings=DEFAULT_MAPPINGS if limit is None else limit,
        users=_users(host) if users else (),
        uid=_uid(host.read(f"{PROC}/self/status") or ""),
        iommufd=host.exists(DEV_IOMMU),
        guest=machine_of(read_platform(host).architecture),
    )


def read_checks(
    host: Host, inventory: Inventory, devices: Sequence[Handed], *, configs: bool = True
) -> tuple[ReadyCheck, ...]:
    """Each device's part, in their order; without `configs` no configuration space is read. Raises
    NotFound for one that is gone."""
    reader = CaseReader(host, inventory.by_address, inventory.by_group)
    return tuple(_read_check(host, inventory, reader, device, configs) for device in devices)


def _read_check(
    host: Host, inventory: Inventory, reader: CaseReader, device: Handed, configs: bool
) -> ReadyCheck:
    if not device.through_vfio:
        there = bool(device.path) and (not host.live or host.exists(device.path))
        return ReadyCheck(device, None, None, (), (), (), None, None, there)
    node = f"{DEV_VFIO}/{device.iommu_group}"
    missing = host.live and device.iommu_group is not None and not host.exists(node)
    case, function = reader.read(device.name), device.function
    group = case.group
    members = group.devices if group is not None else ()
    base = "" if function is None else function.path.rpartition("/")[0]
    others = [] if function is None else [f for f in inventory.functions if f.physfn is None]
    return ReadyCheck(
        device=device,
        case=case,
        config=read_config(host, device.name) if configs and function is not None else None,
        card=tuple(
            f
            for f in others
            if f.address != device.name
            and _slot(f.address) == _slot(device.name)
            and function is not None
            and function.physfn is None
        ),
        bus=tuple(
            f for f in others if f.address != device.name and f.path.rpartition("/")[0] == base
        ),
        members=tuple(
            inventory.by_address[m.address] for m in members if m.address in inventory.by_address
        ),
        features=host.read(f"{SYS_DEBUG_VFIO}/{device.name}/migration/features"),
        missing_node=node if missing else None,
        interfaces_down=_interfaces_down(host, function),
    )


def _interfaces_down(host: Host, function: PciFunction | None) -> tuple[str, ...]:
    """The interfaces of a VF's PF, if it has some and none is up."""
    if function is None or function.physfn is None:
        return ()
    names = host.listdir(f"{SYS_PCI_DEVICES}/{function.physfn}/net")
    flags = [host.read(f"{SYS_NET}/{name}/flags") or "" for name in names]
    # include/uapi/linux/if.h: IFF_UP is bit 0, of a number that sysfs shows in hexadecimal.
    known = [int(text, 16) for text in flags if _HEXADECIMAL.fullmatch(text)]
    return tuple(names) if len(known) == len(names) and not any(f & 1 for f in known) else ()


def _slot(address: str) -> str:
    return address.rpartition(".")[0]


def _cpuinfo(host: Host) -> str:
    return host.read(f"{PROC}/cpuinfo") or ""


def _iommu_bits(host: Host) -> dict[str, int]:
    """Width by unit, of VT-d (specification 4.1, 11.4.2: MGAW is bits 21-16 plus 1, SAGAW's bits
    1, 2, 3 are tables of 39, 48, 57 bits). AMD-Vi and the SMMU do not tell theirs here."""
    found = {}
    for unit in host.listdir(SYS_IOMMU):
        text = host.read(f"{SYS_IOMMU}/{unit}/intel-iommu/cap")
        if text is None or re.fullmatch(r"[0-9a-f]+", text) is None:
            continue
        value = int(text, 16)
        tables = [bits for bit, bits in ((1, 39), (2, 48), (3, 57)) if value >> 8 + bit & 1]
        found[unit] = min((value >> 16 & 0x3F) + 1, max(tables, default=64))
    return found


def _nodes(host: Host) -> tuple[NumaNode, ...]:
    found = []
    for name in host.listdir(SYS_NODES):
        if re.fullmatch(r"node\d+", name) is None:
            continue
        base = f"{SYS_NODES}/{name}"
        free = re.search(r"MemFree:\s+(\d+) kB", host.read(f"{base}/meminfo") or "")
        distances = tuple(
            int(word) for word in (host.read(f"{base}/distance") or "").split() if word.isdecimal()
        )
        found.append(
            NumaNode(
                int(name[4:]),
                _count(host.read(f"{base}/cpulist") or ""),
                int(free[1]) << 10 if free else None,
                distances,
            )
        )
    return tuple(sorted(found, key=lambda node: node.number))


def _count(cpulist: str) -> int:
    """How many processors `0-3,8` names."""
    total = 0
    for part in cpulist.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            total += int(last) - int(first) + 1 if last.isdecimal() else 1
    return total


def _users(host: Host) -> tuple[VfioUser, ...]:
    """Processes that have VFIO or iommufd open, this one left out."""
    found: dict[int, VfioUser] = {}
    for line in (host.read(OPEN_NODES) or "").splitlines():
        fields = line.split("\t")
        if len(fields) < 3 or not fields[0].isdecimal():
            continue
        pid, node = int(fields[0]), fields[2]
        if node != DEV_IOMMU and not node.startswith(f"{DEV_VFIO}/"):
            continue
        if pid in found and node != DEV_IOMMU:
            continue
        status = host.read(f"{PROC}/{pid}/status") or ""
        pinned = re.search(r"^VmPin:\s+(\d+) kB", status, re.MULTILINE)
        found[pid] = VfioUser(
            pid, fields[1], node, _uid(status), int(pinned[1]) << 10 if pinned else None
        )
    return tuple(found.values())


def _uid(status: str) -> int | None:
    match = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    return int(match[1]) if match else None
