"""The NVMe driver against a controller in plain memory: bring-up, data, failures, the end."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.kernel import FakeClock
from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import bench as nvme_bench
from vfiotool.drivers.nvme import controller as nvme
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.aio import AsyncQueue
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.drivers.nvme.identify import ControllerIdentity, Namespace, SecondaryController
from vfiotool.drivers.nvme.load import LoadReport, merge
from vfiotool.errors import KernelError, Unsupported, UsageError


@pytest.fixture
def fake() -> Iterator[Any]:
    with FakeNvme() as device:
        yield device


def test_bring_up_follows_the_specification(fake: Any) -> None:
    fake.registers[0x14] = 0x460001  # enabled by somebody before
    controller = Controller(fake)
    # Disabled first; then enabled with 64-byte commands, 16-byte completions and 4 KiB pages.
    assert fake.configurations == [0x460000, 0x460001]
    assert fake.registers[0x24] == 31 << 16 | 31
    assert fake.bus_master == [True]
    assert controller.max_transfer == 32 * 4096
    assert controller.queue_limit == 8
    assert controller.namespaces() == [1]
    assert controller.namespace(1) == Namespace(1, 4096, 512)


def test_names_that_a_device_sends_are_made_harmless(fake: Any) -> None:
    fake.serial = b"\0\n\xff evil".ljust(20)
    identity = Controller(fake).identity
    assert identity.model == "Fake ?[31m"
    assert identity.serial == "??? evil"


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 255, 256, 257, 3000])
def test_data_goes_there_and_back(fake: Any, count: int) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue()
    data = os.urandom(count * 512)
    queue.write(disk, 100, data)
    queue.flush(disk)
    assert fake.disk[: 100 * 512] == bytes(100 * 512)
    assert fake.disk[100 * 512 :][: len(data)] == data
    assert queue.read(disk, 100, count) == data


@pytest.mark.parametrize("offset", [0, 4, 2048, 4092])
def test_data_may_begin_within_a_page(fake: Any, offset: int) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue()
    fake.disk[:131072] = pattern = os.urandom(131072)
    memory = fake.alloc(131072 + 4096)
    for blocks in (1, 7, 8, 9, 16, 256):
        memory.view[:] = b"\xa5" * memory.size
        assert queue.send(nvme_spec.READ, disk, 0, blocks, memory, offset)
        assert [done.status for done in queue.poll(1)] == [0]
        got, end = bytes(memory.view), offset + 512 * blocks
        assert got[offset:end] == pattern[: 512 * blocks]
        assert set(got[:offset] + got[end:]) == {0xA5}


def test_a_controller_that_does_not_come_up_is_named(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfiotool.drivers.nvme.health.time", FakeClock())
    fake.ready = False
    with pytest.raises(KernelError, match="not ready within 1 s") as caught:
        Controller(fake)
    assert caught.value.errno_name == "ETIMEDOUT"
    fake.ready, fake.fatal = True, True
    with pytest.raises(KernelError, match="fatal"):
        Controller(fake)
    fake.gone = True
    with pytest.raises(KernelError, match="has gone"):
        Controller(fake)


def test_other_devices_and_metadata_are_refused(fake: Any) -> None:
    fake.metadata = 8
    controller = Controller(fake)
    disk = controller.namespace(1)
    assert disk.metadata_bytes == 8
    with pytest.raises(Unsupported, match="8 bytes of metadata"):
        controller.create_queue().read(disk, 0, 1)
    controller.close()
    fake.class_code = 0x020000
    with pytest.raises(Unsupported, match="not an NVMe controller"):
        Controller(fake)


def test_failures_carry_the_controllers_words(fake: Any) -> None:
    controller = Controller(fake)
    with pytest.raises(KernelError, match="invalid namespace or format"):
        controller.namespace(7)
    disk, queue = controller.namespace(1), controller.create_queue()
    fake.fail[1, nvme_spec.READ] = 0x4281
    with pytest.raises(KernelError, match=r"unrecovered read error .*do not retry"):
        queue.read(disk, 0, 2000)
    # The other chunks came back before the error was raised, and the queue is as new.
    assert queue.pair.in_flight == 0
    assert len(queue.read(disk, 0, 2000)) == 2000 * 512


def test_a_queue_that_is_half_made_is_unmade(fake: Any) -> None:
    controller = Controller(fake)
    fake.fail[0, nvme_spec.CREATE_SQ] = 0x102
    with pytest.raises(KernelError, match="invalid queue size"):
        controller.create_queue()
    assert fake.admin_seen[-3:] == [
        nvme_spec.CREATE_CQ,
        nvme_spec.CREATE_SQ,
        nvme_spec.DELETE_CQ,
    ]
    assert controller.create_queue().number == 1
    with pytest.raises(UsageError, match="8 queue pairs"):
        for _ in range(8):
            controller.create_queue()


def test_silence_is_an_error_with_a_way_out(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue()
    fake.mute = True
    with pytest.raises(KernelError, match=r"did not end in 0\.1 s") as caught:
        controller.admin(nvme_spec.command(nvme_spec.IDENTIFY), timeout_s=0.1)
    assert caught.value.errno_name == "ETIMEDOUT" and caught.value.hint
    memory = fake.alloc(4096)
    queue.send(nvme_spec.READ, disk, 0, 1, memory, tag=77)
    assert queue.poll(1, 0.05) == []
    fake.mute = False
    assert [done.tag for done in queue.poll(1, 5)] == [77]


def test_answers_that_nobody_asked_for_end_no_command_and_are_told(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is in flight at the end is given this long: the fake never answers it.
    monkeypatch.setattr("vfiotool.drivers.nvme.controller._DRAIN_S", 0.1)
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue()
    fake.mad = True
    queue.send(nvme_spec.READ, disk, 0, 1, fake.alloc(4096))
    assert queue.poll(1, 0.1) == []
    counters = queue.pair.counters()
    assert (counters.strays, counters.last_stray, counters.in_flight) == (1, 9999, 1)
    with pytest.raises(KernelError, match="1 completions came that were no command's"):
        queue.flush(disk, timeout_s=0.1)
    fake.mad = False
    controller.close()


def test_the_end_is_orderly_and_leaves_no_memory(fake: Any) -> None:
    controller = Controller(fake)
    disk = controller.namespace(1)
    queues = [controller.create_queue() for _ in range(3)]
    for queue in queues:
        queue.read(disk, 0, 5)
    memory = fake.alloc(4096)
    queues[0].send(nvme_spec.READ, disk, 0, 1, memory)
    fake.configurations.clear()
    controller.close()
    controller.close()
    deletes = [nvme_spec.DELETE_SQ, nvme_spec.DELETE_CQ]
    assert fake.admin_seen[-6:] == deletes * 3
    # Shutdown notification while enabled, then disabled.
    assert [(value >> 14 & 3, value & 1) for value in fake.configurations] == [(1, 1), (1, 0)]
    assert list(fake.buffers) == [memory.iova]
    with pytest.raises(UsageError, match="closed"):
        queues[0].read(disk, 0, 1)
    with pytest.raises(UsageError, match="closed"):
        controller.identify(1)


def test_the_end_comes_even_where_the_controller_is_mute(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme, "_DELETE_S", 0.1)
    controller = Controller(fake)
    controller.create_queue()
    fake.mute = True
    controller.close()
    assert fake.registers[0x14] & 1 == 0 and fake.buffers == {}


def test_coroutines_wait_for_room(fake: Any) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue(4)
    fake.disk[: 64 * 512] = data = os.urandom(64 * 512)
    memory = fake.alloc(64 * 512)

    async def main() -> None:
        async with AsyncQueue(queue) as shared:
            reads = [shared.read(disk, n, 1, memory, 512 * n) for n in range(64)]
            await asyncio.gather(*reads)
            assert bytes(memory.view[: 64 * 512]) == data
            cancelled = asyncio.ensure_future(shared.read(disk, 0, 1, memory))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    asyncio.run(main())
    assert queue.pair.in_flight == 0


def test_a_load_counts_what_it_did(fake: Any) -> None:
    controller = Controller(fake)
    disk = controller.namespace(1)
    job = nvme_bench.Job(pattern="randrw", size_bytes=1024, depth=4, batch=2, queues=2, limit=200)
    report = nvme_bench.run(controller, disk, job)
    told = nvme_bench.as_json(report, job)
    assert report.ios == 400 and 100 < report.reads < 300
    assert told["read"]["ios"] + told["write"]["ios"] == 400  # type: ignore[index]
    assert controller.queues == {}
    fake.fail[1, nvme_spec.READ] = 0x281
    with pytest.raises(KernelError, match="unrecovered read error"):
        nvme_bench.run(controller, disk, nvme_bench.Job(size_bytes=512, limit=10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"pattern": "trim"},
        {"size_bytes": 700},
        {"size_bytes": 1 << 20},
        {"depth": 4, "batch": 5},
        {"runtime_s": 0.0},
        {"span_bytes": 1 << 40},
        {"pattern": "rw", "read_percent": 101},
    ],
)
def test_jobs_that_cannot_be_are_refused(fake: Any, wrong: dict[str, Any]) -> None:
    controller = Controller(fake)
    with pytest.raises(UsageError):
        nvme_bench.run(controller, controller.namespace(1), nvme_bench.Job(**wrong))
    assert controller.queues == {}


def report(latencies: dict[int, int], elapsed_s: float = 1.0) -> LoadReport:
    histogram = [0] * 1920
    for bucket, count in latencies.items():
        histogram[bucket] = count
    ios = sum(latencies.values())
    return LoadReport(ios, 0, 0, 0, elapsed_s, 1, 99, 50 * ios, ios, 0, histogram)


def test_percentiles_and_merging() -> None:
    one, other = report({10: 90, 20: 9, 30: 1}), report({40: 100}, 2.0)
    assert [one.percentile_ns(p) for p in (50, 90, 95, 99, 99.5, 100)] == [10, 10, 20, 20, 30, 30]
    both = merge([one, other])
    assert (both.ios, both.elapsed_s, both.percentile_ns(50), both.percentile_ns(51)) == (
        200,
        2.0,
        30,
        40,
    )


def test_data_that_lies_in_pieces_is_refused_in_words(fake: Any) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue()
    with pytest.raises(UsageError, match="not lie in one piece"):
        queue.write(disk, 0, memoryview(bytes(2048))[::2])
    queue.write(disk, 0, memoryview(bytes(range(256)) * 4).cast("B", (2, 512)))
    assert queue.read(disk, 0, 2) == bytes(range(256)) * 4


def test_structures_survive_any_bytes() -> None:
    for seed in range(50):
        raw = os.urandom(4096) if seed else b"\xff" * 4096
        ControllerIdentity.parse(raw)
        assert len(SecondaryController.parse_list(raw)) <= 127
        try:
            disk = Namespace.parse(1, raw)
        except (KernelError, Unsupported):
            continue
        assert 512 <= disk.block_bytes <= 65536


def test_a_secondary_controller_list_is_read() -> None:
    raw = bytearray(4096)
    raw[0] = 2
    raw[32:48] = struct.pack("<HHB3xHHH", 1, 0, 1, 1, 2, 1)
    raw[64:80] = struct.pack("<HHB3xHHH", 2, 0, 0, 2, 0, 0)
    assert SecondaryController.parse_list(bytes(raw)) == [
        SecondaryController(1, True, 1, 2, 1),
        SecondaryController(2, False, 2, 0, 0),
    ]
