"""What the doctor judges, read once: modules, nodes, limits, huge pages, options, claims."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.devices.inventory import Inventory
from vfiotool.devices.platform import Platform, read_platform
from vfiotool.doctor.claims import ResolvedClaim, read_resolved_claims
from vfiotool.host.distribution import Distribution, read_distribution
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    DEV,
    DEV_IOMMU,
    DEV_VFIO,
    PROC,
    PROC_OSRELEASE,
    SYS_LOCKDOWN,
    SYS_MODULE,
    SYS_NODES,
    SYS_VFIO_DEV,
)

# Where each module lies below /lib/modules/RELEASE/kernel.
FOLDERS = {
    "vfio": "drivers/vfio",
    "vfio_pci": "drivers/vfio/pci",
    "vfio_iommu_type1": "drivers/vfio",
    "vfio_iommu_spapr_tce": "drivers/vfio",
    "iommufd": "drivers/iommu/iommufd",
    "virtio_iommu": "drivers/iommu",
}
# Parameters that trade isolation away: module, name.
UNSAFE_PARAMETERS = (
    ("vfio", "enable_unsafe_noiommu_mode"),
    ("vfio_iommu_type1", "allow_unsafe_interrupts"),
    ("iommufd", "allow_unsafe_interrupts"),
    ("vfio_pci", "disable_denylist"),
)
_CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h


@dataclass(frozen=True, slots=True)
class Module:
    """`state`: loaded, built-in, module (there, not loaded), absent or unknown; with evidence."""

    name: str
    state: str
    evidence: str


@dataclass(frozen=True, slots=True)
class HugePages:
    """One size on one NUMA node: pages of `kib` KiB, and the file that sets their number."""

    node: str
    kib: int
    total: int
    free: int
    file: str


@dataclass(frozen=True, slots=True)
class MemoryLock:
    """How much memory this process may lock: `soft` and `hard` as the kernel words them."""

    soft: str
    hard: str
    exempt: bool


@dataclass(frozen=True, slots=True)
class DoctorFacts:
    """Everything that the doctor's judgements follow from. `kvm`: open, denied or absent;
    `default_on`: what the kernel's configuration says of VT-d without an option."""

    platform: Platform
    distribution: Distribution
    modules: dict[str, Module]
    iommufd_node: bool
    device_nodes: bool
    group_node: bool
    memory_lock: MemoryLock | None
    hugepages: tuple[HugePages, ...]
    unsafe_parameters: tuple[tuple[str, str], ...]
    lockdown: str | None
    kvm: str
    default_on: str | None
    claims: tuple[ResolvedClaim, ...]


def read_facts(host: Host, inventory: Inventory) -> DoctorFacts:
    """Read a host for the doctor. What is absent or unreadable is a value, never an exception."""
    release = host.read(PROC_OSRELEASE)
    return DoctorFacts(
        platform=read_platform(host),
        distribution=read_distribution(host),
        modules={name: _module(host, release, name) for name in FOLDERS},
        iommufd_node=host.exists(DEV_IOMMU),
        device_nodes=host.isdir(SYS_VFIO_DEV),
        group_node=host.exists(f"{DEV_VFIO}/vfio"),
        memory_lock=read_memory_lock(host),
        hugepages=read_hugepages(host),
        unsafe_parameters=tuple(
            (module, name)
            for module, name in UNSAFE_PARAMETERS
            if host.read(f"{SYS_MODULE}/{module}/parameters/{name}") in ("Y", "1")
        ),
        lockdown=host.read(SYS_LOCKDOWN),
        kvm=_kvm(host),
        default_on=_default_on(host, release),
        claims=read_resolved_claims(host, inventory),
    )


def _module(host: Host, release: str | None, name: str) -> Module:
    base = f"{SYS_MODULE}/{name}"
    if host.exists(f"{base}/initstate"):
        return Module(name, "loaded", f"{base}/initstate is {host.read(f'{base}/initstate')}")
    tree = f"/lib/modules/{release}"
    builtin = host.read(f"{tree}/modules.builtin")
    names = {line.rpartition("/")[2].removesuffix(".ko") for line in (builtin or "").splitlines()}
    if name in {entry.replace("-", "_") for entry in names}:
        return Module(name, "built-in", f"{tree}/modules.builtin lists {name}")
    if host.isdir(base):
        return Module(name, "built-in", f"{base} exists without an initstate")
    for file in host.listdir(f"{tree}/kernel/{FOLDERS[name]}"):
        if file.partition(".ko")[0].replace("-", "_") == name and ".ko" in file:
            return Module(name, "module", f"{tree}/kernel/{FOLDERS[name]}/{file}")
    if builtin is None:
        # Every kernel's folder has that list: a tree without it is a part of a machine's.
        where = f"no {tree}/modules.builtin" if release else "the kernel's release is not known"
        return Module(name, "unknown", f"{where}; no {base}")
    evidence = f"no {base}, and neither {tree} nor its modules.builtin has it"
    return Module(name, "absent", evidence)


def read_memory_lock(host: Host) -> MemoryLock | None:
    """How much memory this process may lock; None where it is not told."""
    text = host.read(f"{PROC}/self/limits") or ""
    match = re.search(r"^Max locked memory\s+(\S+)\s+(\S+)", text, re.MULTILINE)
    status = re.search(
        r"^CapEff:\s*([0-9a-f]+)$", host.read(f"{PROC}/self/status") or "", re.MULTILINE
    )
    exempt = status is not None and bool(int(status[1], 16) >> _CAP_IPC_LOCK & 1)
    return None if match is None else MemoryLock(match[1], match[2], exempt)


def read_hugepages(host: Host) -> tuple[HugePages, ...]:
    """Reserved huge pages, by node and size."""
    found = []
    for node in host.listdir(SYS_NODES):
        if re.fullmatch(r"node\d+", node) is None:
            continue
        for size in host.listdir(f"{SYS_NODES}/{node}/hugepages"):
            base = f"{SYS_NODES}/{node}/hugepages/{size}"
            total = host.read_int(f"{base}/nr_hugepages")
            free = host.read_int(f"{base}/free_hugepages")
            kib = size.removeprefix("hugepages-").removesuffix("kB")
            if total is not None and free is not None and kib.isdecimal():
                found.append(HugePages(node, int(kib), total, free, f"{base}/nr_hugepages"))
    return tuple(found)


def _kvm(host: Host) -> str:
    path = f"{DEV}/kvm"
    if not host.exists(path):
        return "absent"
    try:
        host.read_bytes(path)
    except PermissionError:
        return "denied"
    except OSError:
        pass  # it has no read(): EINVAL from the node, ENODATA from a snapshot
    return "open"


def _default_on(host: Host, release: str | None) -> str | None:
    path = f"/boot/config-{release}"
    match = re.search(r"^.*CONFIG_INTEL_IOMMU_DEFAULT_ON\b.*$", host.read(path) or "", re.MULTILINE)
    return None if match is None else f"{path}: {match[0]}"
