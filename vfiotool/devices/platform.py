"""What this machine offers VFIO as a whole: its architecture, its IOMMU, and what was asked of it.

Ground truth for "is the IOMMU on" is the effect (/sys/class/iommu and the groups); firmware and
kernel options only explain why it is absent. A file that is not there is unknown (None) where the
tree may be a part of a machine's, and never taken for an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.devices.firmware import OPTION_THAT_ENABLES, iommu_tables
from vfiotool.devices.identity import list_groups
from vfiotool.devices.remapping import Remapping, interrupt_remapping, unsafe_interrupts_allowed
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    PROC,
    PROC_ARCH,
    PROC_CMDLINE,
    PROC_OSRELEASE,
    SYS_FIRMWARE_ACPI_TABLES,
    SYS_IOMMU,
    SYS_IOMMU_GROUPS,
)

NOIOMMU = "vfio-noiommu"
# /proc/sys/kernel/arch (uname -m), the end of a distribution's kernel release, and the first
# lines of /proc/cpuinfo: arch/*/kernel/cpu/proc.c, arch/s390/kernel/processor.c,
# arch/powerpc/kernel/setup-common.c, arch/arm64/kernel/cpuinfo.c.
_MACHINES = (
    ("x86", re.compile(r"x86_64|amd64|i[3-6]86|686(-pae)?")),
    ("arm64", re.compile(r"aarch64|arm64")),
    ("s390x", re.compile(r"s390x?")),
    ("ppc64", re.compile(r"ppc64(le|el)?|powerpc64(le)?")),
    ("riscv64", re.compile(r"riscv64")),
)
_CPUS = (
    ("x86", re.compile(r"^vendor_id\s*:\s*(GenuineIntel|AuthenticAMD|HygonGenuine)", re.MULTILINE)),
    ("arm64", re.compile(r"^CPU implementer\s*:", re.MULTILINE)),
    ("s390x", re.compile(r"^vendor_id\s*:\s*IBM/S390", re.MULTILINE)),
    ("ppc64", re.compile(r"^cpu\s*:\s*POWER", re.MULTILINE)),
    ("riscv64", re.compile(r"^isa\s*:\s*rv64", re.MULTILINE)),
)
# How the drivers name their units in /sys/class/iommu.
_UNITS = (
    ("x86", re.compile(r"(dmar|ivhd)\d+")),
    ("arm64", re.compile(r"(smmu3?\.|arm-smmu)")),
    ("s390x", re.compile(r"s390-iommu")),
)


@dataclass(frozen=True, slots=True)
class Platform:
    """`architecture`: x86, arm64, s390x, ppc64, riscv64, or None where nothing tells it.

    `vendor`: intel or amd on x86, where a table or the processor tells. `options`: the kernel's
    command line, word by word, None if it cannot be read. `tables`: the ACPI tables of an IOMMU,
    None where the firmware's tables cannot be listed. `units` and `groups`: what came of it.
    `units_known`: the tree has the class of the units at all; `noiommu`: every group is a
    no-IOMMU group.
    """

    architecture: str | None
    vendor: str | None
    release: str | None
    options: tuple[str, ...] | None
    tables: tuple[str, ...] | None
    units: tuple[str, ...]
    units_known: bool
    groups: int
    noiommu: bool
    remapping: Remapping
    unsafe_interrupts: str | None

    @property
    def works(self) -> bool:
        """Whether the kernel drives an IOMMU. On s390x and POWER it has no class in sysfs."""
        always = self.architecture in ("s390x", "ppc64") or not self.units_known
        return self.groups > 0 and not self.noiommu and (bool(self.units) or always)

    @property
    def missing_option(self) -> str | None:
        """The kernel option that turns the firmware's IOMMU on, where that is what is missing."""
        if self.works or self.options is None or self.switched_off:
            return None
        wanted = {OPTION_THAT_ENABLES.get(table) for table in self.tables or ()} - {None}
        missing = (
            option
            for option in wanted
            if not any(word.startswith(option or "") for word in self.options)
        )
        return next(missing, None)

    @property
    def switched_off(self) -> str | None:
        """The option by which the kernel was told to leave the IOMMU alone."""
        off = ("intel_iommu=off", "amd_iommu=off", "iommu=off", "iommu.off=1")
        return next((word for word in sorted(self.options or ()) if word in off), None)


def read_platform(host: Host) -> Platform:
    """Read once what deciders need to know of the machine. Nothing is raised for what is absent."""
    tables = iommu_tables(host)
    units = tuple(host.listdir(SYS_IOMMU))
    groups = list_groups(host)
    options = host.read(PROC_CMDLINE)
    cpus = host.read(f"{PROC}/cpuinfo") or ""
    release = host.read(PROC_OSRELEASE)
    known = host.live or host.isdir(SYS_FIRMWARE_ACPI_TABLES)
    return Platform(
        architecture=_architecture(host, release, cpus, units, tables),
        vendor=_vendor(tables, cpus),
        release=release,
        options=None if options is None else tuple(options.split()),
        tables=tables if known else None,
        units=units,
        units_known=host.live or host.isdir(SYS_IOMMU),
        groups=len(groups),
        noiommu=bool(groups)
        and not units
        and all(host.read(f"{SYS_IOMMU_GROUPS}/{group}/name") == NOIOMMU for group in groups),
        remapping=interrupt_remapping(host),
        unsafe_interrupts=unsafe_interrupts_allowed(host),
    )


def _architecture(
    host: Host, release: str | None, cpus: str, units: tuple[str, ...], tables: tuple[str, ...]
) -> str | None:
    named = (host.read(PROC_ARCH), re.split(r"[.-]", release or "")[-1])
    for text in named:
        for architecture, pattern in _MACHINES:
            if text and pattern.fullmatch(text):
                return architecture
    for architecture, pattern in _CPUS:
        if pattern.search(cpus):
            return architecture
    for architecture, pattern in _UNITS:
        if any(pattern.match(unit) for unit in units):
            return architecture
    if {"DMAR", "IVRS"} & set(tables):
        return "x86"
    return "arm64" if "IORT" in tables else None


def _vendor(tables: tuple[str, ...], cpus: str) -> str | None:
    if "DMAR" in tables or "GenuineIntel" in cpus:
        return "intel"
    return "amd" if "IVRS" in tables or "AuthenticAMD" in cpus else None
