"""Modules, iommufd, limits, huge pages, lockdown, and options that trade safety away."""

from __future__ import annotations

import re
from itertools import groupby

from vfiotool.doctor.facts import DoctorFacts, HugePages, Module
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
from vfiotool.host.paths import (
    DEV,
    DEV_IOMMU,
    DEV_VFIO,
    PROC,
    PROC_CMDLINE,
    SYS_LOCKDOWN,
    SYS_MODULE,
    SYS_VFIO_DEV,
)

# What it means to VFIO that a module is absent.
_MODULES = {
    "vfio": "blocker",
    "vfio_pci": "blocker",
    "vfio_iommu_type1": "note",
    "iommufd": "note",
}
_UNKNOWN = "whether this kernel has {} cannot be told here"
_NOT_LOADED = "modules that are not loaded: {}; bind loads what it needs"
# vfio-pci brings them along (drivers/vfio/vfio_main.c, MODULE_SOFTDEP).
_LOADED_WITH_VFIO_PCI = ("vfio", "vfio_pci", "vfio_iommu_type1", "vfio_iommu_spapr_tce")
_MEANINGS = {
    "enable_unsafe_noiommu_mode": "devices can be passed through without any IOMMU",
    "allow_unsafe_interrupts": "a guest may forge interrupts",
    "disable_denylist": "devices known to be unsafe are accepted",
}
_LOW_LIMIT_BYTES = 1 << 30
_EXAMPLE_KIB = 2 << 20


def judge_kernel(facts: DoctorFacts) -> list[Finding]:
    """One finding for each module and facility."""
    found = [_module(facts, name) for name in _modules_of(facts.platform.architecture)]
    found.append(_backends(facts))
    found.append(_memory_lock(facts))
    found += _hugepages(facts)
    found += _unsafe_options(facts)
    found += _lockdown(facts.lockdown)
    found.append(_kvm(facts))
    return found


def _modules_of(architecture: str | None) -> dict[str, str]:
    if architecture != "ppc64":
        return _MODULES
    # POWER's IOMMU has a driver of its own for VFIO (drivers/vfio/vfio_iommu_spapr_tce.c).
    return {
        "vfio_iommu_spapr_tce" if name == "vfio_iommu_type1" else name: severity
        for name, severity in _MODULES.items()
    }


def _module(facts: DoctorFacts, name: str) -> Finding:
    module = facts.modules[name]
    check = f"module-{name.replace('_', '-')}"
    shown = name.replace("_", "-") if name == "vfio_pci" else name
    if module.state in ("loaded", "built-in"):
        return _present(check, shown, module)
    if module.state == "module":
        return Finding(
            check,
            "note",
            f"{shown} is a module that is not loaded; bind loads what it needs",
            module.evidence,
            facts.distribution.module_hint("vfio-pci" if name in _LOADED_WITH_VFIO_PCI else shown),
            VFIO_PAGE,
            _NOT_LOADED,
            shown,
        )
    if module.state == "unknown":
        summary = _UNKNOWN.format(shown)
        evidence = module.evidence
        return Finding(check, "note", summary, evidence, (), VFIO_PAGE, _UNKNOWN, shown)
    severity = _modules_of(facts.platform.architecture)[name]
    if name == "vfio_iommu_type1" and facts.iommufd_node:
        severity = "ok"
    remedy = (f"a kernel with CONFIG_{name.upper()}",)
    summary = f"this kernel has no {shown}"
    return Finding(check, severity, summary, module.evidence, remedy, VFIO_PAGE)


def _present(check: str, shown: str, module: Module) -> Finding:
    summary = f"{shown} is {'built in' if module.state == 'built-in' else 'loaded'}"
    if module.state == "built-in" and module.name == "vfio_pci":
        summary += ": modprobe.d does not reach it, kernel options do"
    return Finding(check, "ok", summary, module.evidence)


def _backends(facts: DoctorFacts) -> Finding:
    """Which of VFIO's two interfaces to user space there are."""
    evidence = ", ".join(
        f"{path} {'is there' if there else 'is absent'}"
        for path, there in (
            (DEV_IOMMU, facts.iommufd_node),
            (SYS_VFIO_DEV, facts.device_nodes),
            (f"{DEV_VFIO}/vfio", facts.group_node),
        )
    )
    if facts.iommufd_node and facts.device_nodes:
        return Finding("backends", "ok", "iommufd and device nodes (cdev) are available", evidence)
    if facts.group_node or facts.iommufd_node:
        summary = "the group interface is available, iommufd with device nodes is not"
        return Finding("backends", "note", summary, evidence, (), IOMMUFD_PAGE)
    summary = "VFIO offers no interface yet: its modules are not loaded"
    return Finding("backends", "note", summary, evidence, ("modprobe vfio-pci",), VFIO_PAGE)


def _memory_lock(facts: DoctorFacts) -> Finding:
    """How much memory this user may lock: a VM with a passed-through device locks all of its."""
    path = f"{PROC}/self/limits"
    limit = facts.memory_lock
    if limit is None:
        summary = "the limit on locked memory is unknown"
        evidence = f"{path} cannot be read"
        return Finding("memory-lock", "note", summary, evidence, (), LIMITS_PAGE)
    evidence = f"{path}: Max locked memory {limit.soft} {limit.hard}"
    if limit.exempt:
        summary = f"this process may lock any amount (CAP_IPC_LOCK); its limit is {_size(limit)}"
        return Finding("memory-lock", "ok", summary, evidence)
    if not limit.soft.isdecimal() or int(limit.soft) >= _LOW_LIMIT_BYTES:
        summary = f"this process may lock {_size(limit)}"
        return Finding("memory-lock", "ok", summary, evidence)
    return Finding(
        "memory-lock",
        "warning",
        f"this user may lock {_size(limit)}: too little for a VM of any size",
        evidence,
        more_memory_lock(facts.distribution),
        LIMITS_PAGE,
    )


def more_memory_lock(distribution: Distribution) -> tuple[str, ...]:
    """What lets users of the group kvm lock any amount of memory."""
    if distribution.family == "nixos":
        return (
            "in /etc/nixos/configuration.nix: security.pam.loginLimits = [ { domain = "
            '"@kvm"; type = "-"; item = "memlock"; value = "unlimited"; } ];',
            "nixos-rebuild switch",
            "log in again",
        )
    return (
        "echo '@kvm - memlock unlimited' > /etc/security/limits.d/vfio.conf",
        "usermod --append --groups kvm $USER",
        "log in again",
    )


def _size(limit: object) -> str:
    text = str(getattr(limit, "soft", limit))
    if not text.isdecimal():
        return "any amount" if text == "unlimited" else text
    number = int(text)
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


def _hugepages(facts: DoctorFacts) -> list[Finding]:
    """Reserved huge pages by NUMA node and size."""
    return [
        _node_pages(node, list(sizes))
        for node, sizes in groupby(facts.hugepages, key=lambda pages: pages.node)
    ]


def _node_pages(node: str, sizes: list[HugePages]) -> Finding:
    files = [pages.file for pages in sizes]
    evidence = ", ".join(files)
    if any(pages.total for pages in sizes):
        parts = [f"{each.total} of {each.kib >> 10} MiB ({each.free} free)" for each in sizes]
        summary = f"{node} has huge pages reserved: {', '.join(parts)}"
        return Finding("hugepages", "ok", summary, evidence)
    summary = f"{node} has no huge pages reserved; VMs work without, a little slower"
    topic = "no huge pages are reserved on {}; VMs work without, a little slower"
    # 2 GiB of the common size: of others 1,024 pages can be more than the machine has.
    size = min(sizes, key=lambda pages: abs(pages.kib - 2048))
    remedy = (f"echo {max(1, _EXAMPLE_KIB // size.kib)} > {size.file}",)
    return Finding("hugepages", "note", summary, evidence, remedy, HUGEPAGES_PAGE, topic, node)


def _unsafe_options(facts: DoctorFacts) -> list[Finding]:
    found = []
    for module, name in facts.unsafe_parameters:
        path = f"{SYS_MODULE}/{module}/parameters/{name}"
        # The deny list's parameter cannot be written (0444): only loading anew changes it.
        clear = f"echo N > {path}" if name != "disable_denylist" else "modprobe -r vfio-pci"
        remedy = (clear, f"grep -r {name} /etc/modprobe.d {PROC_CMDLINE}")
        summary = f"{module}.{name} is set: {_MEANINGS[name]}"
        found.append(
            Finding("unsafe-option", "warning", summary, f"{path} is Y", remedy, VFIO_PAGE)
        )
    for word in facts.platform.options or ():
        if word.startswith("pcie_acs_override="):
            summary = f"{word}: groups look smaller than the hardware isolates"
            remove = facts.distribution.without_kernel_option(word)
            found.append(
                Finding("unsafe-option", "warning", summary, PROC_CMDLINE, remove, PARAMETERS_PAGE)
            )
    if not found:
        summary = "no option that trades isolation away is set"
        found.append(Finding("unsafe-option", "ok", summary, f"{PROC_CMDLINE}, {SYS_MODULE}"))
    return found


def _lockdown(text: str | None) -> list[Finding]:
    match = re.search(r"\[(\w+)\]", text or "")
    if match is None or match[1] == "none":
        return []
    summary = (
        f"the kernel is locked down ({match[1]}): VFIO works, but unsigned modules and writing "
        "PCI registers through sysfs are refused"
    )
    return [Finding("lockdown", "note", summary, f"{SYS_LOCKDOWN}: {text}", (), LOCKDOWN_PAGE)]


def _kvm(facts: DoctorFacts) -> Finding:
    path = f"{DEV}/kvm"
    if facts.kvm == "open":
        # The node can be there and no guest run: only the lab's trial boot shows that.
        summary = "KVM's device node is there; vfiotool lab run shows whether guests start with it"
        return Finding("kvm", "ok", summary, f"{path} is there")
    if facts.kvm == "denied":
        summary = "this user may not open KVM: virtual machines will be emulated, and slow"
        remedy: tuple[str, ...] = ("usermod --append --groups kvm $USER", "log in again")
        return Finding("kvm", "note", summary, f"opening {path} is refused", remedy, KVM_PAGE)
    summary = "there is no KVM: virtual machines will be emulated, and slow"
    remedy = {
        "x86": ("modprobe kvm_intel || modprobe kvm_amd",),
        "s390x": ("modprobe kvm",),
        "ppc64": ("modprobe kvm_hv",),
        "arm64": ("a kernel with CONFIG_KVM that was started at exception level 2",),
        "riscv64": ("modprobe kvm",),
    }.get(facts.platform.architecture or "x86", ())
    return Finding("kvm", "note", summary, f"{path} is absent", remedy, KVM_PAGE)
