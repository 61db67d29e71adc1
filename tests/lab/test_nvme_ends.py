"""The NVMe driver on QEMU's controllers when things go wrong: dead controllers, resets, threads."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.lab.nvme_guest import DISKS, to_vfio
from tests.lab.vfio_guest import BACKENDS
from vfiotool.drivers.nvme import AsyncQueue, Controller, SharedQueue, admin, blocks, tables
from vfiotool.drivers.nvme import bench as nvme_bench
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import KernelError, UsageError, VfiotoolError
from vfiotool.vfio import Device

MACHINE = "storage"
KERNELS = ("6.1", "6.12", "iommufd")
DISK = DISKS[1]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with Device.open(to_vfio(DISK), backend=str(request.param)) as opened:
        yield opened


def test_a_fatal_status_is_named_and_a_reset_brings_it_back(device: Device) -> None:
    controller = Controller(device)
    disk, queue = controller.namespace(1), controller.create_queue()
    data = os.urandom(64 * 512)
    queue.write(disk, 500, data)
    device.set_bus_master(False)  # as after a reset that somebody else did
    begun = time.monotonic()
    with pytest.raises(KernelError, match=r"CSTS\.CFS=1"):
        controller.identify(1)
    for call in (lambda: queue.read(disk, 0, 1), lambda: controller.identify(1)):
        with pytest.raises(KernelError, match=r"CSTS\.CFS=1"):
            call()
    assert time.monotonic() - begun < 5
    controller.reset()
    assert queue.read(disk, 500, 64) == data
    device.set_bus_master(False)
    with pytest.raises(KernelError):
        controller.identify(1)
    controller.close()
    again = Controller(device)
    assert again.create_queue().read(disk, 500, 64) == data


def test_a_reset_by_somebody_else_is_named_and_mended(device: Device) -> None:
    controller = Controller(device)
    controller.enable_interrupts(2)
    disk, queue = controller.namespace(1), controller.create_queue(32, vector=1)
    data = os.urandom(64 * 512)
    queue.write(disk, 700, data)
    device.reset()
    with pytest.raises(KernelError, match=r"reset|CSTS"):
        queue.read(disk, 0, 1)
    controller.reset()
    assert queue.read(disk, 700, 64) == data


def test_leaving_a_dead_async_queue_is_bounded(device: Device) -> None:
    controller = Controller(device)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    memory = device.dma.alloc(4096)

    async def main() -> None:
        async with AsyncQueue(queue, timeout_s=5) as shared:
            assert (await shared.read(disk, 0, 1, memory)).status == 0
            device.set_bus_master(False)
            await asyncio.wait_for(shared.read(disk, 0, 1, memory), 2)

    begun = time.monotonic()
    with pytest.raises((KernelError, TimeoutError)):
        asyncio.run(main())
    assert time.monotonic() - begun < 15


def test_the_end_of_a_dead_controller_with_all_its_queues_is_bounded(device: Device) -> None:
    controller = Controller(device)
    for _ in range(controller.queue_limit):
        controller.create_queue(8)
    with pytest.raises(UsageError, match="queue pairs"):
        controller.create_queue(8)
    device.set_bus_master(False)
    begun = time.monotonic()
    controller.close()
    assert time.monotonic() - begun < 15


def test_two_threads_never_get_each_others_data(device: Device) -> None:
    controller = Controller(device)
    disk, queue, check = controller.namespace(1), *(controller.create_queue() for _ in "ab")
    wrong: list[object] = []
    said: set[str] = set()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(lba: int, number: int) -> None:
        for n in range(60):
            data = bytes([number * 100 + n]) * 4096
            try:
                queue.write(disk, lba, data)
            except UsageError as error:
                said.add(error.message)
                continue
            done.append((lba, data))

    try:
        for _ in range(5):
            done: list[tuple[int, bytes]] = []
            threads = [threading.Thread(target=work, args=one) for one in ((0, 0), (4096, 1))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            last = dict(done)
            wrong += [lba for lba, data in last.items() if check.read(disk, lba, 8) != data]
    finally:
        sys.setswitchinterval(before)
    assert wrong == [] and all("another thread" in one for one in said)


def test_threads_share_a_queue_and_get_their_own_data(device: Device) -> None:
    controller = Controller(device)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    wrong: list[object] = []

    def work(shared: SharedQueue, number: int) -> None:
        with device.dma.alloc(8192) as memory:
            for n in range(60):
                lba = 20_000 + 1000 * number + 16 * n
                data = (b"%08d" % lba) * 1024
                memory.view[:8192] = data
                shared.write(disk, lba, 16, memory)
                memory.view[:8192] = bytes(8192)
                shared.read(disk, lba, 16, memory)
                if bytes(memory.view[:8192]) != data:
                    wrong.append(lba)

    with SharedQueue(queue) as shared:
        threads = [threading.Thread(target=work, args=(shared, n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_load_in_another_thread_survives_resets(device: Device) -> None:
    controller = Controller(device)
    disk = controller.namespace(1)
    said: list[str] = []

    def load() -> None:
        try:
            job = nvme_bench.Job(runtime_s=30, depth=8, queues=2)
            said.append(f"ok {nvme_bench.run(controller, disk, job).ios}")
        except VfiotoolError as error:
            said.append(error.message)

    runner = threading.Thread(target=load)
    runner.start()
    end = time.monotonic() + 20
    while not any(queue.pair.in_flight for queue in list(controller.queues.values())):
        assert runner.is_alive() and time.monotonic() < end, said
        time.sleep(0.01)
    controller.reset()
    runner.join(25)
    assert not runner.is_alive() and "ok" not in said[0]
    assert len(controller.create_queue().read(disk, 0, 8)) == 4096


def test_a_buffer_in_use_and_interrupts_after_the_end(device: Device) -> None:
    controller = Controller(device)
    controller.enable_interrupts(3)
    first = controller.create_queue(32, vector=2)
    with pytest.raises(UsageError, match="vector 2 signals queue 1"):
        controller.create_queue(32, vector=2)
    controller.enable_interrupts(5)
    disk = controller.namespace(1)
    assert len(first.read(disk, 0, 100)) == 51200
    controller.close()
    with device.irqs.msix(1) as vectors:
        vectors[0].trigger()
        assert vectors[0].wait(1) == 1


def test_logs_features_and_blocks_of_a_real_controller(device: Device) -> None:
    controller = Controller(device)
    found = tables.id_ctrl(controller.identity.raw)
    assert (found["vid"], found["sn"]) == (0x1B36, "lab-nvme-1") and found["nn"] >= 1
    health = tables.smart_log(admin.log_page(controller, admin.Log.SMART, 512))
    assert 250 < health["temperature"] < 400
    assert (
        "0x06" in tables.effects_log(admin.log_page(controller, admin.Log.EFFECTS, 4096))["admin"]
    )
    assert admin.get_feature(controller, admin.Feature.NUMBER_OF_QUEUES)[0] & 0xFFFF >= 1
    namespace = tables.id_ns(controller.identify(nvme_spec.CNS_NAMESPACE, 1))
    disk, queue = controller.namespace(1), controller.create_queue()
    assert namespace["nsze"] == disk.blocks
    assert 1 << namespace["lbafs"][namespace["in_use"]]["ds"] == disk.block_bytes
    queue.write(disk, 0, data := os.urandom(32 * 512))
    blocks.compare(queue, disk, 0, data)
    blocks.verify(queue, disk, 0, 32)
    if namespace["mssrl"]:  # 0 where QEMU makes the namespace itself: no range may be copied
        blocks.copy(queue, disk, 100, [(0, 8), (16, 8)])
        assert queue.read(disk, 100, 16) == data[: 8 * 512] + data[16 * 512 : 24 * 512]
    blocks.write_zeroes(queue, disk, 4, 4)
    blocks.trim(queue, disk, [(8, 8)])
    assert queue.read(disk, 4, 4) == bytes(4 * 512)
    with pytest.raises(KernelError, match="compare failure"):
        blocks.compare(queue, disk, 0, data)


def test_an_event_of_before_is_not_anothers_answer(device: Device) -> None:
    controller = Controller(device)
    admin.set_feature(controller, admin.Feature.ASYNC_EVENTS, 0xFF)
    with pytest.raises(KernelError, match="did not end"):
        controller.admin(nvme_spec.command(nvme_spec.ASYNC_EVENT), timeout_s=0.3)
    assert controller.identity.model.encode() in controller.identify(1)
    # A threshold below today's temperature makes the controller send its event.
    admin.set_feature(controller, admin.Feature.TEMPERATURE_THRESHOLD, 200)
    get = nvme_spec.command(nvme_spec.GET_FEATURES, dwords=(7,))
    wanted = controller.admin(get).result
    assert [controller.admin(get).result for _ in range(3)] == [wanted] * 3
    with pytest.raises(KernelError, match="invalid command opcode"):
        controller.admin(nvme_spec.command(0xC1))
    end = time.monotonic() + 5
    while not controller.aside and time.monotonic() < end:
        time.sleep(0.01)
    assert [one.result & 0xFF for one in controller.aside] == [1]
