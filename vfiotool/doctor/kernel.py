"""Modules, iommufd, limits, huge pages, lockdown, and options that trade safety away."""

from __future__ import annotations

import re

from vfiotool.doctor.finding import (
    HUGEPAGES_PAGE,
    IOMMUFD_PAGE,
    KVM_PAGE,
    LIMITS_PAGE,
    LOCKDOWN_PAGE,
    PARAMETERS_PAGE,
    VFIO_PAGE,
    Finding,
)
from vfiotool.host.distribution import Distribution
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    DEV,
    DEV_IOMMU,
    DEV_VFIO,
    PROC,
    PROC_CMDLINE,
    PROC_OSRELEASE,
    SYS_LOCKDOWN,
    SYS_MODULE,
    SYS_NODES,
    SYS_VFIO_DEV,
)

_MODULES = {
    "vfio": "blocker",
    "vfio_pci": "blocker",
    "vfio_iommu_type1": "note",
    "iommufd": "note",
}
_FOLDERS = {
    "vfio": "drivers/vfio",
    "vfio_pci": "drivers/vfio/pci",
    "vfio_iommu_type1": "drivers/vfio",
    "iommufd": "drivers/iommu/iommufd",
    "virtio_iommu": "drivers/iommu",
}
_CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h
_LOW_LIMIT_BYTES = 1 << 30


def examine_kernel(host: Host, distribution: Distribution) -> list[Finding]:
    """One finding for each module and facility."""
    found = [_module(host, distribution, name) for name in _MODULES]
    found.append(_backends(host))
    found.append(_memory_lock(host))
    found += _hugepages(host)
    found += _unsafe_options(host)
    found += _lockdown(host)
    found.append(_kvm(host))
    return found


def module_state(host: Host, name: str) -> tuple[str, str]:
    """`loaded`, `built-in`, `module` (there, not loaded), `absent` or `unknown`, and evidence."""
    base = f"{SYS_MODULE}/{name}"
    if host.exists(f"{base}/initstate"):
        return "loaded", f"{base}/initstate is {host.read(f'{base}/initstate')}"
    release = host.read(PROC_OSRELEASE)
    tree = f"/lib/modules/{release}"
    builtin = host.read(f"{tree}/modules.builtin")
    names = {line.rpartition("/")[2].removesuffix(".ko") for line in (builtin or "").splitlines()}
    if name in {entry.replace("-", "_") for entry in names}:
        return "built-in", f"{tree}/modules.builtin lists {name}"
    if host.isdir(base):
        return "built-in", f"{base} exists without an initstate"
    files = host.listdir(f"{tree}/kernel/{_FOLDERS[name]}")
    for file in files:
        if file.partition(".ko")[0].replace("-", "_") == name and ".ko" in file:
            return "module", f"{tree}/kernel/{_FOLDERS[name]}/{file}"
    if builtin is None and not host.isdir(tree):
        return "unknown", f"no {base}, and no {tree} to look in"
    return "absent", f"no {base}, and neither {tree} nor its modules.builtin has it"


def _module(host: Host, distribution: Distribution, name: str) -> Finding:
    state, evidence = module_state(host, name)
    check = f"module-{name.replace('_', '-')}"
    shown = name.replace("_", "-") if name == "vfio_pci" else name
    if state in ("loaded", "built-in"):
        summary = f"{shown} is {'built in' if state == 'built-in' else 'loaded'}"
        if state == "built-in" and name == "vfio_pci":
            summary += ": modprobe.d does not reach it, kernel options do"
        return Finding(check, "ok", summary, evidence)
    if state == "module":
        summary = f"{shown} is a module that is not loaded; bind loads what it needs"
        remedy = distribution.module_hint(shown)
        return Finding(check, "note", summary, evidence, remedy, VFIO_PAGE)
    if state == "unknown":
        summary = f"whether this kernel has {shown} cannot be told here"
        return Finding(check, "note", summary, evidence, (), VFIO_PAGE)
    option = "CONFIG_" + name.upper()
    severity = _MODULES[name]
    if name == "vfio_iommu_type1" and host.exists(DEV_IOMMU):
        severity = "ok"
    summary = f"this kernel has no {shown}"
    return Finding(check, severity, summary, evidence, (f"a kernel with {option}",), VFIO_PAGE)


def _backends(host: Host) -> Finding:
    """Which of VFIO's two interfaces to user space there are."""
    iommufd = host.exists(DEV_IOMMU)
    cdev = host.isdir(SYS_VFIO_DEV)
    container = host.exists(f"{DEV_VFIO}/vfio")
    evidence = ", ".join(
        f"{path} {'is there' if there else 'is absent'}"
        for path, there in (
            (DEV_IOMMU, iommufd),
            (SYS_VFIO_DEV, cdev),
            (f"{DEV_VFIO}/vfio", container),
        )
    )
    if iommufd and cdev:
        return Finding("backends", "ok", "iommufd and device nodes (cdev) are available", evidence)
    if container or iommufd:
        summary = "the group interface is available, iommufd with device nodes is not"
        return Finding("backends", "note", summary, evidence, (), IOMMUFD_PAGE)
    summary = "VFIO offers no interface yet: its modules are not loaded"
    return Finding("backends", "note", summary, evidence, ("modprobe vfio-pci",), VFIO_PAGE)


def _memory_lock(host: Host) -> Finding:
    """How much memory this user may lock: a VM with a passed-through device locks all of its."""
    path = f"{PROC}/self/limits"
    match = re.search(r"^Max locked memory\s+(\S+)\s+(\S+)", host.read(path) or "", re.MULTILINE)
    status = re.search(
        r"^CapEff:\s*([0-9a-f]+)$", host.read(f"{PROC}/self/status") or "", re.MULTILINE
    )
    exempt = status is not None and bool(int(status[1], 16) >> _CAP_IPC_LOCK & 1)
    if match is None:
        summary = "the limit on locked memory is unknown"
        return Finding("memory-lock", "note", summary, path, (), LIMITS_PAGE)
    soft, hard = match.groups()
    evidence = f"{path}: Max locked memory {soft} {hard}"
    if exempt:
        summary = f"this process may lock any amount (CAP_IPC_LOCK); its limit is {_size(soft)}"
        return Finding("memory-lock", "ok", summary, evidence)
    if not soft.isdecimal() or int(soft) >= _LOW_LIMIT_BYTES:
        summary = f"this process may lock {_size(soft)}"
        return Finding("memory-lock", "ok", summary, evidence)
    return Finding(
        "memory-lock",
        "warning",
        f"this user may lock {_size(soft)}: too little for a VM of any size",
        evidence,
        ("echo '* - memlock unlimited' > /etc/security/limits.d/vfio.conf", "log in again"),
        LIMITS_PAGE,
    )


def _size(text: str) -> str:
    if not text.isdecimal():
        return "any amount" if text == "unlimited" else text
    number = int(text)
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


def _hugepages(host: Host) -> list[Finding]:
    """Reserved huge pages by NUMA node and size."""
    found = []
    for node in host.listdir(SYS_NODES):
        if re.fullmatch(r"node\d+", node) is None:
            continue
        parts, files = [], []
        for size in host.listdir(f"{SYS_NODES}/{node}/hugepages"):
            base = f"{SYS_NODES}/{node}/hugepages/{size}"
            total, free = (
                host.read_int(f"{base}/nr_hugepages"),
                host.read_int(f"{base}/free_hugepages"),
            )
            kib = size.removeprefix("hugepages-").removesuffix("kB")
            if total is None or free is None or not kib.isdecimal():
                continue
            parts.append(f"{total} of {int(kib) >> 10} MiB ({free} free)")
            files.append(f"{base}/nr_hugepages")
        if parts:
            none = all(part.startswith("0 of") for part in parts)
            summary = f"{node} has huge pages reserved: {', '.join(parts)}"
            if none:
                summary = f"{node} has no huge pages reserved; VMs work without, a little slower"
            remedy = (f"echo 1024 > {files[-1]}",) if none else ()
            page = HUGEPAGES_PAGE if none else None
            severity = "note" if none else "ok"
            found.append(Finding("hugepages", severity, summary, ", ".join(files), remedy, page))
    return found


def _unsafe_options(host: Host) -> list[Finding]:
    found = []
    parameters = (
        ("vfio", "enable_unsafe_noiommu_mode", "devices can be given away without any IOMMU"),
        ("vfio_iommu_type1", "allow_unsafe_interrupts", "a guest may forge interrupts"),
        ("iommufd", "allow_unsafe_interrupts", "a guest may forge interrupts"),
        ("vfio_pci", "disable_denylist", "devices known to be unsafe are accepted"),
    )
    for module, name, meaning in parameters:
        path = f"{SYS_MODULE}/{module}/parameters/{name}"
        if host.read(path) in ("Y", "1"):
            # The deny list's parameter cannot be written (0444): only loading anew changes it.
            clear = f"echo N > {path}" if name != "disable_denylist" else "modprobe -r vfio-pci"
            remedy = (clear, f"grep -r {name} /etc/modprobe.d {PROC_CMDLINE}")
            summary = f"{module}.{name} is set: {meaning}"
            found.append(
                Finding("unsafe-option", "warning", summary, f"{path} is Y", remedy, VFIO_PAGE)
            )
    for word in (host.read(PROC_CMDLINE) or "").split():
        if word.startswith("pcie_acs_override="):
            summary = f"{word}: groups look smaller than the hardware isolates"
            remove = (f"remove {word} from the kernel's command line",)
            found.append(
                Finding("unsafe-option", "warning", summary, PROC_CMDLINE, remove, PARAMETERS_PAGE)
            )
    if not found:
        summary = "no option that trades isolation away is set"
        found.append(Finding("unsafe-option", "ok", summary, f"{PROC_CMDLINE}, {SYS_MODULE}"))
    return found


def _lockdown(host: Host) -> list[Finding]:
    text = host.read(SYS_LOCKDOWN)
    match = re.search(r"\[(\w+)\]", text or "")
    if match is None or match[1] == "none":
        return []
    summary = (
        f"the kernel is locked down ({match[1]}): VFIO works, but unsigned modules and writing "
        "PCI registers through sysfs are refused"
    )
    return [Finding("lockdown", "note", summary, f"{SYS_LOCKDOWN}: {text}", (), LOCKDOWN_PAGE)]


def _kvm(host: Host) -> Finding:
    path = f"{DEV}/kvm"
    if host.exists(path):
        return Finding("kvm", "ok", "this kernel offers KVM", f"{path} is there")
    summary = "there is no KVM: virtual machines will be emulated, and slow"
    remedy = ("modprobe kvm_intel || modprobe kvm_amd",)
    return Finding("kvm", "note", summary, f"{path} is absent", remedy, KVM_PAGE)
