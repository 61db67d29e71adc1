"""Waiting for interrupts, threads and tasks, without a device: every wait ends."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vfiotool.errors import UsageError
from vfiotool.native.library import Handle
from vfiotool.vfio import Interrupt


class OwnedInterrupt(Interrupt):
    """One whose device is a file that knows no VFIO."""

    def __init__(self) -> None:
        device = SimpleNamespace(name="memory", handle=Handle(os.open("/dev/null", os.O_RDWR)))
        owners = SimpleNamespace(device=device)
        self.set: Any = SimpleNamespace(
            owner=owners, info=SimpleNamespace(index=1, flags=()), name="msi", closed=False
        )
        super().__init__(self.set, 0)

    def fire(self, times: int = 1) -> None:
        os.write(self.descriptor, times.to_bytes(8, "little"))

    def end(self) -> None:
        self.set.closed = True
        self._close()


@pytest.fixture
def interrupt() -> Iterator[OwnedInterrupt]:
    made = OwnedInterrupt()
    yield made
    made.end()


def start_waiting(
    interrupt: Interrupt, count: int, timeout_s: float | None = 20.0
) -> tuple[list[threading.Thread], list[object]]:
    """Threads that wait, blocked in the kernel when this returns; and what they got."""
    got: list[object] = []

    def wait() -> None:
        try:
            got.append(interrupt.wait(timeout_s))
        except UsageError as error:
            got.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    for thread in threads:
        while time.monotonic() < deadline:
            with open(f"/proc/self/task/{thread.native_id}/wchan") as wchan:
                if "poll" in wchan.read():
                    break
    return threads, got


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()


@pytest.mark.parametrize("count", [2, 8])
def test_one_firing_wakes_every_thread_and_each_is_told_of_it(
    interrupt: OwnedInterrupt, count: int
) -> None:
    for _ in range(5):
        threads, got = start_waiting(interrupt, count)
        interrupt.fire(3)
        joined(threads)
        assert got == [3] * count
        assert interrupt.wait(0.0) == 0


def test_whoever_takes_it_without_waiting_wakes_the_others(interrupt: OwnedInterrupt) -> None:
    threads, got = start_waiting(interrupt, 3)
    interrupt.fire()
    taken = interrupt.wait(0.0)
    joined(threads)
    assert got == [1] * 3 and taken in (0, 1)


def test_closing_wakes_every_thread(interrupt: OwnedInterrupt) -> None:
    number = interrupt.descriptor
    threads, got = start_waiting(interrupt, 6, None)
    interrupt.end()
    joined(threads)
    assert got == ["msi 0 of memory: is off"] * 6
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_several_tasks_and_a_thread_are_all_woken(interrupt: OwnedInterrupt) -> None:
    threads, got = start_waiting(interrupt, 1)

    async def main() -> list[int]:
        tasks = [asyncio.create_task(interrupt.wait_async(None)) for _ in range(5)]
        await asyncio.sleep(0)
        interrupt.fire(2)
        return await asyncio.wait_for(asyncio.gather(*tasks), 10)

    assert asyncio.run(main()) == [2] * 5
    joined(threads)
    assert got == [2]


def test_what_a_thread_took_wakes_the_tasks(interrupt: OwnedInterrupt) -> None:
    async def main() -> int:
        task = asyncio.create_task(interrupt.wait_async(None))
        await asyncio.sleep(0)
        interrupt.fire()
        assert interrupt.wait(5.0) == 1
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(main()) == 1


def test_a_task_times_out_alone(interrupt: OwnedInterrupt) -> None:
    async def main() -> None:
        waiting = asyncio.create_task(interrupt.wait_async(float("inf")))
        assert await interrupt.wait_async(0.01) == 0
        assert await interrupt.wait_async(-5) == 0
        interrupt.fire()
        assert await asyncio.wait_for(waiting, 10) == 1
        with pytest.raises(UsageError, match="NaN"):
            await interrupt.wait_async(float("nan"))

    asyncio.run(main())


@pytest.mark.parametrize("from_thread", [False, True])
def test_closing_ends_tasks_and_iteration_and_gives_the_number_back_last(
    interrupt: OwnedInterrupt, from_thread: bool
) -> None:
    number = interrupt.descriptor

    async def iterate() -> list[int]:
        return [count async for count in interrupt]

    async def main() -> None:
        iteration = asyncio.create_task(iterate())
        tasks = [asyncio.create_task(interrupt.wait_async(None)) for _ in range(3)]
        await asyncio.sleep(0)
        interrupt.fire()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        tasks = [asyncio.create_task(interrupt.wait_async(None)) for _ in range(3)]
        cancelled = asyncio.create_task(interrupt.wait_async(None))
        for _ in range(3):
            await asyncio.sleep(0)
        cancelled.cancel()
        if from_thread:
            await asyncio.to_thread(interrupt.end)
        else:
            interrupt.end()
        done = await asyncio.wait_for(
            asyncio.gather(iteration, *tasks, cancelled, return_exceptions=True), 10
        )
        assert done[0] == [1]
        assert all(isinstance(one, UsageError) for one in done[1:4])
        assert isinstance(done[4], asyncio.CancelledError | UsageError)

    asyncio.run(main(), debug=True)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_a_loop_that_has_gone_leaves_the_interrupt_to_the_next(interrupt: OwnedInterrupt) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(interrupt.wait_async(None))
    loop.run_until_complete(asyncio.sleep(0))

    async def other() -> int:
        with pytest.raises(UsageError, match="another event loop"):
            await interrupt.wait_async(0.0)
        return 0

    asyncio.run(other())
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()

    async def again() -> int:
        interrupt.fire()
        return await interrupt.wait_async(5)

    assert asyncio.run(again()) == 1
