"""Without an IOMMU: refused by default, taken only by name, and then without any mapping."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.vfio_guest import EDU, bind_vfio
from vfiotool.errors import Refused, Unsupported, VfiotoolError
from vfiotool.vfio import Device

MACHINE = "no-iommu"
KERNELS = ("iommufd",)  # Debian 12 builds its kernels without CONFIG_VFIO_NOIOMMU

UNSAFE = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")


@pytest.fixture(scope="module", autouse=True)
def unsafe_mode() -> None:
    subprocess.run(["modprobe", "-a", "vfio", "vfio-pci", "vfio_iommu_type1"], check=False)
    if not UNSAFE.exists():
        pytest.skip("this kernel is built without CONFIG_VFIO_NOIOMMU")
    UNSAFE.write_text("Y")
    bind_vfio(EDU)


def test_it_is_never_chosen_unasked_and_the_hint_names_it() -> None:
    for backend in ("auto", "type1"):
        with pytest.raises(Unsupported) as caught:
            Device.open(EDU, backend=backend)
        assert "no-IOMMU" in caught.value.message
        assert "noiommu" in (caught.value.hint or "")
        assert caught.value.exit_code == 8


def test_asked_for_by_name_it_reads_registers_and_maps_nothing() -> None:
    with Device.open(EDU, backend="noiommu") as device:
        assert device.backend == "noiommu"
        assert device.region(0).map().read32(0) == 0x010000ED
        with device.irqs.msi() as interrupts:
            interrupts[0].trigger()
            assert interrupts[0].wait(5.0) == 1
        with pytest.raises(VfiotoolError):
            device.dma.alloc(4096)


UNPRIVILEGED = """
import os, sys
import vfiotool.vfio.iommufd, vfiotool.vfio.type1
from vfiotool.errors import NotPermitted
from vfiotool.vfio import Device
for name in os.listdir("/dev/vfio"):
    if not os.path.isdir("/dev/vfio/" + name):
        os.chmod("/dev/vfio/" + name, 0o666)
os.setresuid(65534, 65534, 65534)
try:
    Device.open(sys.argv[1], backend="noiommu")
except NotPermitted as error:
    print(error.exit_code, error.hint)
"""


def test_a_process_without_cap_sys_rawio_is_told_what_it_lacks() -> None:
    command = [sys.executable, "-c", UNPRIVILEGED, EDU]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 ")
    assert "CAP_SYS_RAWIO" in done.stdout


def test_a_device_without_driver_and_group_points_to_the_doctor() -> None:
    UNSAFE.write_text("N")
    try:
        with pytest.raises(Refused) as caught:
            Device.open("0000:00:02.0")
        assert caught.value.hint == "vfiotool doctor"
    finally:
        UNSAFE.write_text("Y")
