"""Virtual functions in use, on an NVMe disk with VFs; `why` names what unbinding would destroy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.blockers_guest import (
    PCI,
    assert_passable,
    blockers,
    disk_of,
    need,
    run,
    wait_for,
    why,
)

MACHINE = "sriov"
KERNELS = ("6.1", "6.12", "iommufd")
ALWAYS_ON = ("6.12", "iommufd")


@pytest.fixture
def disk() -> str:
    """The NVMe function that can have VFs."""
    need("vfio-pci", "nvme")
    for folder in sorted(PCI.iterdir()):
        if (folder / "class").read_text().startswith("0x0108") and (
            folder / "sriov_totalvfs"
        ).exists():
            wait_for(lambda folder=folder: (folder / "driver").exists(), "the nvme driver")
            return folder.name
    pytest.skip("this machine has no disk with VFs")


def test_enabled_vfs_keep_their_function_in_use_until_they_are_gone(disk: str) -> None:
    numvfs = PCI / disk / "sriov_numvfs"
    assert_passable(disk)
    (PCI / disk / "sriov_drivers_autoprobe").write_text("0")
    numvfs.write_text("2")
    try:
        (entry,) = blockers(disk, "vfs-enabled")
        assert entry["evidence"] == f"{numvfs} is 2"
        assert entry["detail"] == "2 VFs are enabled"
        assert f"vfiotool vf set {disk} 0" in why(disk)[1]["next"]
        vf = (PCI / disk / "virtfn0").resolve().name
        assert blockers(vf, "vfs-enabled") == []
        assert_passable(vf)
        (PCI / vf / "driver_override").write_text("vfio-pci")
        Path("/sys/bus/pci/drivers_probe").write_text(vf)
        assert (PCI / vf / "driver").resolve().name == "vfio-pci"
        (entry,) = blockers(disk, "vfs-enabled")
        assert f"{vf} (vfio-pci, a VM may hold it)" in entry["detail"]
    finally:
        numvfs.write_text("0")
        (PCI / disk / "sriov_drivers_autoprobe").write_text("1")
    assert_passable(disk)


def test_a_mount_over_native_multipath_is_found(disk: str, tmp_path: Path) -> None:
    """With a subsystem of its own the namespace is not below the function in sysfs."""
    need("ext4", tools=("mkfs.ext4",))
    node = f"/dev/{disk_of(disk)}"
    run("mkfs.ext4", "-q", "-F", node)
    run("mount", node, str(tmp_path))
    try:
        (entry,) = blockers(disk, "mounted")
        assert entry["subject"] == str(tmp_path)
    finally:
        run("umount", str(tmp_path))
    assert_passable(disk)
