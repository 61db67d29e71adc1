"""A device in no IOMMU group: `vm check` says so, as QEMU does; behind an IOMMU neither does."""

from __future__ import annotations

from tests.lab.commands import modprobe
from tests.lab.vfio_guest import EDU, bind_vfio, unbind
from tests.lab.vm_starts import findings, options, start

MACHINE = ("no-iommu", "basic")
KERNELS = ("6.12",)
PROOF = "QEMU is started within an emulated guest"


def test_a_device_in_no_group(lab_machine: str) -> None:
    if lab_machine == "no-iommu":
        found = findings(EDU)["no-iommu"]
        assert found["severity"] == "blocker" and found["next"] == f"vfiotool why {EDU}"
        said = start(["-device", f"vfio-pci,host={EDU}"])
        assert "no iommu_group found: No such file or directory" in said
        return
    modprobe("vfio-pci", "vfio_iommu_type1")
    bind_vfio(EDU)
    assert "no-iommu" not in findings(EDU) and not start(options(EDU))
    unbind(EDU)
