"""Will the guest's memory fit: what may be locked, huge pages, NUMA, addresses, mappings.

Sources: drivers/vfio/vfio_iommu_type1.c (vfio_lock_acct, vfio_dma_do_map, dma_entry_limit),
drivers/iommu/iommufd/pages.c (update_mm_locked_vm, iopt_alloc_pages: the user is charged),
drivers/vhost/vdpa.c (vhost_vdpa_pa_map); QEMU: hw/i386/pc.c and hw/i386/pc_q35.c (memory map).
"""

from __future__ import annotations

from collections.abc import Sequence

from vfiotool.doctor.kernel import more_memory_lock
from vfiotool.host.distribution import Distribution
from vfiotool.host.paths import PROC, SYS_IOMMU, SYS_IOMMU_GROUPS, SYS_MODULE, SYS_NODES
from vfiotool.vm.facts import MachineFacts, NumaNode, ReadyCheck
from vfiotool.vm.finding import (
    BLOCKER,
    NOTE,
    WARNING,
    PreflightFinding,
    WantedGuest,
    finding,
    words_of,
)
from vfiotool.vm.machine import GIB, GuestMachine

_PAGE = 4096
# A margin for BARs, ROMs and the device models' own memory, as libvirt has it
# (qemu_domain.c, qemuDomainGetMemLockLimitBytes).
_MARGIN = GIB
# Into how many parts a q35 guest's memory is mapped before its firmware runs (seen with QEMU 10).
_PARTS = 5
# libvirt raises the limit of the QEMU that it starts; cloud-hypervisor is started by the caller.
_RAISES_LIMIT = ("libvirt",)


def judge_memory(
    machine: MachineFacts,
    checks: Sequence[ReadyCheck],
    wanted: WantedGuest,
    distribution: Distribution,
) -> list[PreflightFinding]:
    """What is said of the whole virtual machine; without an amount of memory, of NUMA alone."""
    found = _numa(machine, checks, wanted)
    found += _widths(machine, checks, wanted)
    if wanted.memory_bytes is not None:
        found += _memory_lock(machine, checks, wanted, distribution)
        found += _hugepages(machine, checks, wanted, wanted.memory_bytes)
        found += _reserved(machine.guest, checks, wanted.memory_bytes)
        found += _mappings(machine, checks, wanted, distribution)
    return found


def locked_bytes(checks: Sequence[ReadyCheck], wanted: WantedGuest) -> int:
    """How much memory the VM locks: the guest's once for all VFIO devices, and once for each of
    them behind a virtual IOMMU (each has a container then), once for each vDPA device, and 1 GiB.

    Mediated devices are behind no IOMMU: of a container that has nothing else no memory is locked
    when it is mapped (vfio_dma_do_map; iommufd: iopt_fill_domains_pages, which there is none of).
    """
    memory = wanted.memory_bytes or 0
    through = _behind_an_iommu(checks)
    vdpa = sum(check.device.model == "vdpa" for check in checks)
    spaces = through if wanted.viommu else min(through, 1)
    return memory * (spaces + vdpa) + (_MARGIN if spaces + vdpa else 0)


def _behind_an_iommu(checks: Sequence[ReadyCheck]) -> int:
    return sum(check.device.through_vfio and not check.device.is_mdev for check in checks)


def _memory_lock(
    machine: MachineFacts,
    checks: Sequence[ReadyCheck],
    wanted: WantedGuest,
    distribution: Distribution,
) -> list[PreflightFinding]:
    need, locks, severity = locked_bytes(checks, wanted), "the VM locks", BLOCKER
    limit, names = machine.memory_lock, _names(checks)
    if not need and any(check.device.is_mdev for check in checks):
        # The driver of a mediated device locks what the guest gives it: it starts in any case.
        need = (wanted.memory_bytes or 0) + _MARGIN
        locks, severity = "what the guest gives its mediated devices is locked, up to", WARNING
    if not need:
        return []
    others = _pinned_by_others(machine) if wanted.iommufd else 0
    how = _charged(checks, wanted, others)
    if limit is None:
        detail = f"{locks} {words_of(need)}{how}; the limit on locked memory is not known here"
        evidence = f"{PROC}/self/limits cannot be read"
        return [finding(names, "memory-lock", NOTE, detail, evidence, number=need, unit="bytes")]
    evidence = f"{PROC}/self/limits: Max locked memory {limit.soft} {limit.hard}"
    # iommufd asks for CAP_IPC_LOCK of nobody: it charges the user, root's limit is the same.
    exempt = limit.exempt and not wanted.iommufd
    if exempt or not limit.soft.isdecimal() or wanted.hypervisor in _RAISES_LIMIT:
        return []
    missing = need + others - int(limit.soft)
    if missing <= 0:
        return []
    detail = (
        f"{locks} {words_of(need)}{how}, and {words_of(int(limit.soft))} may be locked: "
        f"{words_of(missing)} are missing"
    )
    kib = -(-(need + others) // 1024)
    remedy = [f"ulimit -l {kib}"]
    if limit.hard.isdecimal() and int(limit.hard) < need + others:
        remedy = [f"prlimit --memlock={need + others}: --pid $$   # as root", *remedy]
    remedy += [f"in a systemd unit: LimitMEMLOCK={need + others}", *more_memory_lock(distribution)]
    return [
        finding(
            names, "memory-lock", severity, detail, evidence, *remedy, number=missing, unit="bytes"
        )
    ]


def _charged(checks: Sequence[ReadyCheck], wanted: WantedGuest, others: int) -> str:
    parts = []
    through = _behind_an_iommu(checks)
    vdpa = sum(check.device.model == "vdpa" for check in checks)
    if wanted.viommu and through > 1:
        parts.append(f"its memory for each of {through} devices behind the virtual IOMMU")
    if vdpa:
        parts.append(f"its memory for each of {vdpa} vDPA devices")
    if others:
        parts.append(f"iommufd charges the user, whose other VMs hold {words_of(others)}")
    return f" ({'; '.join(parts)})" if parts else ""


def _pinned_by_others(machine: MachineFacts) -> int:
    return sum(
        user.pinned_bytes or 0
        for user in machine.users
        if user.uid == machine.uid and user.node.endswith("/iommu")
    )


def _hugepages(
    machine: MachineFacts, checks: Sequence[ReadyCheck], wanted: WantedGuest, memory: int
) -> list[PreflightFinding]:
    """Reserved huge pages that do not suffice on the devices' node."""
    reserved = [pages for pages in machine.hugepages if pages.total]
    nodes = _nodes_of(checks)
    where = [pages for pages in reserved if not nodes or int(pages.node[4:]) in nodes]
    if not reserved:
        return []
    free = max((pages.free * pages.kib << 10 for pages in where), default=0)
    if free >= memory:
        return []
    # The size of which most is reserved is what the VM is meant to take.
    best = max(where or reserved, key=lambda pages: pages.total * pages.kib)
    on = f"node{min(nodes)}" if nodes else "any one node"
    target = best
    if nodes and int(best.node[4:]) not in nodes:
        own = [p for p in machine.hugepages if int(p.node[4:]) in nodes and p.kib == best.kib]
        target = own[0] if own else best
    wants = -(-(memory - free) // (target.kib << 10)) + target.total
    detail = (
        f"{on} has {words_of(free)} free in huge pages, the VM has {words_of(memory)}: "
        f"{words_of(memory - free)} are missing (it starts without huge pages)"
    )
    evidence = ", ".join(f"{p.file}: {p.total}, {p.free} free" for p in where or reserved)
    return [
        finding(
            _names(checks),
            "hugepages",
            NOTE,
            detail,
            evidence,
            f"echo {wants} > {target.file}",
            number=memory - free,
            unit="bytes",
        )
    ]


def _numa(
    machine: MachineFacts, checks: Sequence[ReadyCheck], wanted: WantedGuest
) -> list[PreflightFinding]:
    """Devices on different nodes; a node too small for the VM that its device is to serve."""
    nodes = {node.number: node for node in machine.nodes}
    placed = {
        check.device.name: check.device.function.numa_node
        for check in checks
        if check.device.function is not None and check.device.function.numa_node is not None
    }
    used = sorted(set(placed.values()))
    if len(nodes) < 2 or not used:
        return []
    found = []
    if len(used) > 1:
        far = _distance(nodes.get(used[0]), used[1])
        told = ", ".join(f"{name} on node{node}" for name, node in placed.items())
        detail = f"the devices are on different NUMA nodes: {told}"
        detail += f" (distance {far}, to itself 10)" if far else ""
        evidence = f"{SYS_NODES}/node{used[0]}/distance"
        remedy = "choose devices of one node: vfiotool show DEVICE names it"
        found.append(finding(_names(checks), "numa", WARNING, detail, evidence, remedy, number=far))
        return found
    node = nodes.get(used[0])
    if node is None:
        return []
    short, strict = [], True
    if wanted.vcpus is not None and wanted.vcpus > node.cpus:
        short.append(f"{wanted.vcpus} vCPUs, it has {node.cpus} processors")
    if wanted.memory_bytes is not None and node.free_bytes is not None:
        less = wanted.memory_bytes - node.free_bytes
        if less > 0:
            short.append(f"{words_of(less)} of memory more than it has free")
            strict = False
    pin = _pinning(machine.guest, node, wanted.hypervisor, strict=strict)
    evidence = f"{SYS_NODES}/node{node.number}/cpulist, meminfo"
    far = max((d for n, d in enumerate(node.distances) if n != node.number), default=None)
    if short:
        detail = f"node{node.number}, where the devices are, is too small: {'; '.join(short)}"
        found.append(finding(_names(checks), "numa", WARNING, detail, evidence, pin, number=far))
    else:
        detail = f"the devices are on node{node.number} (other nodes at distance {far}, itself 10)"
        found.append(finding(_names(checks), "numa", NOTE, detail, evidence, pin, number=far))
    return found


def _pinning(guest: GuestMachine, node: NumaNode, hypervisor: str, *, strict: bool) -> str:
    """Without `strict` what does not fit is taken from another node: bound to one that is too
    small, the kernel kills the VM (mm/oom_kill.c, CONSTRAINT_MEMORY_POLICY)."""
    if hypervisor == "libvirt":
        mode = "strict" if strict else "preferred"
        return f"<numatune><memory mode='{mode}' nodeset='{node.number}'/></numatune>"
    name = "cloud-hypervisor" if hypervisor == "cloud-hypervisor" else guest.program
    how = "membind" if strict else "preferred"
    return f"numactl --cpunodebind={node.number} --{how}={node.number} {name} …"


def _distance(node: NumaNode | None, other: int) -> int | None:
    return node.distances[other] if node and other < len(node.distances) else None


def _nodes_of(checks: Sequence[ReadyCheck]) -> set[int]:
    functions = (check.device.function for check in checks)
    return {f.numa_node for f in functions if f is not None and f.numa_node is not None}


def _widths(
    machine: MachineFacts, checks: Sequence[ReadyCheck], wanted: WantedGuest
) -> list[PreflightFinding]:
    """The guest's addresses against what the IOMMU of each device translates.

    The firmware of a guest puts 64-bit BARs near the top of what its processor addresses; QEMU
    maps them for peer-to-peer, and the map of one above the IOMMU's width fails with EINVAL.
    """
    found = []
    for check in checks:
        function = check.device.function
        bits = machine.iommu_bits.get(function.iommu or "") if function is not None else None
        if function is None or bits is None:
            continue
        evidence = f"{SYS_IOMMU}/{function.iommu}/intel-iommu/cap; {PROC}/cpuinfo: address sizes"
        memory = 0 if wanted.memory_bytes is None else wanted.memory_bytes
        wide = sum(r.size for r in function.regions if r.bits == 64 and r.kind == "mem")
        end = machine.guest.end(memory) + wide
        if memory and end > 1 << bits:
            detail = (
                f"memory and BARs reach to {words_of(end)}, and {function.iommu} translates "
                f"{bits} bits ({words_of(1 << bits)})"
            )
            found.append(
                finding(
                    check.device.name,
                    "iommu-width",
                    BLOCKER,
                    detail,
                    evidence,
                    f"less memory: at most {words_of(((1 << bits) - wide - 2 * GIB) // GIB * GIB)}",
                    number=end - (1 << bits),
                    unit="bytes",
                )
            )
        elif wide and machine.cpu_bits is not None and machine.cpu_bits > bits:
            detail = (
                f"the processor addresses {machine.cpu_bits} bits, {function.iommu} translates "
                f"{bits}: a guest that puts its MMIO window higher cannot map the BARs"
            )
            found.append(
                finding(
                    check.device.name,
                    "mmio-window",
                    WARNING,
                    detail,
                    evidence,
                    _limit_bits(wanted.hypervisor, bits),
                    number=bits,
                    unit="bits",
                )
            )
    return found


def _limit_bits(hypervisor: str, bits: int) -> str:
    if hypervisor == "libvirt":
        return f"<maxphysaddr mode='passthrough' limit='{bits}'/> in <cpu>"
    if hypervisor == "cloud-hypervisor":
        return f"--cpus …,max_phys_bits={bits}"
    return f"-cpu host,host-phys-bits-limit={bits}"


def _reserved(
    guest: GuestMachine, checks: Sequence[ReadyCheck], memory: int
) -> list[PreflightFinding]:
    """Windows that the IOMMU keeps, in the midst of the guest's memory.

    What the firmware demands (`direct`) keeps the device from being assigned at all: a blocker of
    its own says so, and no other memory would help.
    """
    found, seen = [], set()
    for check in checks:
        group = None if check.case is None else check.case.group
        for region in group.reserved_regions if group is not None else ():
            if region.type in ("direct", "direct-relaxable"):
                continue
            if group and (group.id, region) in seen:
                continue
            for first, last in guest.ranges(memory):
                low, high = max(first, region.start), min(last, region.end)
                if group is None or low > high:
                    continue
                seen.add((group.id, region))
                # AMD's HyperTransport range: QEMU moves memory around it since 7.1.
                moved = region.start >= 0xFD00000000
                detail = (
                    f"the guest's memory covers {region.start:#x}-{region.end:#x} "
                    f"({region.type}), which the IOMMU reserves"
                )
                found.append(
                    finding(
                        check.device.name,
                        "reserved-region",
                        WARNING if moved else BLOCKER,
                        detail,
                        f"{SYS_IOMMU_GROUPS}/{group.id}/reserved_regions",
                        _beside(guest, region.start, moved=moved),
                        number=high - low + 1,
                        unit="bytes",
                    )
                )
    return found


def _beside(guest: GuestMachine, start: int, *, moved: bool) -> str:
    """How a guest's memory is kept off a window that begins at `start`."""
    if moved and guest.kind == "q35":
        return "QEMU 7.1 or newer, which puts memory above it"
    most = start - guest.base
    if guest.kind == "q35" and start >= 4 * GIB:
        most = start - 2 * GIB
    # In whole MiB, as -m takes them: rounded to GiB it could be what is too much.
    less = f"less memory: at most {most >> 20}M"
    if guest.kind == "q35" and GIB <= start < 4 * GIB:
        return f"{less}; or -machine q35,max-ram-below-4g={start}"
    if most < 64 << 20:
        return f"another machine type: no guest memory of {guest.kind} lies below it"
    return less


def _mappings(
    machine: MachineFacts,
    checks: Sequence[ReadyCheck],
    wanted: WantedGuest,
    distribution: Distribution,
) -> list[PreflightFinding]:
    """A guest that runs its own IOMMU maps page by page, up to its whole memory."""
    through = [check for check in checks if check.device.through_vfio]
    if wanted.iommufd or wanted.memory_bytes is None or not through:
        return []
    parts = _PARTS if machine.guest.kind == "q35" else 1
    most = wanted.memory_bytes // _PAGE if wanted.viommu else parts
    if most <= machine.mappings:
        return []
    takes = f"a container takes {machine.mappings:,} mappings"
    detail = f"a guest's memory is mapped in {most} parts, and {takes}"
    if wanted.viommu:
        detail = (
            f"behind a virtual IOMMU the guest may map {most:,} pages for a device, and {takes}"
        )
    file = f"{SYS_MODULE}/vfio_iommu_type1/parameters/dma_entry_limit"
    remedy = (
        f"echo {most} > {file}",
        *distribution.module_option("vfio_iommu_type1", f"dma_entry_limit={most}"),
    )
    if wanted.viommu:
        remedy = (*remedy, "or iommu=pt on the guest's kernel command line")
    return [
        finding(
            _names(through),
            "mappings",
            WARNING if wanted.viommu else BLOCKER,
            detail,
            f"{file}: {machine.mappings}",
            *remedy,
            number=most - machine.mappings,
            unit="mappings",
        )
    ]


def _names(checks: Sequence[ReadyCheck]) -> str:
    return ", ".join(check.device.name for check in checks)
