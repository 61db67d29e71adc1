"""Pages of 1 GiB, and resets that take other functions along: what needs a machine of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, PCI, bind_vfio, nvme_functions, status_kib
from vfiotool.drivers.edu import BUFFER_START, Edu
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.errors import KernelError
from vfiotool.host.host import Host
from vfiotool.vfio import AddressSpace, Device, find, open_space

MACHINE = "large"
KERNELS = ("6.1", "6.12", "iommufd")

GIB = 1 << 30
HUGE = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def move(edu: Edu, iova: int, count: int, *, to_memory: bool) -> None:
    """As `Edu.dma`, which keeps to the 28 bits of an edu whose dma_mask was not widened."""
    registers = edu.registers
    registers.dma_source.write(BUFFER_START if to_memory else iova)
    registers.dma_destination.write(iova if to_memory else BUFFER_START)
    registers.dma_count.write(count)
    registers.dma_command.set(run=1, to_memory=int(to_memory))
    edu.wait_idle()


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "memfd"])
def test_a_page_of_1_gib_is_mapped_whole_and_reached_at_both_ends(
    backend: str, shared: bool
) -> None:
    assert int(HUGE.read_text()) == 1, "reserved at boot"
    bind_vfio(EDU)
    with Device.open(EDU, backend=backend) as device:
        edu = Edu(device)
        locked = max(status_kib("VmLck"), status_kib("VmPin"))
        with device.dma.alloc(4096, pages="1G", shared=shared) as buffer:
            assert buffer.size == len(buffer.view) == GIB
            assert buffer.address % GIB == 0 == buffer.iova % GIB
            assert max(status_kib("VmLck"), status_kib("VmPin")) - locked == GIB // 1024
            sent = os.urandom(4096)
            buffer.view[GIB - 4096 :] = sent
            move(edu, buffer.iova + GIB - 4096, 4096, to_memory=False)
            move(edu, buffer.iova, 4096, to_memory=True)
            assert buffer.view[:4096] == sent
            assert buffer.view[4096:8192] == bytes(4096)
        assert max(status_kib("VmLck"), status_kib("VmPin")) == locked


@pytest.fixture
def space(backend: str) -> Iterator[AddressSpace]:
    host = Host.local()
    functions = nvme_functions()
    for address in functions:
        bind_vfio(address)
    with open_space(find(functions[0], host), backend, host) as opened:
        yield opened


def test_a_hot_reset_resets_both_functions_and_leaves_both_quiet_and_usable(
    space: AddressSpace,
) -> None:
    names = nvme_functions()
    devices = [Device.open(name, space=space) for name in names]
    controllers = [Controller(device) for device in devices]
    for controller in controllers:
        controller.enable_interrupts(2)
        assert controller.registers.status.field("ready") == 1
    assert [entry.address for entry in devices[1].hot_reset_dependents()] == names
    assert [entry.address for entry in devices[1].hot_reset()] == names
    for device, controller in zip(devices, controllers, strict=True):
        assert controller.registers.status.field("ready") == 0
        assert controller.registers.configuration.field("enable") == 0
        assert not device.bus_master
        interrupts = device.irqs.active[2]
        interrupts[1].trigger()
        assert interrupts[1].wait(5.0) == 1
        device.close()
    for name in names:
        with Device.open(name, space=space) as device:
            controller = Controller(device)
            assert len(controller.create_queue().read(controller.namespace(1), 0, 8)) == 4096


def test_a_function_of_our_group_is_reset_along_without_being_open(space: AddressSpace) -> None:
    first, second = nvme_functions()
    with Device.open(first, space=space) as device:
        assert second in [entry.address for entry in device.hot_reset()]


def test_a_function_on_a_host_driver_forbids_it_and_is_named(backend: str) -> None:
    pf = next(p.name for p in sorted(PCI.iterdir()) if (p / "sriov_totalvfs").exists())
    (PCI / pf / "sriov_drivers_autoprobe").write_text("0")
    (PCI / pf / "sriov_numvfs").write_text("2")
    try:
        vfs = [(PCI / pf / f"virtfn{number}").resolve().name for number in range(2)]
        bind_vfio(vfs[0])
        with Device.open(vfs[0], backend=backend) as device:
            named = [entry.address for entry in device.hot_reset_dependents()]
            assert named == [pf, *vfs]
            with pytest.raises(KernelError) as caught:
                device.hot_reset()
            assert f"would reset {pf}, {vfs[0]}, {vfs[1]}" in caught.value.message
            assert "in one address space" in (caught.value.hint or "")
            device.config.read32(0)
    finally:
        (PCI / pf / "sriov_numvfs").write_text("0")
        (PCI / pf / "sriov_drivers_autoprobe").write_text("1")
    assert (PCI / pf / "driver").resolve().name == "nvme"
