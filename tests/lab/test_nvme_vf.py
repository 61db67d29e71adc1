"""NVMe VFs on our driver, once they have been given resources: by the kernel's PF, and by ours."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.nvme_guest import bind_nvme, run, to_vfio
from tests.lab.vfio_guest import BACKENDS, PCI
from vfiotool.drivers.nvme import virtualization
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.errors import KernelError
from vfiotool.vfio import Device
from vfiotool.vfio.device import FEATURE_SET

MACHINE = "sriov"
KERNELS = ("6.1", "6.12", "iommufd")
PF, VF = "0000:01:00.0", "0000:01:00.1"
FEATURE_VF_TOKEN = 0


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def no_vfs() -> Iterator[None]:
    (PCI / PF / "sriov_drivers_autoprobe").write_text("0")
    yield
    (PCI / PF / "sriov_numvfs").write_text("0")


def virt_mgmt(node: str, controller: int, action: int, resource: int = 0, count: int = 0) -> None:
    numbers = {"-c": controller, "-a": action, "-r": resource, "-n": count}
    words = [word for option, number in numbers.items() for word in (option, str(number))]
    run("nvme", "virt-mgmt", node, *words)


def controller_node(address: str) -> str:
    return f"/dev/{next((PCI / address / 'nvme').iterdir()).name}"


def drive(device: Device) -> bytes:
    """Write and read back through the VF, polled and by its one interrupt; the data."""
    controller = Controller(device)
    assert controller.queue_limit == 1
    disk, data = controller.namespace(1), os.urandom(300 * 512)
    queue = controller.create_queue()
    queue.write(disk, 1000, data)
    queue.flush(disk)
    assert queue.read(disk, 1000, 300) == data
    queue.close()
    controller.enable_interrupts(1)
    signalled = controller.create_queue(16, vector=0)
    assert signalled.read(disk, 1000, 300) == data
    return data


@pytest.mark.usefixtures("no_vfs")
def test_a_vf_that_the_kernels_pf_has_equipped_is_driven(backend: str) -> None:
    disk = bind_nvme(PF)
    for resource in (1, 0):
        virt_mgmt(controller_node(PF), 0, 1, resource, 0)
    (PCI / PF / "reset").write_text("1")
    disk = bind_nvme(PF)
    (PCI / PF / "sriov_numvfs").write_text("1")
    to_vfio(VF)
    with (
        Device.open(VF, backend=backend) as device,
        pytest.raises(KernelError, match="is offline") as caught,
    ):
        Controller(device)
    assert "virt-mgmt" in (caught.value.hint or "")
    for resource, count in ((1, 1), (0, 2)):
        virt_mgmt(controller_node(PF), 1, 8, resource, count)
    virt_mgmt(controller_node(PF), 1, 9)
    with Device.open(VF, backend=backend) as device:
        written = drive(device)
    # The VF's namespace is the PF's: the kernel reads what the VF wrote.
    run("blockdev", "--flushbufs", str(disk))
    with disk.open("rb") as file:
        file.seek(1000 * 512)
        assert file.read(300 * 512) == written


@pytest.mark.usefixtures("no_vfs")
def test_a_vf_that_our_pf_driver_has_equipped_is_driven() -> None:
    to_vfio(PF)
    parameter = Path("/sys/module/vfio_pci/parameters/enable_sriov")
    parameter.write_text("Y")
    token = uuid.uuid4()
    with Device.open(PF, backend="type1") as pf:
        pf.feature(FEATURE_VF_TOKEN, FEATURE_SET, token.bytes)
        controller = virtualization.release_flexible(Controller(pf))
        assert [entry.online for entry in virtualization.secondaries(controller)] == [False] * 4
        (PCI / PF / "sriov_numvfs").write_text("1")
        virtualization.give(controller, 1, queues=2, interrupts=1)
        first = virtualization.secondaries(controller)[0]
        assert (first.online, first.vf_number, first.queues, first.interrupts) == (True, 1, 2, 1)
        to_vfio(VF)
        with Device.open(VF, backend="type1", vf_token=str(token)) as vf:
            drive(vf)
        assert len(controller.create_queue().read(controller.namespace(1), 1000, 300)) == 300 * 512
        (PCI / PF / "sriov_numvfs").write_text("0")
    parameter.write_text("N")
