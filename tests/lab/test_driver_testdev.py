"""The pci-testdev driver: memory and I/O port BARs, writes counted by the device."""

from __future__ import annotations

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, TESTDEV, bind_vfio
from vfiotool.drivers import demo
from vfiotool.drivers.pci_testdev import PciTestdev
from vfiotool.errors import UsageError
from vfiotool.vfio import Device

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")


@pytest.mark.parametrize("backend", BACKENDS)
def test_demo_counts_through_memory_and_through_ports(backend: str) -> None:
    bind_vfio(TESTDEV)
    with Device.open(TESTDEV, backend=backend) as device:
        checks = list(demo("pci_testdev")(device))
    assert [check.name for check in checks] == [
        "memory: mmio-no-eventfd",
        "memory: mmio-wildcard-eventfd",
        "memory: mmio-datamatch-eventfd",
        "ports: portio-no-eventfd",
        "ports: portio-wildcard-eventfd",
        "ports: portio-datamatch-eventfd",
    ]
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_device_counts_one_access_a_write_and_only_the_right_data(backend: str) -> None:
    bind_vfio(TESTDEV)
    with Device.open(TESTDEV, backend=backend) as device:
        testdev = PciTestdev(device)
        for bar in (testdev.memory, testdev.ports):
            header = testdev.start(bar, 0)
            for done in range(1, 6):
                bar.write8(header.offset, header.data)
                assert testdev.header(bar).count == done
            bar.write8(header.offset, header.data ^ 0xFF)
            assert testdev.header(bar).count == 5


def test_ports_cannot_be_mapped_and_other_devices_are_told_apart() -> None:
    bind_vfio(TESTDEV)
    bind_vfio(EDU)
    with Device.open(TESTDEV) as device, pytest.raises(UsageError, match="cannot be mapped"):
        device.region(1).map()
    with Device.open(EDU) as device, pytest.raises(UsageError, match="not a pci-testdev"):
        PciTestdev(device)
