"""Every wait ends: time-outs and what they name, asyncio, closing, a dead controller's end."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import AsyncQueue, Controller, IoQueue, Namespace, SharedQueue, health
from vfiotool.drivers.nvme import bench as nvme_bench
from vfiotool.drivers.nvme import controller as module
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import KernelError, UsageError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(health, "_LOOK_S", 0.02)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # What is in flight at the end is given this long; these controllers never answer it.
    monkeypatch.setattr("vfiotool.drivers.nvme.controller._DRAIN_S", 0.1)
    with FakeNvme() as device:
        yield device


@pytest.fixture
def controller(fake: Any) -> Controller:
    return Controller(fake)


@pytest.fixture
def disk(controller: Controller) -> Namespace:
    return controller.namespace(1)


@pytest.fixture
def queue(controller: Controller) -> IoQueue:
    return controller.create_queue(16)


def took(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def dies_fatal(fake: Any) -> None:
    fake.mute = fake.fatal = True


def dies_gone(fake: Any) -> None:
    fake.mute = fake.gone = True


def dies_reset(fake: Any) -> None:
    fake.reset()


DEATHS = [
    (dies_fatal, r"fatal status \(CSTS.CFS=1\)"),
    (dies_gone, "gone: its registers read all ones"),
    (dies_reset, r"disabled by a reset \(CC.EN=0\)"),
]


@pytest.mark.parametrize(("die", "said"), DEATHS)
def test_a_dead_controller_is_named_and_asked_nothing_more(
    fake: Any,
    controller: Controller,
    disk: Namespace,
    queue: IoQueue,
    die: Callable[[Any], None],
    said: str,
) -> None:
    memory = fake.alloc(4096)
    die(fake)
    with pytest.raises(KernelError, match=said) as caught:
        controller.identify(1)
    assert caught.value.hint is not None and "reset()" in caught.value.hint
    sent = queue.pair.counters().submitted
    for call in (
        lambda: controller.identify(1),
        lambda: queue.read(disk, 0, 1),
        lambda: queue.flush(disk),
        lambda: queue.send(nvme_spec.READ, disk, 0, 1, memory),
        lambda: controller.create_queue(),
    ):
        with pytest.raises(KernelError, match=said):
            assert took(call) < 1
    assert queue.pair.counters().submitted == sent
    assert took(controller.close) < 3


@pytest.mark.parametrize(("die", "said"), DEATHS)
def test_who_waits_is_told_at_once_and_not_at_the_end_of_its_time(
    fake: Any, disk: Namespace, queue: IoQueue, die: Callable[[Any], None], said: str
) -> None:
    fake.hold = True
    threading.Timer(0.1, die, (fake,)).start()
    begun = time.monotonic()
    with pytest.raises(KernelError, match=said):
        queue.read(disk, 0, 8)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("timeout_s", [math.inf, None, 1e30])
def test_no_limit_is_a_time_out(
    fake: Any, disk: Namespace, queue: IoQueue, timeout_s: float | None
) -> None:
    queue.send(nvme_spec.READ, disk, 0, 8, fake.alloc(4096))
    assert len(queue.poll(1, timeout_s)) == 1
    assert len(queue.read(disk, 0, 1, timeout_s=timeout_s)) == 512
    queue.flush(disk, timeout_s=timeout_s)


def test_odd_time_outs_are_now_or_refused(fake: Any, disk: Namespace, queue: IoQueue) -> None:
    fake.hold = True
    queue.send(nvme_spec.READ, disk, 0, 8, fake.alloc(4096))
    assert took(lambda: queue.poll(1, -1)) < 1 and queue.poll(1, -math.inf) == []
    for wrong in (math.nan, "1", True):
        with pytest.raises(UsageError, match="not a number of seconds"):
            queue.poll(1, wrong)  # type: ignore[arg-type]
    fake.release()


@pytest.mark.parametrize("interrupts", [False, True])
def test_leaving_a_dead_async_queue_ends_with_an_error(
    fake: Any, controller: Controller, disk: Namespace, interrupts: bool
) -> None:
    controller.enable_interrupts(2)
    queue = controller.create_queue(16, vector=1 if interrupts else None)
    memory = fake.alloc(4096)

    async def main() -> None:
        async with AsyncQueue(queue, timeout_s=0.3) as shared:
            assert (await shared.read(disk, 0, 1, memory)).status == 0
            fake.hold = True
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(shared.read(disk, 0, 1, memory), 0.05)

    begun = time.monotonic()
    with pytest.raises(KernelError, match=r"1 commands did not end in 0\.3 s"):
        asyncio.run(main())
    assert time.monotonic() - begun < 5
    # It was cancelled, and still has its buffer.
    with pytest.raises(UsageError, match="in use"):
        memory.close()
    fake.release()
    queue.drain()
    memory.close()


@pytest.mark.parametrize(("die", "said"), DEATHS)
@pytest.mark.parametrize("interrupts", [False, True])
def test_coroutines_are_told_of_a_controller_that_died(
    fake: Any,
    controller: Controller,
    disk: Namespace,
    interrupts: bool,
    die: Callable[[Any], None],
    said: str,
) -> None:
    controller.enable_interrupts(2)
    queue = controller.create_queue(4, vector=1 if interrupts else None)
    memory = fake.alloc(4096)

    async def main() -> list[BaseException | Any]:
        async with AsyncQueue(queue) as shared:
            fake.hold = True
            # More than the queue holds: those that wait for room are told as well.
            reads = [asyncio.create_task(shared.read(disk, 0, 1, memory)) for _ in range(20)]
            await asyncio.sleep(0.05)
            die(fake)
            return await asyncio.gather(*reads, return_exceptions=True)

    begun = time.monotonic()
    with pytest.raises(KernelError, match=said):
        asyncio.run(main())
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("interrupts", [False, True])
@pytest.mark.parametrize("what", ["queue", "controller"])
def test_closing_wakes_all_coroutines_with_an_error(
    fake: Any, controller: Controller, disk: Namespace, interrupts: bool, what: str
) -> None:
    controller.enable_interrupts(2)
    queue = controller.create_queue(4, vector=1 if interrupts else None)
    memory = fake.alloc(4096)
    told: list[Any] = []

    async def main() -> None:
        async with AsyncQueue(queue) as shared:
            fake.hold = True
            reads = [asyncio.create_task(shared.read(disk, 0, 1, memory)) for _ in range(10)]
            await asyncio.sleep(0.05)
            ends: dict[str, Callable[[], object]] = {
                "queue": queue.close,
                "controller": controller.close,
            }
            await asyncio.to_thread(ends[what])
            told.extend(await asyncio.gather(*reads, return_exceptions=True))

    asyncio.run(asyncio.wait_for(main(), 20))
    assert len(told) == 10 and {type(one) for one in told} == {UsageError}


def test_a_cancellation_that_comes_with_the_completion_is_not_lost(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    # asyncio.wait_for of Python 3.11 returned the result, and the task went on uncancelled.
    memory = fake.alloc(4096)

    async def main() -> None:
        async with AsyncQueue(queue) as shared:
            fake.hold = True
            task = asyncio.create_task(shared.read(disk, 0, 1, memory))
            await asyncio.sleep(0)
            fake.wait(lambda: fake.held)
            fake.release()
            shared._reap()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    memory.close()


def test_a_coroutine_has_a_time_out_of_its_own(fake: Any, disk: Namespace, queue: IoQueue) -> None:
    memory = fake.alloc(4096)

    async def main() -> None:
        async with AsyncQueue(queue) as shared:
            fake.hold = True
            with pytest.raises(KernelError, match=r"did not end in 0\.05 s"):
                await shared.read(disk, 0, 1, memory, timeout_s=0.05)
            fake.release()

    asyncio.run(main())


@pytest.mark.parametrize("interrupts", [False, True])
def test_closing_wakes_threads_with_an_error(
    fake: Any, controller: Controller, disk: Namespace, interrupts: bool
) -> None:
    controller.enable_interrupts(3)
    queues = [controller.create_queue(16, vector=n if interrupts else None) for n in (1, 2)]
    shared = SharedQueue(queues[1])
    fake.hold = True
    told: list[type] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except (UsageError, KernelError) as error:
            told.append(type(error))

    memory = fake.alloc(4096)
    calls = [lambda: queues[0].read(disk, 0, 8)]
    calls += [lambda: shared.read(disk, 0, 1, memory)] * 4  # type: ignore[list-item]
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    fake.wait(lambda: len(fake.held) == 5)
    # The time for what is in flight (a tenth of a second here), and no luck after that.
    assert took(controller.close) < 2
    for thread in threads:
        thread.join(10)
    assert len(told) == 5 and set(told) == {UsageError}


def test_the_end_of_a_mute_controller_with_many_queues_is_bounded(
    fake: Any, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the defaults, a tenth of their time; together they stay below 15 s.
    steps = ("_DRAIN_S", "_DELETE_S", "_SHUTDOWN_S", "_DISABLE_S")
    assert sum(getattr(module, step) for step in steps) <= 14
    for step in steps:
        monkeypatch.setattr(module, step, getattr(module, step) / 10)
    queues = [controller.create_queue(4) for _ in range(8)]
    disk = controller.namespace(1)
    memory = fake.alloc(4096)
    fake.mute, fake.shutdown_s = True, 1e9
    for queue in queues:
        queue.send(nvme_spec.READ, disk, 0, 1, memory)
    begun = time.monotonic()
    with pytest.raises(KernelError, match="did not finish its shutdown"):
        controller.close()
    assert time.monotonic() - begun < 1.5
    assert set(fake.buffers) == {memory.iova}
    memory.close()


@pytest.mark.parametrize(("rtd3e_us", "needed_s"), [(0, 0.3), (600_000, 0.6)])
def test_the_shutdown_is_waited_for_as_the_disk_asks(
    fake: Any, monkeypatch: pytest.MonkeyPatch, rtd3e_us: int, needed_s: float
) -> None:
    monkeypatch.setattr(module, "_SHUTDOWN_S", 0.4)
    fake.rtd3e_us, fake.shutdown_s = rtd3e_us, needed_s - 0.05
    controller = Controller(fake)
    fake.configurations.clear()
    controller.close()
    assert [(value >> 14 & 3, value & 1) for value in fake.configurations] == [(1, 1), (1, 0)]
    assert module._SHUTDOWN_LIMIT_S == 60


def test_a_disk_that_was_not_ready_for_the_end_is_told(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHUTDOWN_S", 0.1)
    controller = Controller(fake)
    fake.shutdown_s = 1e9
    with pytest.raises(KernelError, match="write cache held may be lost"):
        controller.close()
    # All the rest was done.
    assert fake.registers[0x14] & 1 == 0 and fake.buffers == {}
    with pytest.raises(RuntimeError, match="mine"), Controller(fake):
        raise RuntimeError("mine")


def test_the_loads_own_error_is_the_one_that_is_told(
    fake: Any, controller: Controller, disk: Namespace
) -> None:
    threading.Timer(0.3, lambda: setattr(fake, "fatal", True)).start()
    threading.Timer(0.3, lambda: setattr(fake, "mute", True)).start()
    begun = time.monotonic()
    with pytest.raises(KernelError, match=r"CSTS\.CFS=1"):
        nvme_bench.run(controller, disk, nvme_bench.Job(runtime_s=60, depth=8, queues=2))
    assert time.monotonic() - begun < 5
    controller.close()
    assert fake.buffers == {}


def test_a_load_that_a_reset_takes_the_doorbells_from_tells_the_reset(
    fake: Any, controller: Controller, disk: Namespace
) -> None:
    def reset_by_somebody() -> None:
        fake.reset()
        fake.block(True)

    threading.Timer(0.2, reset_by_somebody).start()
    job = nvme_bench.Job(runtime_s=60, depth=8, queues=2)
    with pytest.raises(KernelError, match=r"disabled by a reset \(CC\.EN=0\)"):
        nvme_bench.run(controller, disk, job)
    fake.block(False)


def test_the_default_queue_is_no_larger_than_the_controller_takes(fake: Any) -> None:
    fake.entries = 32
    controller = Controller(fake)
    assert controller.create_queue().depth == 31
    with pytest.raises(UsageError, match="2 to 32 entries"):
        controller.create_queue(64)


def test_namespaces_beyond_a_page_are_listed(fake: Any) -> None:
    fake.nsids = list(range(1, 3000, 2))
    assert Controller(fake).namespaces() == fake.nsids


def test_a_namespace_that_is_not_active_is_told_so(fake: Any) -> None:
    controller = Controller(fake)
    fake.blocks = 0
    with pytest.raises(UsageError, match="namespace 1 is not active"):
        controller.namespace(1)


def test_a_second_controller_on_a_device_is_refused(fake: Any) -> None:
    first = Controller(fake)
    with pytest.raises(UsageError, match="has a Controller already"):
        Controller(fake)
    first.close()
    assert Controller(fake).namespaces() == [1]


def test_coroutines_that_wait_for_room_get_it_in_their_order(
    fake: Any, controller: Controller, disk: Namespace
) -> None:
    """Those whose command has just ended send their next one behind all who wait."""
    queue = controller.create_queue(4)
    counts = [0] * 12

    async def again_and_again(shared: AsyncQueue, memory: Any, number: int) -> None:
        while sum(counts) < 600:
            await shared.read(disk, number, 1, memory, 512 * number)
            counts[number] += 1

    async def main() -> None:
        with fake.alloc(12 * 512) as memory:
            async with AsyncQueue(queue) as shared:
                await asyncio.gather(*(again_and_again(shared, memory, n) for n in range(12)))

    asyncio.run(asyncio.wait_for(main(), 60))
    assert min(counts) >= max(counts) - 4, counts
