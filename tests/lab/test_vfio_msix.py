"""MSI-X, resets and low power, on an emulated NVMe controller behind a port of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, PCI, bind_vfio
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.vfio import Device
from vfiotool.vfio.device import FEATURE_GET
from vfiotool.vfio.registers import Register, RegisterMap

MACHINE = "storage"
KERNELS = ("6.1", "6.12", "iommufd")


class Controller(RegisterMap):
    """NVM Express Base Specification 2.0, 3.1.3."""

    capabilities = Register(0x00, width=8, access="ro", halves=True)
    version = Register(0x08, access="ro")
    configuration = Register(
        0x14, fields={"enable": (0, 0), "sq_entry": (19, 16), "cq_entry": (23, 20)}
    )
    status = Register(0x1C, access="ro", fields={"ready": (0, 0)})
    admin_queue_sizes = Register(0x24)
    admin_submission = Register(0x28, width=8, halves=True)
    admin_completion = Register(0x30, width=8, halves=True)


def spare_nvme() -> str:
    """The NVMe controller with the highest address: none of the guest's own files is on it."""
    found = [
        path.name for path in PCI.iterdir() if (path / "class").read_text().startswith("0x0108")
    ]
    return max(found)


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    address = spare_nvme()
    bind_vfio(address)
    with Device.open(address, backend=request.param) as opened:
        yield opened


def test_vectors_are_added_while_others_are_in_use(device: Device) -> None:
    device.set_bus_master(True)
    with device.irqs.msix(1) as interrupts:
        interrupts[0].trigger()
        assert interrupts[0].wait(5.0) == 1
        interrupts.add(3)
        assert len(interrupts) == 4
        for vector in (3, 1, 0, 2):
            interrupts[vector].trigger()
            assert interrupts[vector].wait(5.0) == 1
        assert all(interrupts[vector].wait(0.0) == 0 for vector in range(4))
        with pytest.raises(UsageError, match="msix"):
            interrupts.add(5000)
        interrupts[3].trigger()
        assert interrupts[3].wait(5.0) == 1
    with device.irqs.msix(2) as again:
        again[1].trigger()
        assert again[1].wait(5.0) == 1


def test_the_vector_table_s_region_is_told(device: Device) -> None:
    table_bir = None
    offset = device.config.read8(0x34)
    for _ in range(48):
        if device.config.read8(offset) == 0x11:
            table_bir = device.config.read8(offset + 4) & 7
            break
        offset = device.config.read8(offset + 1)
        if not offset:
            break
    assert table_bir is not None
    region = device.regions[table_bir]
    assert region is not None and region.size
    assert region.msix_mappable or region.areas != ()


def test_reset_brings_registers_back_keeps_interrupts_and_ends_bus_mastering(
    device: Device,
) -> None:
    assert device.info.has_reset
    registers = Controller(device.region(0).map())
    before = registers.capabilities.read()
    assert registers.version.read() >> 16 in (1, 2)
    queues = device.dma.alloc(8192)
    registers.admin_queue_sizes.write(0x001F001F)
    registers.admin_submission.write(queues.iova)
    registers.admin_completion.write(queues.iova + 4096)
    interrupts = device.irqs.msix(2)
    device.set_bus_master(True)
    registers.configuration.set(enable=1, sq_entry=6, cq_entry=4)
    registers.status.poll_field("ready", 1, timeout_s=30)
    device.reset()
    assert not device.bus_master
    assert device.memory_decode
    assert registers.status.field("ready") == 0
    assert registers.capabilities.read() == before
    interrupts[1].trigger()
    assert interrupts[1].wait(5.0) == 1


def test_a_hot_reset_of_a_port_leaves_its_device_quiet_and_usable(device: Device) -> None:
    assert [entry.address for entry in device.hot_reset_dependents()] == [device.name]
    interrupts = device.irqs.msix(1)
    device.set_bus_master(True)
    try:
        assert [entry.address for entry in device.hot_reset()] == [device.name]
    except KernelError as error:
        # QEMU's port tells that it tells of its link, and not that it is up: Linux from 6.2 on
        # then gives up waiting for the device, which has been reset.
        assert error.errno_name == "ENOTTY"
        assert f"it reached {device.name}," in error.message
    assert not device.bus_master
    assert Controller(device.region(0).map()).version.read() >> 16 in (1, 2)
    interrupts[0].trigger()
    assert interrupts[0].wait(5.0) == 1


def test_a_pcie_device_has_an_error_interrupt_beside_the_others(device: Device) -> None:
    error = device.irqs.error()
    with device.irqs.msix(1):
        assert error.wait(0.0) == 0
        error.trigger()
        assert error.wait(5.0) == 1


@pytest.mark.parametrize(
    ("number", "name"),
    [(1, "migration"), (6, "dma-logging-start"), (8, "dma-logging-report"), (11, "dma-buf")],
)
def test_a_feature_that_is_not_there_is_told_by_name(
    device: Device, number: int, name: str
) -> None:
    assert not device.features()[name]
    with pytest.raises(Unsupported, match=f"has no feature {name}"):
        device.feature(number, FEATURE_GET, bytes(32))


def test_low_power_is_entered_and_left_where_the_kernel_has_it(device: Device) -> None:
    if not device.features()["low-power-entry"]:
        pytest.skip("this kernel has no low power feature for VFIO devices")
    device.low_power(True)
    device.low_power(False)
    assert Controller(device.region(0).map()).version.read() >> 16 in (1, 2)


def test_the_host_driver_takes_the_disk_back_afterwards(device: Device) -> None:
    address = device.name
    device.close()
    (PCI / address / "driver_override").write_text("\n")
    (PCI / address / "driver" / "unbind").write_text(address)
    (Path("/sys/bus/pci") / "drivers_probe").write_text(address)
    assert (PCI / address / "driver").resolve().name == "nvme"
    bind_vfio(address)
