"""What the firmware tells of IOMMUs: the one list of its tables."""

from __future__ import annotations

from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_FIRMWARE_ACPI_TABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# ACPI tables that describe an IOMMU, with what they describe (ACPI specification, DESC_HEADER
# signatures; drivers/iommu and drivers/acpi/{arm64,riscv,viot}.c).
IOMMU_TABLES: Mapping[str, str] = {
    "DMAR": "Intel VT-d",
    "IVRS": "AMD-Vi",
    "IORT": "Arm SMMU",
    "VIOT": "virtio-iommu",
    "RIMT": "RISC-V IOMMU",
}
# Where the kernel leaves the IOMMU off unless it is told otherwise (drivers/iommu/intel/Kconfig,
# INTEL_IOMMU_DEFAULT_ON); all others are on by themselves.
OPTION_THAT_ENABLES = {"DMAR": "intel_iommu=on"}


def iommu_tables(host: Host) -> tuple[str, ...]:
    """The names of the firmware's tables that describe an IOMMU, sorted."""
    return tuple(name for name in host.listdir(SYS_FIRMWARE_ACPI_TABLES) if name in IOMMU_TABLES)
