"""What the group and the IOMMU put in the way, produced for real."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.lab.blockers_guest import PCI, assert_passable, blockers, need, why

MACHINE = ("shared-group", "no-iommu")
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

EDU = ("0x1234", "0x11e8")
TESTDEV = ("0x1b36", "0x0005")


def find(ident: tuple[str, str]) -> str:
    for folder in sorted(PCI.iterdir()):
        if ((folder / "vendor").read_text().strip(), (folder / "device").read_text().strip()) == (
            ident
        ):
            return folder.name
    pytest.fail(f"this machine has no {ident}")


def test_without_an_iommu_nothing_is_passable(lab_machine: str) -> None:
    if lab_machine != "no-iommu":
        pytest.skip("this machine has an IOMMU")
    need("vfio-pci")
    code, answer = why(find(EDU))
    (entry,) = answer["blockers"]
    assert (code, entry["kind"], answer["group"]) == (1, "no-iommu", None)
    assert "the firmware shows none" in entry["detail"]
    assert not any(Path("/sys/class/iommu").iterdir())
    assert answer["next"] == ["vfiotool doctor"]


def test_a_member_on_a_host_driver_blocks_its_group(lab_machine: str) -> None:
    if lab_machine != "shared-group":
        pytest.skip("this machine has no shared group")
    need("vfio-pci", "uio_pci_generic")
    edu, other = find(EDU), find(TESTDEV)
    assert (PCI / edu / "iommu_group").resolve() == (PCI / other / "iommu_group").resolve()
    assert_passable(edu)
    (PCI / other / "driver_override").write_text("uio_pci_generic")
    try:
        Path("/sys/bus/pci/drivers/uio_pci_generic/bind").write_text(other)
    except OSError:
        # It wants an interrupt pin, which the one device has and the other has not.
        edu, other = other, edu
        (PCI / other / "driver_override").write_text("uio_pci_generic")
        Path("/sys/bus/pci/drivers/uio_pci_generic/bind").write_text(other)
    (entry,) = blockers(edu, "group-member")
    assert entry["device"] == other
    assert entry["detail"].endswith("is on the host's driver uio_pci_generic")
    assert Path(entry["evidence"]).is_symlink()
    answer = why(edu)[1]
    assert answer["group"]["viable"] is False
    assert f"vfiotool bind {edu} --whole-group" in answer["next"]
    held = Path("/dev/uio0")
    descriptor = os.open(held, os.O_RDWR | os.O_CLOEXEC)
    child = subprocess.Popen(["sleep", "1000"], stdin=descriptor)
    os.close(descriptor)
    try:
        (entry,) = blockers(edu, "open-file")
        assert (entry["device"], entry["subject"]) == (other, str(held))
    finally:
        child.kill()
        child.wait()
    (PCI / other / "driver" / "unbind").write_text(other)
    (PCI / other / "driver_override").write_text("\n")
    assert_passable(edu)


def test_a_bridge_cannot_be_passed(lab_machine: str) -> None:
    need("vfio-pci")
    for folder in sorted(PCI.iterdir()):
        if (folder / "class").read_text().startswith("0x0604"):
            (entry,) = blockers(folder.name, "no-driver")
            assert entry["evidence"] == f"{folder}/class is 060400"
            return
    pytest.fail("this machine has no bridge")
