"""`Controller.reset()`: queues come back; what was in flight fails or is sent again."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import AsyncQueue, Controller, SharedQueue, health
from vfiotool.drivers.nvme import bench as nvme_bench
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.load import Load
from vfiotool.drivers.nvme.queue_pair import QueuePair
from vfiotool.drivers.nvme.status import ABORTED_BY_HOST
from vfiotool.errors import KernelError, UsageError, VfiotoolError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(health, "_LOOK_S", 0.02)


@pytest.fixture
def fake() -> Iterator[Any]:
    with FakeNvme() as device:
        yield device


def dies_fatal(fake: Any) -> None:
    fake.fatal = fake.mute = True


def dies_reset(fake: Any) -> None:
    fake.reset()


@pytest.mark.parametrize("die", [dies_fatal, dies_reset])
def test_a_reset_brings_a_dead_controller_back(fake: Any, die: Callable[[Any], None]) -> None:
    controller = Controller(fake)
    controller.enable_interrupts(3)
    disk = controller.namespace(1)
    polled, signalled = controller.create_queue(16), controller.create_queue(16, vector=2)
    data = os.urandom(300 * 512)
    polled.write(disk, 100, data)
    for _ in range(3):
        die(fake)
        with pytest.raises(KernelError):
            polled.read(disk, 0, 1)
        fake.mute = False
        controller.reset()
        assert polled.read(disk, 100, 300) == data
        assert signalled.read(disk, 100, 300) == data
    assert (polled.number, signalled.number) == (1, 2)
    controller.close()
    assert fake.buffers == {}


@pytest.mark.parametrize("resubmit", [False, True])
def test_what_was_in_flight_fails_or_is_sent_again(fake: Any, resubmit: bool) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    memory = fake.alloc(16 * 512)
    memory.view[:] = data = os.urandom(16 * 512)
    fake.hold = True
    for n in range(15):
        assert queue.send(nvme_spec.WRITE, disk, n, 1, memory, 512 * n, tag=100 + n)
    fake.wait(lambda: len(fake.held) == 15)
    # One ended before; it is not told twice.
    fake.held, rest = fake.held[:1], fake.held[1:]
    fake.release()
    fake.held = rest
    fake.disk[:] = bytes(len(fake.disk))
    fake.hold = False
    controller.reset(resubmit=resubmit)
    done = queue.poll(15)
    assert sorted(one.tag for one in done) == list(range(100, 115))
    wanted = {100: 0, **dict.fromkeys(range(101, 115), 0 if resubmit else ABORTED_BY_HOST)}
    assert {one.tag: one.status for one in done} == wanted
    written = bytes(fake.disk[512 : 15 * 512])
    assert written == (data[512 : 15 * 512] if resubmit else bytes(14 * 512))
    memory.close()
    assert queue.poll(1, 0.05) == []


def test_a_completion_of_before_the_reset_ends_nothing_after_it(fake: Any) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    memory = fake.alloc(4096)
    fake.hold = True
    queue.send(nvme_spec.READ, disk, 0, 1, memory, tag=1)
    fake.wait(lambda: len(fake.held) == 1)
    (old,) = fake.held
    controller.reset()
    assert [one.status for one in queue.poll(1)] == [ABORTED_BY_HOST]
    queue.send(nvme_spec.READ, disk, 0, 1, memory, tag=2)
    fake.wait(lambda: len(fake.held) == 1)
    with fake.lock:
        fake._complete(1, fake.queues[1], old[2], 0, 0)
    assert queue.poll(1, 0.05) == [] and queue.pair.counters().strays == 1
    fake.release()
    assert [one.tag for one in queue.poll(1)] == [2]


def test_threads_that_wait_are_told_of_a_reset_and_go_on_after_it(fake: Any) -> None:
    controller = Controller(fake)
    disk = controller.namespace(1)
    own, shared = controller.create_queue(16), SharedQueue(controller.create_queue(16))
    fake.disk[:] = data = os.urandom(len(fake.disk))
    ended: list[str] = []
    wrong: list[int] = []
    stop = threading.Event()

    def work(number: int) -> None:
        with fake.alloc(4096) as memory:
            while not stop.is_set():
                try:
                    if number:
                        shared.read(disk, 8 * number, 8, memory)
                        got = bytes(memory.view)
                    else:
                        got = own.read(disk, 0, 8)
                    if got != data[number * 4096 : number * 4096 + 4096]:
                        wrong.append(number)
                except KernelError as error:
                    ended.append(error.message)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        controller.reset()
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert wrong == []
    assert [one for one in ended if "reset" not in one] == []
    assert own.read(disk, 0, 8) == data[:4096]


def test_a_reset_gets_its_turn_from_a_thread_that_calls_without_a_pause(fake: Any) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    stop, said = threading.Event(), set()

    def calls() -> None:
        while not stop.is_set():
            try:
                queue.read(disk, 0, 1)
            except KernelError as error:
                said.add(error.message)

    thread = threading.Thread(target=calls)
    thread.start()
    try:
        for _ in range(20):
            controller.reset()
    finally:
        stop.set()
        thread.join(20)
    assert {one for one in said if "reset" not in one} == set()
    assert len(queue.read(disk, 0, 1)) == 512


def test_what_was_read_before_a_reset_ended_is_not_told_after_it(fake: Any) -> None:
    controller = Controller(fake)
    health = controller.health
    configuration = controller.registers.configuration

    def in_a_reset() -> int:
        health.tell(None)  # it ends between this read and what is made of it
        return 0

    register = SimpleNamespace(read=in_a_reset)
    health.registers = SimpleNamespace(  # type: ignore[assignment]
        status=register, configuration=configuration
    )
    assert health.look() is None and health.failure is None
    health.refuse()
    health.registers = controller.registers


def test_coroutines_are_told_of_a_reset_in_their_loop(fake: Any) -> None:
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    memory = fake.alloc(4096)

    async def main() -> None:
        async with AsyncQueue(queue) as shared:
            fake.hold = True
            reads = [asyncio.create_task(shared.read(disk, 0, 1, memory)) for _ in range(5)]
            while len(fake.held) < 5:
                await asyncio.sleep(0.001)
            fake.hold = False
            controller.reset()
            for one in await asyncio.gather(*reads, return_exceptions=True):
                assert isinstance(one, KernelError) and "aborted by the host" in one.message
            assert (await shared.read(disk, 0, 1, memory)).status == 0

    asyncio.run(main())


def test_a_load_ends_when_the_controller_is_reset(fake: Any) -> None:
    controller = Controller(fake)
    disk = controller.namespace(1)
    said: list[str] = []

    def load() -> None:
        try:
            nvme_bench.run(controller, disk, nvme_bench.Job(runtime_s=60, depth=8))
        except (KernelError, UsageError) as error:
            said.append(error.message)

    runner = threading.Thread(target=load)
    runner.start()
    fake.wait(lambda: bool(controller.queues) and controller.queues[1].pair.in_flight > 0)
    controller.reset()
    runner.join(20)
    assert not runner.is_alive() and len(said) == 1
    assert len(controller.create_queue().read(disk, 0, 8)) == 4096


def test_a_load_ends_with_its_first_queue_though_another_began_after_the_reset(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = Controller(fake)
    disk = controller.namespace(1)
    reset, runs = threading.Event(), QueuePair.run
    said: list[str] = []

    def late(pair: QueuePair, *rest: Any) -> Any:
        assert pair.rings.id == 1 or reset.wait(20)
        return runs(pair, *rest)

    def load() -> None:
        with pytest.raises(VfiotoolError) as told:
            nvme_bench.run(controller, disk, nvme_bench.Job(runtime_s=60, depth=8, queues=2))
        said.append(told.value.message)

    monkeypatch.setattr(QueuePair, "run", late)
    runner = threading.Thread(target=load)
    runner.start()
    fake.wait(lambda: 1 in controller.queues and controller.queues[1].pair.in_flight > 0)
    controller.reset()
    reset.set()
    runner.join(20)
    assert not runner.is_alive() and "reset" in said[0]


def test_a_load_that_hears_of_a_reset_when_it_is_over_is_not_told_as_done(fake: Any) -> None:
    controller = Controller(fake)
    pair = controller.create_queue().pair
    resets: list[None] = []

    def watch() -> None:
        if not resets:
            resets.append(controller.reset())

    with controller.memory(4096) as memory, pytest.raises(UsageError, match="closed or reset"):
        load = Load(
            nsid=1,
            first_lba=0,
            span=64,
            blocks=1,
            size_bytes=512,
            iova=memory.iova,
            stride=512,
            depth=8,
            runtime_s=60,
        )
        pair.run(load, watch)
    assert resets


def test_a_reset_that_fails_leaves_the_controller_failed(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = Controller(fake)
    queue = controller.create_queue()
    disk = controller.namespace(1)
    fake.gone = True
    with pytest.raises(KernelError, match="gone"):
        controller.reset()
    with pytest.raises(KernelError, match="its reset failed"):
        queue.read(disk, 0, 1)
    fake.gone = False
    controller.reset()
    assert len(queue.read(disk, 0, 1)) == 512
    controller.close()
    with pytest.raises(UsageError, match="closed"):
        controller.reset()


def test_queues_whose_deletion_failed_are_gone_after_a_reset(fake: Any) -> None:
    controller = Controller(fake)
    disk = controller.namespace(1)
    first, second = controller.create_queue(), controller.create_queue()
    before = len(fake.buffers)
    fake.fail[0, nvme_spec.DELETE_SQ] = 0x0C
    with pytest.raises(KernelError, match="command sequence"):
        first.close()
    # The controller may know it still: neither its memory nor its number is used again.
    assert controller.create_queue().number == 3
    assert len(fake.buffers) == before + 3
    controller.reset()
    assert len(second.read(disk, 0, 1)) == 512
    assert controller.create_queue().number == 1
    controller.close()
    assert fake.buffers == {}


def test_a_new_controller_starts_clean_after_any_death(fake: Any) -> None:
    for die in (dies_fatal, dies_reset):
        controller = Controller(fake)
        disk, queue = controller.namespace(1), controller.create_queue()
        fake.hold = True
        memory = fake.alloc(4096)
        queue.send(nvme_spec.READ, disk, 0, 1, memory)
        die(fake)
        controller.close()
        fake.mute = fake.fatal = fake.hold = False
        memory.close()
        assert fake.buffers == {}
        with Controller(fake) as again:
            assert len(again.create_queue().read(disk, 0, 8)) == 4096
