"""The NVMe driver on QEMU's controllers: commands, errors, interrupts, threads, asyncio, ends."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.nvme_guest import DISKS, to_vfio
from tests.lab.vfio_guest import BACKENDS, open_descriptors
from vfiotool.drivers import demo
from vfiotool.drivers.nvme import bench as nvme_bench
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.aio import AsyncQueue
from vfiotool.drivers.nvme.batch import Batch
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.drivers.nvme.identify import Namespace
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.vfio import Device

MACHINE = "storage"
KERNELS = ("6.1", "6.12", "iommufd")
DISK = DISKS[1]
EDU = "0000:00:01.0"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def controller(backend: str) -> Iterator[Controller]:
    with Device.open(to_vfio(DISK), backend=backend) as device:
        assert device.backend == backend
        yield Controller(device)


@pytest.fixture
def disk(controller: Controller) -> Namespace:
    return controller.namespace(1)


@pytest.fixture
def queue(controller: Controller) -> IoQueue:
    return controller.create_queue()


def test_the_disk_is_what_the_machine_has(controller: Controller, disk: Namespace) -> None:
    assert controller.identity.model == "QEMU NVMe Ctrl"
    assert controller.identity.serial == "lab-nvme-1"
    assert controller.namespaces() == [1]
    assert (disk.block_bytes, disk.size_bytes) == (512, 128 << 20)
    with pytest.raises(KernelError, match="invalid namespace or format"):
        controller.namespace(0xFFFFFFF0)


def test_blocks_come_back_as_written_and_their_neighbours_stay(
    queue: IoQueue, disk: Namespace
) -> None:
    before = queue.read(disk, 90, 300)
    data = os.urandom(100 * 512)
    queue.write(disk, 200, data)
    queue.flush(disk)
    after = queue.read(disk, 90, 300)
    assert after == before[: 110 * 512] + data + before[210 * 512 :]


@pytest.mark.parametrize("offset", [0, 4, 512, 2044, 4092])
def test_every_shape_of_prp_moves_its_bytes_alone(
    controller: Controller, queue: IoQueue, disk: Namespace, offset: int
) -> None:
    limit = controller.max_transfer // 512
    pattern = os.urandom(limit * 512)
    queue.write(disk, 1000, pattern)
    with controller.device.dma.alloc(controller.max_transfer + 8192) as memory:
        for blocks in (1, 7, 8, 9, 15, 16, 17, 100, limit):
            size = blocks * 512
            memory.view[:] = b"\xa5" * memory.size
            assert queue.send(nvme_spec.READ, disk, 1000, blocks, memory, offset)
            assert [one.status for one in queue.poll(1)] == [0]
            got = bytes(memory.view)
            assert got[offset : offset + size] == pattern[:size]
            assert set(got[:offset] + got[offset + size :]) <= {0xA5}


def test_refusals_come_before_the_device_sees_a_command(
    controller: Controller, queue: IoQueue, disk: Namespace
) -> None:
    with controller.device.dma.alloc(4096) as memory:
        for lba, blocks, offset in ((disk.blocks, 1, 0), (0, 9, 0), (0, 8, 512), (0, 1, 2)):
            with pytest.raises(UsageError):
                queue.send(nvme_spec.READ, disk, lba, blocks, memory, offset)
    with pytest.raises(UsageError, match="closed"):
        queue.send(nvme_spec.READ, disk, 0, 1, memory)
    with pytest.raises(UsageError, match="whole blocks"):
        queue.write(disk, 0, b"x" * 513)
    assert queue.pair.counters().submitted == 0


def test_the_controllers_own_refusals_have_names(queue: IoQueue, disk: Namespace) -> None:
    queue.pair.submit(nvme_spec.READ, 1, lba=disk.blocks, blocks=1, iova=0, size_bytes=512, tag=5)
    (done,) = queue.poll(1)
    assert (done.tag, done.status & 0x7FF) == (5, 0x80)
    larger = Namespace(disk.nsid, disk.blocks + 8, disk.block_bytes)
    with pytest.raises(KernelError, match="block address out of range"):
        queue.read(larger, disk.blocks, 8)
    queue.pair.submit_raw(nvme_spec.command(0x7F, 1))
    assert queue.poll(1)[0].status & 0x7FF == 0x01
    # The queue goes on as before.
    assert len(queue.read(disk, 0, 8)) == 4096


def test_a_full_queue_says_so_and_loses_nothing(controller: Controller, disk: Namespace) -> None:
    queue = controller.create_queue(8)
    with controller.device.dma.alloc(4096) as memory:
        sent = [queue.send(nvme_spec.READ, disk, n, 1, memory, tag=n) for n in range(10)]
        assert sent == [True] * 7 + [False] * 3
        assert sorted(one.tag for one in queue.poll(7)) == list(range(7))


def test_interrupts_and_polling_read_the_same(controller: Controller, disk: Namespace) -> None:
    polled = controller.create_queue()
    controller.enable_interrupts(3)
    signalled = controller.create_queue(64, vector=2)
    data = os.urandom(2 << 20)
    signalled.write(disk, 5000, data)
    assert polled.read(disk, 5000, len(data) // 512) == data
    assert signalled.read(disk, 5000, len(data) // 512) == data
    with pytest.raises(UsageError, match="vector 3"):
        controller.create_queue(vector=3)


@pytest.mark.parametrize("shadows", [False, True])
def test_queue_pairs_work_side_by_side_in_threads(backend: str, shadows: bool) -> None:
    with Device.open(to_vfio(DISK), backend=backend) as device:
        controller = Controller(device, shadow_doorbells=shadows)
        disk = controller.namespace(1)
        wrong: list[str] = []

        def work(queue: IoQueue, number: int) -> None:
            source = random.Random(number)
            for _ in range(12):
                data = source.randbytes(source.randrange(1, 700) * 512)
                lba = 20_000 + number * 10_000 + source.randrange(9000)
                queue.write(disk, lba, data)
                if queue.read(disk, lba, len(data) // 512) != data:
                    wrong.append(f"queue {number} at {lba}")

        queues = [controller.create_queue(entries) for entries in (2, 16, 128)]
        threads = [threading.Thread(target=work, args=(q, n)) for n, q in enumerate(queues)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert [queue.pair.counters().failed for queue in queues] == [0, 0, 0]


def test_queues_come_and_go(controller: Controller, disk: Namespace) -> None:
    kept = controller.create_queue()
    buffers = len(controller.device.dma.buffers)
    for entries in (2, 1024, 33):
        queue = controller.create_queue(entries)
        assert len(queue.read(disk, 7, 3)) == 3 * 512
        queue.close()
        queue.close()
        with pytest.raises(UsageError, match="closed"):
            queue.read(disk, 0, 1)
    assert len(controller.device.dma.buffers) == buffers
    assert len(kept.read(disk, 0, 1)) == 512


@pytest.mark.parametrize("interrupts", [False, True])
def test_coroutines_share_a_queue(
    controller: Controller, disk: Namespace, interrupts: bool
) -> None:
    if interrupts:
        controller.enable_interrupts(2)
    queue = controller.create_queue(8, vector=1 if interrupts else None)
    data = os.urandom(64 * 4096)
    queue.write(disk, 3000, data)
    failures: list[str] = []

    async def main() -> None:
        with controller.device.dma.alloc(64 * 4096) as memory:
            async with AsyncQueue(queue) as shared:
                # Far more than the queue holds: the rest wait their turn.
                reads = [shared.read(disk, 3000 + 8 * n, 8, memory, 4096 * n) for n in range(64)]
                await asyncio.gather(*reads, shared.flush(disk))
                assert bytes(memory.view) == data
                memory.view[:4096] = b"\x77" * 4096
                await shared.write(disk, 4000, 8, memory)
                larger = Namespace(1, disk.blocks + 8, 512)
                try:
                    await shared.read(larger, disk.blocks, 8, memory)
                except KernelError as error:
                    failures.append(error.message)
            with pytest.raises(UsageError, match="async with"):
                await shared.flush(disk)

    asyncio.run(main())
    assert queue.read(disk, 4000, 8) == b"\x77" * 4096
    assert len(failures) == 1 and "out of range" in failures[0]


def test_a_batch_reads_what_was_written(
    controller: Controller, queue: IoQueue, disk: Namespace
) -> None:
    data = os.urandom(256 * 512)
    queue.write(disk, 8000, data)
    with controller.device.dma.alloc(32 * 4096) as memory:
        batch = Batch(
            queue.pair, nvme_spec.READ, 1, blocks=1, size_bytes=512, buffer=memory, stride=4096
        )
        order = random.Random(4).sample(range(256), 256)
        seen: dict[int, int] = {}
        for n, lba in enumerate(order[:32]):
            batch.slots[n], batch.lbas[n], seen[n] = n, 8000 + lba, lba
        assert batch.submit(32) == 32
        todo = order[32:]
        checked = 0
        while count := batch.poll(1, 10):
            again = 0
            for slot in list(batch.slots[:count]):
                lba = seen.pop(slot)
                start = 4096 * slot
                assert bytes(memory.view[start : start + 512]) == data[512 * lba : 512 * lba + 512]
                checked += 1
                if todo:
                    seen[slot] = todo.pop()
                    batch.slots[again], batch.lbas[again] = slot, 8000 + seen[slot]
                    again += 1
            assert batch.submit(again) == again
        assert checked == 256
        batch.lbas[0], batch.slots[0] = disk.blocks, 0
        batch.submit(1)
        with pytest.raises(KernelError, match="out of range"):
            batch.poll(1, 10)


@pytest.mark.parametrize("shadows", [False, True])
def test_loads_of_all_patterns_add_up(backend: str, shadows: bool) -> None:
    with Device.open(to_vfio(DISK), backend=backend) as device:
        controller = Controller(device, shadow_doorbells=shadows)
        disk = controller.namespace(1)
        for pattern in nvme_bench.PATTERNS:
            job = nvme_bench.Job(
                pattern=pattern, size_bytes=8192, depth=5, batch=2, queues=2, limit=300
            )
            report = nvme_bench.run(controller, disk, job)
            assert report.ios == 600 and sum(report.histogram) == 600
            reads = nvme_bench.PATTERNS[pattern][1]
            expected = 240 < report.reads < 360 if reads is None else report.reads == 6 * reads
            assert expected
            assert report.latency_min_ns <= report.percentile_ns(50) * 65 / 64
            assert report.percentile_ns(50) <= report.latency_max_ns
        assert controller.queues == {}


def test_closing_in_the_middle_of_a_load_leaves_a_usable_disk(backend: str) -> None:
    to_vfio(DISK)
    for _ in range(3):
        device = Device.open(DISK, backend=backend)
        controller = Controller(device)
        disk = controller.namespace(1)
        queue = controller.create_queue()
        memory = device.dma.alloc(1 << 20)
        for n in range(32):
            queue.send(nvme_spec.WRITE, disk, 50_000 + 64 * n, 64, memory, 0)
        device.close()
        with pytest.raises(UsageError):
            queue.poll()
    with Device.open(DISK, backend=backend) as device:
        assert len(Controller(device).create_queue().read(Namespace(1, 99_999, 512), 0, 9)) == 4608


HOLDER = """
import sys
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.vfio import Device
controller = Controller(Device.open(sys.argv[1], backend=sys.argv[2]))
queue = controller.create_queue()
queue.read(controller.namespace(1), 0, 64)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_a_usable_disk(backend: str) -> None:
    # With nothing in flight at that moment: QEMU 10.0's controller reads freed memory when the
    # kernel resets it (as it must) with commands at work, and takes the guest down.
    to_vfio(DISK)
    for _ in range(2):
        command = [sys.executable, "-c", HOLDER, DISK, backend]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGKILL)
        with Device.open(DISK, backend=backend) as device:
            controller = Controller(device)
            assert len(controller.create_queue().read(controller.namespace(1), 0, 8)) == 4096


def test_many_lives_leave_nothing_behind(backend: str) -> None:
    to_vfio(DISK)

    def live() -> None:
        with Device.open(DISK, backend=backend) as device:
            controller = Controller(device)
            controller.create_queue().read(controller.namespace(1), 0, 8)

    live()
    before = open_descriptors()
    for _ in range(10):
        live()
    assert len(open_descriptors()) == len(before)


def test_memory_decode_off_is_an_error_and_no_crash(
    controller: Controller, queue: IoQueue, disk: Namespace
) -> None:
    controller.device.set_memory_decode(False)
    try:
        with pytest.raises(UsageError, match="decode"):
            queue.read(disk, 0, 1)
    finally:
        controller.device.set_memory_decode(True)
    assert len(queue.read(disk, 0, 1)) == 512


def test_what_is_no_nvme_is_refused(backend: str) -> None:
    with (
        Device.open(to_vfio(EDU), backend=backend) as device,
        pytest.raises(Unsupported, match="not an NVMe controller"),
    ):
        Controller(device)


def test_the_demo_passes(backend: str) -> None:
    with Device.open(to_vfio(DISK), backend=backend) as device:
        checks = list(demo("nvme")(device))
    assert len(checks) == 5
    assert [check for check in checks if not check.passed] == []


def test_the_commands_read_write_and_measure(backend: str, tmp_path: Path) -> None:
    to_vfio(DISK)

    def nvme(*arguments: str, code: int = 0) -> dict[str, object]:
        command = [sys.executable, "-m", "vfiotool", "nvme", *arguments, "--backend", backend]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    told = nvme("identify", DISK)
    assert told["namespaces"] == [
        {
            "nsid": 1,
            "blocks": 262144,
            "block_bytes": 512,
            "metadata_bytes": 0,
            "command_set": "nvm",
            "problem": None,
        }
    ]
    data = os.urandom(777 * 512)
    (tmp_path / "in").write_bytes(data)
    wrote = nvme("write", DISK, "--lba", "123", "--input", str(tmp_path / "in"))
    read = nvme("read", DISK, "--lba", "123", "--blocks", "777", "--output", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == data
    assert wrote["sha256"] == read["sha256"]
    load = ("--bs", "4k", "--iodepth", "4", "--number", "500")
    refused = nvme("bench", DISK, "--rw", "randwrite", *load, code=4)
    assert "overwrite" in str(refused["error"])
    measured = nvme("bench", DISK, "--rw", "randread", *load)
    side = measured["read"]
    assert isinstance(side, dict) and side["ios"] == 500 and side["iops"] > 0
