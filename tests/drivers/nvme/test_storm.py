"""Sixteen threads and a thousand tasks over shared and own queues, while queues are closed, tasks
cancelled, the main thread interrupted and the process forked at random moments: content is
verified, nothing is lost, nothing hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.nvme import FakeNvme
from tests.fakes.strikes import struck
from vfiotool.drivers.nvme import AsyncQueue, Controller, SharedQueue
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import UsageError

BLOCK = 512
# Places of a life: a block of the disk and one of memory, for one user at a time. Where a call was
# given up its command may still be out: such a place is not used again.
PLACES = 16384
SHARING, OWN, ADMIN, LOOPS, TASKS = 8, 4, 2, 2, 500
LIFE_ROUNDS = 4000
HANG_S = 120


def content(lba: int, version: int) -> bytes:
    return struct.pack("<QQ", lba, version) * 32


class Life:
    """A controller from its start to its end, with all who use it."""

    def __init__(self, fake: FakeNvme, source: random.Random, rounds: int) -> None:
        self.fake, self.source, self.wanted = fake, source, rounds
        self.controller = Controller(fake)  # type: ignore[arg-type]
        self.disk = self.controller.namespace(1)
        self.memory = fake.alloc(PLACES * BLOCK)
        self.places = itertools.count()
        self.rounds = itertools.count()
        self.done = 0
        self.over = threading.Event()
        self.problems: list[str] = []
        self.shared = SharedQueue(self.controller.create_queue(16))
        self.own = [self.controller.create_queue(8) for _ in range(OWN)]
        self.mine = self.controller.create_queue(16)
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.tasks: list[list[asyncio.Task[None]]] = []
        self.cancelled = self.interrupted = self.forked = self.closed = 0

    def place(self) -> int:
        return next(self.places)

    def count(self) -> None:
        self.done = next(self.rounds) + 1
        if self.done >= self.wanted or self.place_is_short():
            self.over.set()

    def place_is_short(self) -> bool:
        taken: int = self.places.__reduce__()[1][0]
        return taken > PLACES - 2 * LOOPS * TASKS

    def note(self, problem: object) -> None:
        self.problems.append(str(problem))
        self.over.set()

    def guarded(self, work: Callable[[], object]) -> None:
        try:
            while not self.over.is_set():
                work()
        except BaseException as error:
            self.note(repr(error))

    # The threads.

    def share(self) -> None:
        """One command after another through whatever SharedQueue there is."""
        at, version = self.place(), 0
        with contextlib.suppress(UsageError):  # it was closed: there is another one
            while not self.over.is_set():
                version += 1
                view = self.memory.view[at * BLOCK : (at + 1) * BLOCK]
                view[:] = content(at, version)
                self.shared.write(self.disk, at, 1, self.memory, at * BLOCK)
                view[:] = bytes(BLOCK)
                self.shared.read(self.disk, at, 1, self.memory, at * BLOCK)
                if bytes(view) != content(at, version):
                    self.note(f"shared: block {at} is not of version {version}")
                self.count()

    def alone(self, number: int) -> None:
        at, version = self.place(), 0
        try:
            while not self.over.is_set():
                version += 1
                self.own[number].write(self.disk, at, content(at, version))
                if self.own[number].read(self.disk, at, 1) != content(at, version):
                    self.note(f"own: block {at} is not of version {version}")
                self.count()
        except UsageError:
            if not self.over.is_set():
                self.own[number] = self.controller.create_queue(8)

    def ask(self) -> None:
        self.controller.identify(nvme_spec.CNS_CONTROLLER)
        self.controller.look()

    def loop(self) -> None:
        with contextlib.suppress(UsageError):  # the queue was closed under it
            asyncio.run(asyncio.wait_for(self.tasks_of_a_loop(), HANG_S))

    async def tasks_of_a_loop(self) -> None:
        queue = self.controller.create_queue(32)
        try:
            async with AsyncQueue(queue, timeout_s=20) as shared:
                tasks = [asyncio.create_task(self.one_task(shared)) for _ in range(TASKS)]
                entry = asyncio.get_running_loop(), tasks
                self.loops.append(entry[0])
                self.tasks.append(tasks)
                while not self.over.is_set():
                    await asyncio.sleep(2e-3)
                    for n, task in enumerate(tasks):
                        if task.done():
                            if not task.cancelled() and (error := task.exception()):
                                self.note(repr(error))
                            tasks[n] = asyncio.create_task(self.one_task(shared))
                for told in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(told, Exception):
                        self.note(repr(told))
        finally:
            self.loops.remove(asyncio.get_running_loop())
            self.tasks.remove(tasks)
            queue.close()

    async def one_task(self, shared: AsyncQueue) -> None:
        at, version = self.place(), 0
        view = self.memory.view[at * BLOCK : (at + 1) * BLOCK]
        while not self.over.is_set():
            version += 1
            view[:] = content(at, version)
            await shared.write(self.disk, at, 1, self.memory, at * BLOCK, timeout_s=HANG_S)
            view[:] = bytes(BLOCK)
            await shared.read(self.disk, at, 1, self.memory, at * BLOCK, timeout_s=HANG_S)
            if bytes(view) != content(at, version):
                self.note(f"task: block {at} is not of version {version}")
            self.count()

    # What strikes, from the main thread.

    def strike(self) -> None:
        draw = self.source.random()
        if draw < 0.55:
            self.interrupt()
        elif draw < 0.85:
            self.cancel()
        elif draw < 0.91:
            self.fork()
        elif draw < 0.97:
            self.own[self.source.randrange(OWN)].close()
            self.closed += 1
        else:
            queue = self.shared.queue
            self.shared.close()
            self.shared = SharedQueue(queue)
            self.closed += 1

    def interrupt(self) -> None:
        """Ctrl-C at any moment of a call of the main thread; its queue works on."""
        at = self.source.randrange(16)
        got = content(at, 1)
        try:
            with struck(1e-6 + self.source.random() * 3e-3):
                self.mine.write(self.disk, PLACES + at, content(at, 1))
                got = self.mine.read(self.disk, PLACES + at, 1)
        except KeyboardInterrupt:
            self.interrupted += 1
        if got != content(at, 1):
            self.note(f"the main thread's block {at}")
        self.count()

    def cancel(self) -> None:
        with contextlib.suppress(IndexError, RuntimeError):  # a loop that has just ended
            which = self.source.randrange(LOOPS)
            task = self.source.choice(self.tasks[which])
            self.loops[which].call_soon_threadsafe(task.cancel)
            self.cancelled += 1
        time.sleep(1e-3)

    def fork(self) -> None:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            os._exit(self.in_child())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            self.note(f"a child ended with {status}")
        self.forked += 1

    def in_child(self) -> int:
        calls: list[Callable[[], object]] = [
            lambda: self.shared.read(self.disk, 0, 1, self.memory),
            lambda: self.mine.read(self.disk, 0, 1),
            lambda: self.controller.identify(nvme_spec.CNS_CONTROLLER),
            self.controller.create_queue,
        ]
        for number, call in enumerate(calls, start=1):
            try:
                call()
            except UsageError:
                continue
            except BaseException:
                return number
            return number
        self.controller.close()
        return 0

    def run(self) -> None:
        works: list[Callable[[], object]] = [self.share] * SHARING + [self.ask] * ADMIN
        works += [lambda number=number: self.alone(number) for number in range(OWN)]
        works += [self.loop] * LOOPS
        threads = [threading.Thread(target=self.guarded, args=(work,)) for work in works]
        assert len(threads) == 16
        for thread in threads:
            thread.start()
        end = time.monotonic() + HANG_S
        while not self.over.is_set():
            if time.monotonic() > end:
                self.note("a life did not end")
            self.strike()
        for thread in threads:
            thread.join(HANG_S)
        assert not any(thread.is_alive() for thread in threads)
        assert self.problems == []
        self.end()

    def end(self) -> None:
        """Nothing is left: every command was told, and no buffer is held."""
        self.shared.close()
        queues: list[Any] = [self.mine, *self.own]
        for queue in queues:
            if not queue.closed:
                queue.drain(10)
                queue.poll(0)
                assert queue.commands.out == {} and queue.pair.counters().strays == 0
        self.shared.queue.drain(10)
        self.controller.close()
        assert self.memory.pins == 0
        self.memory.close()
        assert self.fake.buffers == {}


@pytest.mark.parametrize("rounds", [3000, pytest.param(100_000, marks=pytest.mark.proof)], ids=str)
def test_sixteen_threads_and_a_thousand_tasks(rounds: int) -> None:
    source = random.Random(31)
    done = cancelled = interrupted = forked = closed = 0
    while done < rounds:
        with FakeNvme(blocks=PLACES + 64) as fake:
            life = Life(fake, source, min(LIFE_ROUNDS, rounds - done))
            life.run()
        done += life.done
        cancelled += life.cancelled
        interrupted += life.interrupted
        forked += life.forked
        closed += life.closed
    print(f"{done=} {cancelled=} {interrupted=} {forked=} {closed=}")
    assert min(cancelled, interrupted, forked, closed) > 0
