"""Two devices in one group: viability, one driver's two devices in one container."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, PCI, bind_vfio, open_descriptors, unbind
from vfiotool.drivers.edu import Edu
from vfiotool.errors import KernelError, Refused, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.vfio import Device, find, open_space

MACHINE = "shared-group"
KERNELS = ("6.1", "6.12", "iommufd")


def members() -> tuple[str, str]:
    """The addresses of edu and pci-testdev behind the bridge."""
    found = {}
    for path in PCI.iterdir():
        found[(path / "vendor").read_text().strip() + (path / "device").read_text().strip()] = (
            path.name
        )
    return found["0x12340x11e8"], found["0x1b360x0005"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_member_can_be_driven_while_the_other_is_on_no_driver(backend: str) -> None:
    edu, testdev = members()
    bind_vfio(edu)
    unbind(testdev)
    with Device.open(edu, backend=backend) as device:
        assert Edu(device).factorial(4) == 24


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_members_share_one_space_and_the_group_is_left_with_the_last(backend: str) -> None:
    edu, testdev = members()
    bind_vfio(edu)
    bind_vfio(testdev)
    host = Host.local()
    before = open_descriptors()
    with open_space(find(edu, host), backend, host) as space:
        first = Device.open(edu, space=space)
        second = Device.open(testdev, space=space)
        driver = Edu(first)
        with second.dma.alloc(4096, limit_bits=28) as memory:
            memory.view[:4] = b"both"
            driver.dma(memory.iova, 0, 4, to_memory=False)
            driver.dma(memory.iova + 64, 0, 4, to_memory=True)
            assert memory.view[64:68] == b"both"
        # Another container may not have the second member while the group is in this one.
        second.close()
        with pytest.raises(KernelError) as caught:
            Device.open(testdev, backend="type1")
        assert caught.value.errno_name == "EBUSY"
        assert driver.factorial(3) == 6
    assert open_descriptors() == before
    with Device.open(testdev, backend=backend):
        pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hot_reset_of_the_bus_takes_both_members_along(backend: str) -> None:
    edu, testdev = members()
    bind_vfio(edu)
    bind_vfio(testdev)
    host = Host.local()
    with open_space(find(edu, host), backend, host) as space:
        devices = [Device.open(name, space=space) for name in (edu, testdev)]
        bars = [device.region(0).map() for device in devices]
        interrupt = devices[0].irqs.msi()[0]
        for device in devices:
            device.set_bus_master(True)
        reset = [entry.address for entry in devices[0].hot_reset()]
        assert reset == [edu, testdev]
        assert [device.bus_master for device in devices] == [False, False]
        # Mappings and interrupts go on, and both devices still drive.
        assert bars[0].read32(0) == 0x010000ED
        bars[1].read32(0)
        interrupt.trigger()
        assert interrupt.wait(5.0) == 1
        devices[0].irqs.close()
        assert Edu(devices[0]).factorial(5) == 120
    # The group is ours although only one member is open.
    with Device.open(edu, backend=backend) as device:
        assert testdev in [entry.address for entry in device.hot_reset()]
        assert Edu(device).factorial(6) == 720


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hot_reset_that_would_reach_an_unbound_member_is_refused_and_names_it(
    backend: str,
) -> None:
    edu, testdev = members()
    bind_vfio(edu)
    unbind(testdev)
    with Device.open(edu, backend=backend) as device:
        with pytest.raises(VfiotoolError, match=f"would reset {edu}, {testdev}"):
            device.hot_reset()
        assert Edu(device).factorial(4) == 24


def test_a_member_on_a_host_driver_makes_the_group_not_viable() -> None:
    edu, testdev = members()
    bind_vfio(testdev)
    unbind(edu)
    if subprocess.run(["modprobe", "uio_pci_generic"], check=False).returncode:
        pytest.skip("this kernel has no uio_pci_generic to stand for a host driver")
    (PCI / edu / "driver_override").write_text("uio_pci_generic")
    (Path("/sys/bus/pci") / "drivers_probe").write_text(edu)
    if not (PCI / edu / "driver").exists():
        pytest.skip("the host driver did not take the device")
    try:
        with pytest.raises(Refused) as caught:
            Device.open(testdev, backend="type1")
        assert caught.value.exit_code == 4
        assert caught.value.hint == f"vfiotool why {testdev}"
        assert os.path.basename((PCI / testdev / "iommu_group").resolve()) in caught.value.message
    finally:
        unbind(edu)
