"""Whether interrupts are remapped, as the running kernel shows it.

x86 names the interrupt chips behind a remapping unit `IR-…` (arch/x86/kernel/apic,
drivers/iommu/intel/irq_remapping.c, drivers/iommu/amd/iommu.c). On arm64 the GIC's ITS isolates
by device id; its chips are named `ITS-…` (drivers/irqchip/irq-gic-v3-its*.c). Elsewhere the
architecture itself does, and there is nothing to see.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.devices.firmware import iommu_tables
from vfiotool.host.host import Host
from vfiotool.host.paths import PROC, SYS_MODULE

PROC_INTERRUPTS = f"{PROC}/interrupts"


@dataclass(frozen=True, slots=True)
class Remapping:
    """`enabled` is None where it cannot be told."""

    enabled: bool | None
    evidence: str


def interrupt_remapping(host: Host) -> Remapping:
    """Whether device interrupts go through a remapping unit."""
    text = host.read(PROC_INTERRUPTS)
    if text is None:
        return Remapping(None, f"{PROC_INTERRUPTS} cannot be read")
    chips = {word for line in text.splitlines() for word in line.split() if "-" in word}
    remapped = sorted(chip for chip in chips if chip.startswith("IR-"))
    if remapped:
        return Remapping(True, f"{PROC_INTERRUPTS} shows {remapped[0]}")
    translated = sorted(chip for chip in chips if chip.startswith("ITS-"))
    if translated:
        return Remapping(True, f"{PROC_INTERRUPTS} shows {translated[0]}")
    plain = sorted(chip for chip in chips if chip.startswith(("PCI-MSI", "IO-APIC")))
    if plain and {"DMAR", "IVRS"} & set(iommu_tables(host)):
        return Remapping(False, f"{PROC_INTERRUPTS} shows {plain[0]} and no IR- chip")
    return Remapping(None, f"{PROC_INTERRUPTS} shows no x86 interrupt chip behind an IOMMU")


def unsafe_interrupts_allowed(host: Host) -> str | None:
    """The parameter file that lets VFIO go without remapping, if one is set."""
    for module in ("vfio_iommu_type1", "iommufd"):
        path = f"{SYS_MODULE}/{module}/parameters/allow_unsafe_interrupts"
        if host.read(path) in ("Y", "1"):
            return path
    return None
