"""Serves devices that are Python classes: an asyncio loop for their requests, a thread for control.

Control (messages of front ends) runs in a thread of its own, as for disks in C; whatever touches a
queue is done in the loop, and control waits for it. So a queue belongs to one thread, and a device
that takes long delays its own front ends and nobody else's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from vfiotool.errors import UsageError, VfiotoolError, described, from_oserror
from vfiotool.native.direct import DirectQueue, QueueRequest, signal, signal_blocks
from vfiotool.native.virtqueue import MemoryMap, MemoryRegion, Worker, WrittenPages
from vfiotool.virtio.device import VirtioDevice, check
from vfiotool.virtio.listener import listen
from vfiotool.virtio.served import QueueStart
from vfiotool.virtio.server import Export, Report, Server

# How long requests may take to end when their driver stops the queue, before they are failed.
DRAIN_S = 5.0
# Control waits so much longer than that for the loop.
_LOOP_S = 15.0
# Requests handed over at a time: the driver goes on with those while the next ones are answered.
_BATCH = 16
_ROUNDS = 64
# How long a queue that had work is looked at before it waits for a kick.
_LOOK_S = 1e-4

_T = TypeVar("_T")


class _LoopQueue:
    """A queue that the loop serves. Its public methods are control's: they wait for the loop."""

    def __init__(self, host: DeviceHost, index: int, start: QueueStart) -> None:
        self.host, self.index = host, index
        self._broken: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._due = False
        self._worked_at = 0.0
        # Nothing was there at the last look: the driver may sleep, perhaps on another processor.
        self._was_idle = True
        self._kick: int | None = None
        self._error: int | None = None
        self.direct = DirectQueue(
            start.memory,
            start.layout,
            base=start.base,
            call=start.call,
            log=start.log,
            dirty=start.dirty,
        )
        try:
            self._kick = None if start.kick is None else os.dup(start.kick)
            self._error = None if start.error is None else os.dup(start.error)
            if self._kick is not None:
                # Raises for what cannot be waited for, such as a KVM machine's descriptor.
                host.loop.add_reader(self._kick, self._kicked)
        except BaseException:
            self.direct.stop()
            self._give_back()
            raise
        self.direct.completed = self.publish_soon
        # What was made available before we came is announced by nobody.
        host.loop.call_soon(self._turn)

    def _give_back(self) -> None:
        # It refers to us, and we to it: the driver's memory would stay mapped until the next
        # collection of cycles, which an idle server may never come to.
        self.direct.completed = None
        for descriptor in (self._kick, self._error):
            if descriptor is not None:
                os.close(descriptor)

    # The loop's

    def _kicked(self) -> None:
        assert self._kick is not None
        try:
            # Not by the descriptor's mode: that is shared with the driver, who may change it.
            os.preadv(self._kick, [bytearray(8)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return
        except OSError:
            self._break("its kick cannot be read")
            return
        self._turn()

    def _turn(self) -> None:
        """Hand over what is available, for a few rounds; then let others have the loop."""
        if not self.direct.is_open or self._broken:
            return
        device = self.host.device
        if self.index in device.taken:
            self.host.tell("kicked", self.index)
            if self.direct.is_open and not self._broken:
                left = self.direct.waiting
                self.direct.notify(on=True)
                if self.direct.waiting != left:
                    # They came before the wish for kicks was seen: nobody announces them.
                    self.host.loop.call_soon(self._turn)
            return
        if self._task is not None and device.ordered:
            # Its end takes the next turn.
            return
        self.direct.notify(on=False)
        for _ in range(_ROUNDS):
            requests = self.direct.fetch(_BATCH)
            if not requests:
                self._rest()
                return
            self._worked_at = self.host.loop.time()
            self._hand_over(requests)
            self._was_idle = False
            if not self.direct.is_open or (self._task is not None and device.ordered):
                return
        self.host.loop.call_soon(self._turn)

    def _rest(self) -> None:
        """There was nothing: look again soon if there was something just now, or ask for kicks."""
        self._was_idle = True
        if why := self.direct.broken():
            self._break(why)
        elif self.host.loop.time() - self._worked_at < _LOOK_S or self.direct.notify(on=True):
            self.host.loop.call_soon(self._turn)

    def _hand_over(self, requests: list[QueueRequest]) -> None:
        # What is completed at once is published at once, together; but for the first one after a
        # pause: a driver that sleeps wakes up while the others are answered.
        self.direct.completed = self._publish_first if self._was_idle else None
        try:
            answer = self.host.device.handle(self.index, requests)
        except Exception as error:
            answer = None
            self._failed(requests, error)
        finally:
            self.direct.completed = self.publish_soon
        if self.direct.is_open:
            self.direct.publish()
        if answer is not None:
            self._task = self.host.loop.create_task(self._answer(answer, requests))
            self._tasks.add(self._task)

    async def _answer(self, answer: Any, requests: list[QueueRequest]) -> None:
        try:
            await answer
        except asyncio.CancelledError as error:
            if not self._broken:
                # By itself: whoever stops the queue sees to its requests.
                self._failed(requests, error)
        except Exception as error:
            self._failed(requests, error)
        finally:
            task = asyncio.current_task()
            self._tasks.discard(task)
            if self._task is task:
                self._task = None
            if self.direct.is_open:
                self.direct.publish()
                self._turn()

    def _failed(self, requests: list[QueueRequest], error: BaseException) -> None:
        kind = type(self.host.device).__name__
        self.host.report(f"{kind}.handle, queue {self.index}: {described(error)}")
        for request in requests:
            self._fail(request)

    def _fail(self, request: QueueRequest) -> None:
        if request.is_complete:
            return
        self.host.tell("failed", request)
        if not request.is_complete:
            request.complete(0)

    def _publish_first(self) -> None:
        self.direct.completed = None
        self.direct.publish()

    def publish_soon(self) -> None:
        """Make what was completed outside of a turn visible, once a round of the loop."""
        if not self._due:
            self._due = True
            self.host.loop.call_soon(self._publish)

    def _publish(self) -> None:
        self._due = False
        if self.direct.is_open:
            self.direct.publish()

    def take(self, most: int) -> list[QueueRequest]:
        if not self.direct.is_open or self._broken:
            return []
        requests = self.direct.fetch(most)
        if not requests and self.direct.notify(on=True):
            # With an event index a kick comes for what follows the last one that was taken, so it
            # is asked for whenever there was nothing to take.
            requests = self.direct.fetch(most)
        if not requests and (why := self.direct.broken()):
            self._break(why)
        return requests

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
            if self._kick is not None:
                self.host.loop.remove_reader(self._kick)
            blocks = self.host.blocked
            blocks |= self._error is not None and not blocks and not signal(self._error)
            self.host.blocked = blocks or why == signal_blocks()

    async def _stop(self) -> int:
        """Drain and end. What does not end in time is failed, or left to the in-flight log."""
        if self._kick is not None:
            self.host.loop.remove_reader(self._kick)
        if self._broken is None and (why := self.direct.broken()):
            self._break(why)
        self._broken = self._broken or "stopped"
        ends = self.host.loop.time() + DRAIN_S
        # Those before the fault of a ring that broke were fetched too, but nobody has them.
        while self.direct.requests() and self.index not in self.host.device.taken:
            left = ends - self.host.loop.time()
            if left <= 0:
                break
            # Completions come from tasks and callbacks alike; there is no one thing to wait for.
            await asyncio.sleep(min(0.001, left))
        for task in list(self._tasks):
            task.cancel()
        if not self.direct.has_log and self.index not in self.host.device.taken:
            for request in self.direct.requests():
                self._fail(request)
        self.direct.publish()
        # What is still in flight was fetched last; without a log it is fetched again.
        again = 0 if self.direct.has_log else self.direct.in_flight
        base = (self.direct.stop() - again) & 0xFFFF
        self._give_back()
        del self.host.running[self.index]
        self.host.tell("stopped", self.index)
        return base

    # Control's

    def stop(self) -> int:
        # A class that keeps the loop busy is not waited for; the queue ends as soon as it can.
        return self.host.in_loop(self._stop(), later=True)

    def suspend(self) -> int:
        """A class's coroutine is not cancelled half-way: it ends first."""
        return self.stop()

    def set_memory(self, memory: MemoryMap) -> bool:
        return self.host.call(lambda: self.direct.set_memory(memory))

    def set_call(self, call: int | None) -> None:
        self.host.call(lambda: self.direct.set_call(call))

    def set_dirty_log(self, dirty: WrittenPages | None) -> None:
        self.host.call(lambda: self.direct.set_dirty_log(dirty))

    def broken(self) -> str | None:
        return self._broken


class DeviceHost:
    """A Python device as front ends meet it (served.ServedDevice); made in the loop that serves it.

    Control's thread calls the methods of ServedDevice; the rest is the loop's.
    """

    def __init__(self, device: VirtioDevice, report: Report) -> None:
        check(device)
        self.device = device
        self.report = report
        self.loop = asyncio.get_running_loop()
        self.running: dict[int, _LoopQueue] = {}
        self.blocked = False
        self.changed: Callable[[], None] = lambda: None
        self._late: concurrent.futures.Future[Any] | None = None
        device._take = self.take
        if device.config is not None:
            device.config._changed = lambda: self.changed()

    @property
    def queues(self) -> int:
        return self.device.queues

    def features(self) -> int:
        return self.device.features

    def config(self) -> bytes:
        config = self.device.config
        return b"" if config is None else config.pack()

    def write_config(self, offset: int, data: bytes) -> None:
        config = self.device.config
        if config is None:
            raise UsageError("the device has no configuration")

        def take() -> None:
            for field in config.wrote(offset, data):
                self.tell("driver_wrote", field)

        self.call(take)

    def reach(self, memory: MemoryMap, regions: list[MemoryRegion]) -> None:
        """Classes reach memory by the views that they get."""

    def leave(self, memory: MemoryMap) -> None:
        memory.close()

    def held_up(self) -> bool:
        return self.blocked

    def forgive(self) -> None:
        self.blocked = False

    def start_queue(
        self, _workers: list[Worker], index: int, features: int, start: QueueStart
    ) -> _LoopQueue:
        async def begin() -> _LoopQueue:
            kind = type(self.device).__name__
            if index in self.running:
                raise VfiotoolError(f"{kind} still has requests of queue {index}'s last driver")
            self.device.negotiated = features
            queue = self.running[index] = _LoopQueue(self, index, start)
            if not self.tell("started", index):
                await queue._stop()
                raise VfiotoolError(f"{kind} does not start queue {index}")
            return queue

        return self.in_loop(begin())

    def resize(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing: the device outlives its exports, and its owner closes it."""

    def take(self, queue: int, most: int) -> list[QueueRequest]:
        """Requests that wait in a running queue; see VirtioDevice.take."""
        running = self.running.get(queue)
        return [] if running is None else running.take(most)

    def tell(self, method: str, *arguments: object) -> bool:
        """Call a method of the device that only takes note; a fault is reported. Whether there was
        none."""
        try:
            getattr(self.device, method)(*arguments)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            self.report(f"{type(self.device).__name__}.{method}: {described(error)}")
            return False
        return True

    def call(self, function: Callable[[], _T]) -> _T:
        """Have the loop call this, and wait for it."""

        async def run() -> _T:
            return function()

        return self.in_loop(run())

    def in_loop(self, work: Coroutine[Any, Any, _T], *, later: bool = False) -> _T:
        """Have the loop do this, and wait for it, with a limit. What the loop had no time for is
        not done any more, or done `later`, when it has. Raises VfiotoolError then."""
        done: concurrent.futures.Future[_T] = concurrent.futures.Future()

        async def run() -> None:
            if not done.set_running_or_notify_cancel():
                # What it is about may be gone: a cancelled task would still begin with it.
                work.close()
                return
            try:
                done.set_result(await work)
            except BaseException as error:
                done.set_exception(error)

        asyncio.run_coroutine_threadsafe(run(), self.loop)
        # A loop that something is left to is not waited for again and again.
        busy = self._late is not None and not self._late.done()
        try:
            return done.result(0 if busy else _LOOP_S)
        except TimeoutError:
            if later:
                self._late = done
            elif not done.cancel():
                return done.result()
            raise VfiotoolError(
                f"{type(self.device).__name__} has kept its loop busy for {_LOOP_S:.0f} s",
                hint="make what takes long `async`, or give it to an executor",
            ) from None
        finally:
            if done.done() and not done.cancelled():
                # It has the error, whose traceback has `run` and what failed there, which has it:
                # a driver's memory would stay mapped until cycles are collected.
                del done


class Served:
    """A device that is being served: an asynchronous context manager; see `serve`."""

    def __init__(self, device: VirtioDevice, path: str, report: Report) -> None:
        self.device, self.path = device, path
        self._report = report

    async def __aenter__(self) -> Served:
        await self._life("open")
        try:
            host = DeviceHost(self.device, self._report)
            self._server = Server(threads=0, report=self._report)
            host.changed = lambda: self._server.soon(self._tell_drivers)
            try:
                self._export = Export("device", host, listen(self.path), self.path)
                self._server.add(self._export)
            except BaseException:
                self._server.close()
                raise
        except BaseException:
            await self._life("close")
            raise
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        with self._server:
            self._server.run()

    def _tell_drivers(self) -> None:
        for connection in self._export.connections:
            connection.frontend.config_changed()

    async def __aexit__(self, *_: object) -> None:
        self._server.stop()
        # Control waits for the loop to stop the queues, so the loop must not wait for it.
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self.device._take = None
        await self._life("close")

    async def _life(self, method: str) -> None:
        """The device's `open` or `close`; what they raise is a fault of the class."""
        what = f"{type(self.device).__name__}.{method}()"
        try:
            await getattr(self.device, method)()
        except VfiotoolError:
            raise
        except OSError as error:
            what += f": {error.filename}" if error.filename is not None else ""
            raise from_oserror(what, error) from error
        except Exception as error:
            raise UsageError(f"{what} fails: {described(error)}") from error


async def serve(device: VirtioDevice, path: str, until: asyncio.Event, report: Report) -> None:
    """Serve a device over vhost-user at a socket until the event is set."""
    async with Served(device, path, report):
        await until.wait()
