"""The IOMMU told apart: what the firmware offers, what the kernel was told, what came of it.

Ground truth is the effect (/sys/class/iommu and the groups). The other two only explain why it is
absent, so they are blockers only when it is. IBM Z and POWER always have one: no firmware set-up
and no ACPI table speaks of it (arch/s390/pci, arch/powerpc/kernel/iommu.c).
"""

from __future__ import annotations

from vfiotool.devices.firmware import IOMMU_TABLES
from vfiotool.devices.platform import Platform
from vfiotool.doctor.facts import DoctorFacts
from vfiotool.doctor.finding import IOMMU_PAGE, PARAMETERS_PAGE, VFIO_PAGE, Finding
from vfiotool.host.distribution import Distribution
from vfiotool.host.paths import (
    PROC_CMDLINE,
    SYS_FIRMWARE_ACPI_TABLES,
    SYS_IOMMU,
    SYS_IOMMU_GROUPS,
)

_BUILT_IN = {"s390x": "IBM Z", "ppc64": "POWER"}
# Architectures on which device interrupts are isolated by what delivers them: s390
# (arch_is_isolated_msi), and POWER, where VFIO asks nothing (drivers/vfio/vfio_iommu_spapr_tce.c).
_ISOLATED = ("s390x", "ppc64")
_MESSAGES = {
    "x86": "dmesg | grep -i -e DMAR -e IOMMU -e AMD-Vi",
    "arm64": "dmesg | grep -i -e smmu -e iommu",
}


def judge_iommu(facts: DoctorFacts) -> list[Finding]:
    """Firmware, kernel option, effect, interrupt remapping."""
    return [
        _firmware(facts.platform),
        _option(facts),
        _effect(facts),
        _remapping(facts.platform, facts.distribution),
    ]


def _firmware(platform: Platform) -> Finding:
    builtin = _BUILT_IN.get(platform.architecture or "")
    if builtin is not None:
        summary = f"{builtin} has an IOMMU in every machine"
        evidence = f"the architecture is {platform.architecture}"
        return Finding("iommu-firmware", "ok", summary, evidence)
    tables = platform.tables or ()
    evidence = f"{SYS_FIRMWARE_ACPI_TABLES}: {', '.join(tables) or _none_of(platform)}"
    if tables:
        kinds = ", ".join(IOMMU_TABLES[table] for table in tables)
        return Finding("iommu-firmware", "ok", f"the firmware describes {kinds}", evidence)
    if platform.works:
        summary = "the firmware has no ACPI table for an IOMMU, yet one works"
        return Finding("iommu-firmware", "ok", summary, evidence)
    if platform.tables is None:
        summary = "whether the firmware offers an IOMMU cannot be told here"
        page = IOMMU_PAGE if platform.architecture == "x86" else VFIO_PAGE
        return Finding("iommu-firmware", "note", summary, evidence, (), page)
    unit = {"intel": "VT-d", "amd": "AMD-Vi (IOMMU)"}.get(platform.vendor or "")
    if unit is None:
        unit = "the SMMU" if platform.architecture == "arm64" else "VT-d or AMD-Vi"
        unit = unit if platform.architecture else "VT-d, AMD-Vi or SMMU"
    return Finding(
        "iommu-firmware",
        "blocker",
        "the firmware offers no IOMMU",
        evidence,
        (f"enable {unit} in the firmware's setup; a VM needs a virtual IOMMU",),
        IOMMU_PAGE,
    )


def _none_of(platform: Platform) -> str:
    return "not there" if platform.tables is None else "no " + ", ".join(IOMMU_TABLES)


def _option(facts: DoctorFacts) -> Finding:
    platform, distribution = facts.platform, facts.distribution
    words = platform.options or ()
    relevant = [word for word in words if "iommu" in word or word.startswith("intremap")]
    evidence = f"{PROC_CMDLINE}: {' '.join(relevant) or 'no word about the IOMMU'}"
    off = platform.switched_off
    if off is not None:
        remedy = (*distribution.without_kernel_option(off), "reboot")
        summary = f"the kernel was told to leave the IOMMU alone ({off})"
        return Finding("iommu-option", "blocker", summary, evidence, remedy, PARAMETERS_PAGE)
    if "amd_iommu=on" in words:
        summary = "amd_iommu=on is not an option of the kernel; AMD's IOMMU is on by itself"
        return Finding("iommu-option", "note", summary, evidence, (), PARAMETERS_PAGE)
    if platform.works:
        return Finding("iommu-option", "ok", "the kernel uses the IOMMU", evidence)
    missing = platform.missing_option
    if missing is not None:
        remedy = (*distribution.kernel_option(missing), "reboot")
        summary = "the kernel was not told to use the IOMMU that the firmware describes"
        if facts.default_on is not None:
            evidence += f"; {facts.default_on}"
        if missing in distribution.grub_options:
            evidence += "; /etc/default/grub has it, and " + (
                "the boot loader's own configuration was not made anew since, or not booted"
                if distribution.on_grub
                else "is not what this machine boots with"
            )
        return Finding("iommu-option", "blocker", summary, evidence, remedy, PARAMETERS_PAGE)
    if platform.options is None:
        summary = "whether the kernel was told to leave the IOMMU alone cannot be told here"
        evidence = f"{PROC_CMDLINE} cannot be read"
        return Finding("iommu-option", "note", summary, evidence, (), PARAMETERS_PAGE)
    summary = "the command line does not switch the IOMMU off"
    return Finding("iommu-option", "ok", summary, evidence)


def _effect(facts: DoctorFacts) -> Finding:
    platform = facts.platform
    units = ", ".join(platform.units) or "empty"
    evidence = f"{SYS_IOMMU}: {units}; {SYS_IOMMU_GROUPS}: {platform.groups}"
    if platform.works:
        count = f"{len(platform.units)} IOMMU" if platform.units else "the IOMMU is"
        groups = "1 group" if platform.groups == 1 else f"{platform.groups} groups"
        summary = f"{count} in use, {groups}"
        return Finding("iommu-effect", "ok", summary, evidence)
    if platform.groups:
        summary = "there are groups, but no IOMMU behind them"
        if platform.noiommu:
            summary += ": all are no-IOMMU groups"
        return Finding("iommu-effect", "blocker", summary, evidence, (), VFIO_PAGE)
    remedy: tuple[str, ...] = (
        _MESSAGES.get(platform.architecture or "x86", "dmesg | grep -i iommu"),
    )
    if platform.tables == ("VIOT",):
        absent = facts.modules["virtio_iommu"].state == "absent"
        load = "a kernel with CONFIG_VIRTIO_IOMMU" if absent else "modprobe virtio_iommu"
        remedy = (load, *remedy)
    remedy = (*remedy, "to try vfiotool without an IOMMU of your own: vfiotool lab demo")
    summary = "no IOMMU is in use: nothing can be passed through safely"
    return Finding("iommu-effect", "blocker", summary, evidence, remedy, VFIO_PAGE)


def _remapping(platform: Platform, distribution: Distribution) -> Finding:
    state = platform.remapping
    if state.enabled:
        summary = "interrupts are remapped"
        return Finding("interrupt-remapping", "ok", summary, state.evidence)
    if platform.architecture in _ISOLATED:
        summary = f"interrupts are isolated on {_BUILT_IN[platform.architecture]}"
        evidence = f"the architecture is {platform.architecture}"
        return Finding("interrupt-remapping", "ok", summary, evidence)
    if state.enabled is None or not platform.works:
        summary = "whether interrupts are remapped cannot be told here"
        return Finding("interrupt-remapping", "note", summary, state.evidence, (), VFIO_PAGE)
    remedy = ["enable interrupt remapping and x2APIC in the firmware's setup"]
    off = [word for word in platform.options or () if word in ("intremap=off", "nointremap")]
    if off:
        remedy = [*distribution.without_kernel_option(off[0]), "reboot"]
    if platform.unsafe_interrupts is not None:
        summary = "interrupts are not remapped, and VFIO was told to go on regardless"
        evidence = f"{state.evidence}; {platform.unsafe_interrupts}"
        return Finding(
            "interrupt-remapping", "warning", summary, evidence, tuple(remedy), VFIO_PAGE
        )
    option = distribution.module_option("vfio_iommu_type1", "allow_unsafe_interrupts=1")
    remedy.append(f"only if every guest is trusted: {' && '.join(option)}")
    summary = "interrupts are not remapped: VFIO will refuse every group"
    return Finding(
        "interrupt-remapping", "blocker", summary, state.evidence, tuple(remedy), VFIO_PAGE
    )
