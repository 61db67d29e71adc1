"""Submission queues in QEMU's Controller Memory Buffer, over each of VFIO's interfaces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.fakes.placed import placed, right_in_threads
from tests.lab.commands import vfiotool
from tests.lab.nvme_guest import bind_nvme, to_vfio
from tests.lab.vfio_guest import BACKENDS
from vfiotool.drivers.nvme import Controller, IoQueue, Namespace, SharedQueue
from vfiotool.drivers.nvme.load import Load
from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.vfio import Device

MACHINE = "memory-buffer"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "each store into the buffer is trapped"
BUFFER, NONE = "0000:01:00.0", "0000:02:00.0"
BYTES = 1 << 20


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def driven(address: str, backend: str) -> Iterator[tuple[Device, Controller]]:
    with (
        Device.open(to_vfio(address), backend=backend) as device,
        Controller(device) as controller,
    ):
        yield device, controller


def moves(queue: IoQueue, disk: Namespace, mark: int) -> None:
    for lba, count in ((0, 1), (3, 700), (disk.blocks - 8, 8)):
        queue.write(disk, lba, placed(disk, lba, count, mark))
        assert queue.read(disk, lba, count) == placed(disk, lba, count, mark)
    queue.flush(disk)


def control(controller: Controller) -> int:
    return controller.registers.memory_control.read()


def test_data_moves_by_commands_in_the_buffer(backend: str) -> None:
    with driven(BUFFER, backend) as (device, controller):
        buffer = controller.memory_buffer
        assert buffer is not None and (buffer.problem, buffer.size_bytes) == (None, BYTES)
        assert buffer.submission_queues and buffer.region == 2 and control(controller) & 3 == 1
        disk = controller.namespace(1)
        inside, outside = controller.create_queue(in_memory_buffer=True), controller.create_queue()
        assert control(controller) & 3 == 3
        # It lies in the BAR, and the commands with it.
        window = inside.pair.rings.window
        assert window is not None
        inside.write(disk, 77, placed(disk, 77, 1, 9))
        assert window.read32(0) & 0xFF == 1 and window.read64(40) == 77
        for mark, queue in enumerate((inside, outside, inside)):
            moves(queue, disk, mark)
        assert outside.read(disk, 3, 700) == placed(disk, 3, 700, 2)
        base = control(controller) & 0xFFFFF000
        base |= controller.registers.memory_control_high.read() << 32
        with pytest.raises(UsageError, match="in use"):
            device.dma.alloc(4096, iova=base)
        assert inside.pair.counters().strays == 0


def test_a_load_and_threads_on_a_queue_in_the_buffer(backend: str) -> None:
    with driven(BUFFER, backend) as (device, controller):
        disk = controller.namespace(1)
        queue = controller.create_queue(64, in_memory_buffer=True)
        with device.dma.alloc(32 * 4096) as data:
            load = Load(
                nsid=1, first_lba=4096, span=4096, blocks=8, iova=data.iova, stride=4096,
                size_bytes=4096, depth=32, limit=3000, read_percent=50,
            )  # fmt: skip
            report = queue.pair.run(load)
        assert report.reads + report.writes == 3000 and not report.failed
        shared = SharedQueue(queue)
        ended = right_in_threads(shared, device, disk, turns=50, limit_s=120)
        assert ended == [True] * 200
        shared.close()


def test_resets_bring_the_buffer_back(backend: str) -> None:
    with driven(BUFFER, backend) as (device, controller):
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        for mark in range(6):
            if mark % 2:
                device.reset()
            controller.reset()
            assert control(controller) & 3 == 3
            moves(queue, disk, mark)


def test_memory_decode_that_is_off_is_an_error_and_no_signal(backend: str) -> None:
    with driven(BUFFER, backend) as (device, controller):
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        for mark in range(10):
            device.set_memory_decode(False)
            with pytest.raises(UsageError):
                queue.write(disk, 0, bytes(512))
            device.set_memory_decode(True)
            if mark % 5 == 0:
                moves(queue, disk, mark)


def test_a_close_under_load_ends_it(backend: str) -> None:
    for turn in range(4):
        told: list[VfiotoolError] = []
        with Device.open(to_vfio(BUFFER), backend=backend) as device:
            controller = Controller(device)
            disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
            under_way = threading.Event()

            def load(
                queue: IoQueue = queue,
                disk: Namespace = disk,
                under_way: threading.Event = under_way,
            ) -> None:
                try:
                    while True:
                        queue.write(disk, 0, placed(disk, 0, 64, 6))
                        under_way.set()
                except VfiotoolError as error:
                    told.append(error)  # noqa: B023

            worker = threading.Thread(target=load)
            worker.start()
            assert under_way.wait(60)
            (device if turn % 2 else controller).close()
            worker.join(60)
            assert not worker.is_alive() and len(told) == 1
    with driven(BUFFER, backend) as (_, controller):
        moves(controller.create_queue(in_memory_buffer=True), controller.namespace(1), 1)


def test_the_kernels_driver_and_ours_take_the_disk_in_turn(backend: str) -> None:
    """The kernel's driver leaves its own address in the registers."""
    for _ in range(2):
        bind_nvme(BUFFER)
        with driven(BUFFER, backend) as (_, controller):
            assert control(controller) & 3 == 1
            moves(controller.create_queue(), controller.namespace(1), 1)
            moves(controller.create_queue(in_memory_buffer=True), controller.namespace(1), 2)
    bind_nvme(BUFFER)


def test_a_controller_without_one_says_so(backend: str) -> None:
    with driven(NONE, backend) as (_, controller):
        assert controller.memory_buffer is None
        with pytest.raises(Unsupported, match="no controller memory buffer"):
            controller.create_queue(in_memory_buffer=True)
        moves(controller.create_queue(), controller.namespace(1), 4)


def test_a_full_buffer_is_told(backend: str) -> None:
    with driven(BUFFER, backend) as (_, controller):
        # 1 MiB holds 8 queues of 2,048 commands.
        made = []
        with pytest.raises(KernelError, match="no room") as caught:
            for _ in range(10):
                made.append(controller.create_queue(2048, in_memory_buffer=True))
        assert caught.value.errno_name == "ENOSPC" and len(made) == 8
        moves(made[-1], controller.namespace(1), 5)


def test_identify_tells_it() -> None:
    ran = vfiotool("nvme", "identify", to_vfio(BUFFER), "--json")
    assert ran.code == 0 and ran.json["memory_buffer"]["size_bytes"] == BYTES
    assert "submission-queues" in ran.json["memory_buffer"]["holds"]
    ran = vfiotool("nvme", "identify", to_vfio(NONE), "--json")
    assert ran.code == 0 and ran.json["memory_buffer"] is None
