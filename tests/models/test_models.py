"""The shipped drivers against the shipped models, over vfio-user: no root, no kernel, no QEMU."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest

from tests.models.served import opened, serving
from tests.models.test_conformance import wait_for
from vfiotool.drivers import demo, driver_of, register_map
from vfiotool.drivers.edu import ADDRESS_BITS, BUFFER_SIZE, Edu
from vfiotool.drivers.nvme import Controller
from vfiotool.drivers.pci_testdev import PciTestdev
from vfiotool.errors import KernelError, UsageError
from vfiotool.models import BarSpec, Model
from vfiotool.models.edu import EduModel
from vfiotool.models.nvme import NvmeModel
from vfiotool.models.pci_testdev import PciTestdevModel
from vfiotool.vfio import Device


@pytest.mark.parametrize(
    ("name", "model"),
    [("edu", EduModel), ("pci_testdev", PciTestdevModel), ("nvme", NvmeModel)],
)
def test_a_driver_s_demo_passes_on_its_model(name: str, model: type[Model]) -> None:
    with opened(model()) as device:
        assert driver_of(device) == name
        checks = list(demo(name)(device))
        assert checks and [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("name", ["edu", "nvme"])
def test_a_dump_shows_the_registers(name: str) -> None:
    with opened({"edu": EduModel, "nvme": NvmeModel}[name]()) as device:
        dumped = {register.name: value for register, value, _ in register_map(name, device).dump()}
        assert dumped["identification" if name == "edu" else "version"]


def test_what_is_no_number_is_named_by_its_type() -> None:
    with opened(EduModel()) as device:
        wrong: Any = "4"
        region = device.region(0)
        for call in (
            lambda: device.region(wrong[:0] or None),  # type: ignore[arg-type]
            lambda: region.read32(wrong),
            lambda: region.write32(wrong, 0),
        ):
            with pytest.raises(TypeError, match=r"'\w+' object cannot be interpreted"):
                call()


@pytest.mark.parametrize("twin", [True, False])
def test_edu_moves_bytes_from_memory_that_is_not_shared(twin: bool) -> None:
    with opened(EduModel(), twin=twin) as device:
        edu = Edu(device)
        own = bytearray(os.urandom(2 * 4096))
        memory = device.dma.map(own, limit_bits=ADDRESS_BITS)
        expected = bytes(own[:BUFFER_SIZE])
        edu.dma(memory.iova, 0, BUFFER_SIZE, to_memory=False)
        edu.dma(memory.iova + 4096, 0, BUFFER_SIZE, to_memory=True)
        assert bytes(own[4096 : 4096 + BUFFER_SIZE]) == expected


def test_edu_answers_odd_widths_as_qemu_s_does() -> None:
    with opened(EduModel()) as device:
        region = device.region(0)
        assert (region.read8(0), region.read16(0), region.read64(0)) == (0, 0, (1 << 64) - 1)
        region.write64(0x80, 0x1122334455667788)
        assert region.read32(0x84) == 0x11223344


def test_edu_s_transfer_ends_without_its_memory_and_says_so() -> None:
    model = EduModel()
    with opened(model) as device:
        edu = Edu(device)
        with device.dma.alloc(4096, limit_bits=ADDRESS_BITS) as memory:
            iova = memory.iova
        edu.dma(iova, 0, 64, to_memory=True)
        assert model.faulted is not None and "fault at" in str(model.faulted)
        assert edu.factorial(5) == 120


def test_edu_uses_the_pin_where_nobody_takes_messages() -> None:
    with opened(EduModel()) as device:
        pin = device.irqs.intx()
        region = device.region(0)
        region.write32(0x60, 4)
        assert pin.wait(5) == 1
        region.write32(0x64, 4)
        pin.unmask()
        assert pin.wait(0) == 0


def test_a_test_device_counts_the_right_writes_only() -> None:
    with opened(PciTestdevModel()) as device:
        testdev = PciTestdev(device)
        header = testdev.start(testdev.memory, 0)
        testdev.memory.write8(header.offset + 1, header.data)
        for _ in range(300):
            testdev.memory.write8(header.offset, header.data)
        assert testdev.header(testdev.memory).count == 300
        assert testdev.start(testdev.memory, 7).name == ""


def test_nvme_blocks_come_back_through_every_size_of_list() -> None:
    model = NvmeModel(blocks=1 << 15)
    source = random.Random(5)
    with opened(model) as device:
        controller = Controller(device)
        disk = controller.namespace(1)
        queue = controller.create_queue()
        for blocks in (1, 8, 9, 16, 17, 64, 255, 1024, 4096):
            lba = source.randrange(disk.blocks - blocks)
            data = source.randbytes(blocks * 512)
            queue.write(disk, lba, data)
            assert bytes(model.disk[lba * 512 : (lba + blocks) * 512]) == data
            assert bytes(queue.read(disk, lba, blocks)) == data


def test_nvme_interrupts_and_many_queues() -> None:
    model = NvmeModel()
    with opened(model) as device:
        controller = Controller(device)
        disk = controller.namespace(1)
        controller.enable_interrupts(5)
        queues = [controller.create_queue(16, vector=n) for n in range(1, 5)]
        for number, queue in enumerate(queues):
            queue.write(disk, number, bytes([number]) * 512)
        assert [bytes(queue.read(disk, n, 1))[0] for n, queue in enumerate(queues)] == [0, 1, 2, 3]
        assert all(model.signals.fired[2, n] >= 2 for n in range(1, 5))


def test_nvme_that_goes_away_ends_every_wait() -> None:
    model = NvmeModel()
    with serving(model) as server:
        device = Device.open(server.name)
        controller = Controller(device)
        disk, queue = controller.namespace(1), controller.create_queue()
        model.faults.gone = True
        begun = time.monotonic()
        with pytest.raises(KernelError, match="gone"):
            queue.read(disk, 0, 1)
        assert time.monotonic() - begun < 10
        device.close()


def test_nvme_comes_back_from_a_reset_of_the_function() -> None:
    model = NvmeModel()
    with opened(model) as device:
        controller = Controller(device)
        disk, queue = controller.namespace(1), controller.create_queue()
        queue.write(disk, 3, b"k" * 512)
        device.reset()
        controller.reset()
        assert bytes(queue.read(disk, 3, 1)) == b"k" * 512


def test_a_doorbell_out_of_range_is_fatal_to_the_controller() -> None:
    model = NvmeModel()
    with opened(model) as device:
        controller = Controller(device)
        controller.bar.write32(0x1000, 5000)
        wait_for(lambda: model.fatal)
        with pytest.raises(KernelError, match="fatal"):
            controller.admin(bytes(64), timeout_s=0.5)


def test_a_disk_s_memory_that_is_taken_away_fails_the_command() -> None:
    model = NvmeModel()
    with opened(model) as device:
        controller = Controller(device)
        disk, queue = controller.namespace(1), controller.create_queue()
        memory = device.dma.alloc(4096)
        device.space.unmap(memory.iova, 4096)
        queue.send(2, disk, 0, 1, memory, 0, tag=1)
        (done,) = queue.poll(1, 5)
        assert done.status == 4
        memory._mapped = False


def test_more_blocks_than_there_are_is_refused() -> None:
    with opened(NvmeModel(blocks=16)) as device:
        controller = Controller(device)
        disk, queue = controller.namespace(1), controller.create_queue()
        with pytest.raises(UsageError):
            queue.read(disk, 15, 2)


def test_an_msi_x_table_and_its_pending_bits_lie_within_their_bar() -> None:
    class Tight(Model):
        bars = (BarSpec(0, 0x2000),)
        msix, msix_offset = 8, 0x1000

    class Tighter(Tight):
        msix = 256

    card = Tight()
    place = card.config.capabilities[0x11]
    # QEMU refuses a card whose pending bits are outside.
    assert int.from_bytes(card.config.data[place + 8 : place + 12], "little") == 0x1080
    card.close()
    with pytest.raises(UsageError, match="no room for 256 MSI-X vectors"):
        Tighter()
