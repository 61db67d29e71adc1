"""The IOMMU told apart: what the firmware offers, what the kernel was told, what came of it.

Ground truth is the effect (/sys/class/iommu and the groups). The other two only explain why it is
absent, so they are blockers only when it is.
"""

from __future__ import annotations

import re

from vfiotool.devices.firmware import IOMMU_TABLES, iommu_tables
from vfiotool.devices.iommu import list_groups
from vfiotool.devices.remapping import interrupt_remapping, unsafe_interrupts_allowed
from vfiotool.doctor.finding import IOMMU_PAGE, PARAMETERS_PAGE, VFIO_PAGE, Finding
from vfiotool.doctor.kernel import module_state
from vfiotool.host.distribution import Distribution
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    PROC_CMDLINE,
    PROC_OSRELEASE,
    SYS_FIRMWARE_ACPI_TABLES,
    SYS_IOMMU,
    SYS_IOMMU_GROUPS,
)

_OFF = {"intel_iommu=off", "amd_iommu=off", "iommu=off", "iommu.off=1"}


def examine_iommu(host: Host, distribution: Distribution) -> list[Finding]:
    """Firmware, kernel option, effect, interrupt remapping."""
    entries = host.listdir(SYS_IOMMU)
    groups = list_groups(host)
    works = bool(entries) and bool(groups)
    return [
        _firmware(host, works),
        _option(host, distribution, works),
        _effect(host, entries, groups),
        _remapping(host, distribution, works),
    ]


def _firmware(host: Host, works: bool) -> Finding:
    tables = iommu_tables(host)
    evidence = f"{SYS_FIRMWARE_ACPI_TABLES}: {', '.join(tables) or 'no ' + ', '.join(IOMMU_TABLES)}"
    if tables:
        kinds = ", ".join(IOMMU_TABLES[table] for table in tables)
        return Finding("iommu-firmware", "ok", f"the firmware describes {kinds}", evidence)
    if works:
        summary = "the firmware has no ACPI table for an IOMMU, yet one works"
        return Finding("iommu-firmware", "ok", summary, evidence)
    return Finding(
        "iommu-firmware",
        "blocker",
        "the firmware offers no IOMMU",
        evidence,
        ("enable VT-d, AMD-Vi or SMMU in the firmware's setup; a VM needs a virtual IOMMU",),
        IOMMU_PAGE,
    )


def _option(host: Host, distribution: Distribution, works: bool) -> Finding:
    words = (host.read(PROC_CMDLINE) or "").split()
    relevant = [word for word in words if "iommu" in word or word.startswith("intremap")]
    evidence = f"{PROC_CMDLINE}: {' '.join(relevant) or 'no word about the IOMMU'}"
    off = sorted(_OFF & set(words))
    if off:
        remedy: tuple[str, ...] = (f"remove {off[0]} from the kernel's command line", "reboot")
        summary = f"the kernel was told to leave the IOMMU alone ({off[0]})"
        return Finding("iommu-option", "blocker", summary, evidence, remedy, PARAMETERS_PAGE)
    if "amd_iommu=on" in words:
        summary = "amd_iommu=on is not an option of the kernel; AMD's IOMMU is on by itself"
        return Finding("iommu-option", "note", summary, evidence, (), PARAMETERS_PAGE)
    if works:
        return Finding("iommu-option", "ok", "the kernel uses the IOMMU", evidence)
    tables = iommu_tables(host)
    if "DMAR" in tables and not any(word.startswith("intel_iommu=on") for word in words):
        default = _default_on(host)
        remedy = (*distribution.kernel_option("intel_iommu=on"), "reboot")
        summary = "the kernel was not told to use the IOMMU that the firmware describes"
        if default is not None:
            evidence += f"; {default}"
        return Finding("iommu-option", "blocker", summary, evidence, remedy, PARAMETERS_PAGE)
    summary = "the command line does not switch the IOMMU off"
    return Finding("iommu-option", "ok", summary, evidence)


def _default_on(host: Host) -> str | None:
    """What the kernel's configuration says of VT-d without an option."""
    path = f"/boot/config-{host.read(PROC_OSRELEASE)}"
    match = re.search(r"^.*CONFIG_INTEL_IOMMU_DEFAULT_ON\b.*$", host.read(path) or "", re.MULTILINE)
    return None if match is None else f"{path}: {match[0]}"


def _effect(host: Host, entries: list[str], groups: list[int]) -> Finding:
    evidence = f"{SYS_IOMMU}: {', '.join(entries) or 'empty'}; {SYS_IOMMU_GROUPS}: {len(groups)}"
    if entries and groups:
        summary = f"{len(entries)} IOMMU in use, {len(groups)} groups"
        return Finding("iommu-effect", "ok", summary, evidence)
    if groups:
        names = {host.read(f"{SYS_IOMMU_GROUPS}/{group}/name") for group in groups}
        summary = "there are groups, but no IOMMU behind them"
        if names == {"vfio-noiommu"}:
            summary += ": all are no-IOMMU groups"
        return Finding("iommu-effect", "blocker", summary, evidence, (), VFIO_PAGE)
    remedy: tuple[str, ...] = ("dmesg | grep -i -e DMAR -e IOMMU -e AMD-Vi",)
    if iommu_tables(host) == ("VIOT",):
        absent = module_state(host, "virtio_iommu")[0] == "absent"
        load = "a kernel with CONFIG_VIRTIO_IOMMU" if absent else "modprobe virtio_iommu"
        remedy = (load, *remedy)
    remedy = (*remedy, "to try vfiotool without an IOMMU of your own: vfiotool lab demo")
    summary = "no IOMMU is in use: nothing can be passed through safely"
    return Finding("iommu-effect", "blocker", summary, evidence, remedy, VFIO_PAGE)


def _remapping(host: Host, distribution: Distribution, works: bool) -> Finding:
    state = interrupt_remapping(host)
    if state.enabled:
        summary = "interrupts are remapped"
        return Finding("interrupt-remapping", "ok", summary, state.evidence)
    if state.enabled is None or not works:
        summary = "whether interrupts are remapped cannot be told here"
        return Finding("interrupt-remapping", "note", summary, state.evidence, (), VFIO_PAGE)
    words = (host.read(PROC_CMDLINE) or "").split()
    remedy = ["enable interrupt remapping and x2APIC in the firmware's setup"]
    off = [word for word in words if word in ("intremap=off", "nointremap")]
    if off:
        remedy = [f"remove {off[0]} from the kernel's command line", "reboot"]
    allowed = unsafe_interrupts_allowed(host)
    if allowed is not None:
        summary = "interrupts are not remapped, and VFIO was told to go on regardless"
        evidence = f"{state.evidence}; {allowed}"
        return Finding(
            "interrupt-remapping", "warning", summary, evidence, tuple(remedy), VFIO_PAGE
        )
    option = distribution.module_option("vfio_iommu_type1", "allow_unsafe_interrupts=1")
    remedy.append(f"only if every guest is trusted: {' && '.join(option)}")
    summary = "interrupts are not remapped: VFIO will refuse every group"
    return Finding(
        "interrupt-remapping", "blocker", summary, state.evidence, tuple(remedy), VFIO_PAGE
    )
