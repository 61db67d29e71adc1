"""What every test in a guest relies on: the lab's own promises, seen from inside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")

EDU = Path("/sys/bus/pci/devices/0000:00:01.0")


def test_iommu_is_active_and_edu_has_a_group_of_its_own() -> None:
    assert any(Path("/sys/class/iommu").iterdir())
    assert (EDU / "vendor").read_text().strip() == "0x1234"
    members = (EDU / "iommu_group" / "devices").resolve().iterdir()
    assert [member.name for member in members] == [EDU.name]


def test_vfio_modules_load() -> None:
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    assert Path("/sys/bus/pci/drivers/vfio-pci").is_dir()
    assert Path("/dev/vfio/vfio").exists()


def test_iommufd_and_device_nodes_exist_on_the_kernel_built_for_them(lab_kernel: str) -> None:
    if lab_kernel != "iommufd":
        pytest.skip("Debian 12 builds its kernels without iommufd")
    assert Path("/dev/iommu").exists()


def test_mdev_samples_load(lab_machine: str) -> None:
    subprocess.run(["modprobe", "-a", "mtty", "mbochs", "mdpy"], check=True)
    parents = {path.name for path in Path("/sys/class/mdev_bus").iterdir()}
    assert parents >= {"mtty", "mbochs", "mdpy"}


def test_guest_can_write_everywhere_without_the_host_seeing_it(tmp_path: Path) -> None:
    for folder in (Path.cwd(), Path.home(), Path("/etc"), tmp_path):
        marker = folder / "written-in-a-guest"
        marker.write_text("x")
        assert marker.read_text() == "x"


def test_no_secret_of_the_caller_is_in_the_environment() -> None:
    pytests_own = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"}
    assert set(os.environ) - pytests_own <= {
        "PATH", "HOME", "LANG", "TERM", "PWD", "SHLVL", "_", "OLDPWD", "PYTHONPATH",
        "VFIOTOOL_LAB_MACHINE", "VFIOTOOL_LAB_KERNEL", "VFIOTOOL_YARDSTICK_S",
    }  # fmt: skip


@pytest.mark.parametrize(
    "tool", ["mkfs.ext4", "lvm", "mdadm", "cryptsetup", "nvme", "driverctl", "fio", "strace"]
)
def test_tools_of_the_trade_start(tool: str) -> None:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    assert "error while loading shared libraries" not in done.stderr
    assert done.returncode in (0, 1, 2, 3)
