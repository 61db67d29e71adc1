"""NVMe's I/O queues for asyncio: many coroutines share one queue pair.

    async with AsyncQueue(queue) as disk_queue:
        await asyncio.gather(*(disk_queue.read(disk, lba, 8, buffer, 4096 * lba) for lba in todo))

A queue with an interrupt is woken by it; one without is polled whenever the loop is idle.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from threading import get_ident
from typing import Self

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.identify import Namespace
from vfiotool.drivers.nvme.io import IO_TIMEOUT_S, IoQueue
from vfiotool.drivers.nvme.queue_pair import Completion
from vfiotool.drivers.nvme.status import failed_with
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.vfio import DmaBuffer

# An interrupt that was lost, and a queue that was closed, are noticed after so long.
_TICK_S = 0.05


class AsyncQueue:
    """`queue` for the coroutines of one event loop. Use it as a context manager: its end waits
    for all that is in flight, for `timeout_s` seconds at most, and raises KernelError if something
    did not come back.

    A command cannot be called back: a coroutine that is cancelled, or times out, leaves its
    command running, and its DMA buffer cannot be closed until that has ended.
    """

    def __init__(self, queue: IoQueue, *, timeout_s: float | None = IO_TIMEOUT_S) -> None:
        self.queue = queue
        self.timeout_s = timeout_s
        self._waiting: set[asyncio.Future[Completion]] = set()
        # Those that wait for room, in their order; and how many of them have their turn, but did
        # not come to use it yet: room is not given to others before them.
        self._for_room: deque[asyncio.Future[None]] = deque()
        self._turns = 0
        self._poller: asyncio.Task[None] | None = None
        self._descriptor = -1
        self._open = False

    async def __aenter__(self) -> Self:
        self.queue.refuse_closed()
        if self.queue.pair.in_flight:
            raise UsageError("the queue has commands in flight: poll them first")
        if self.queue.commands.taken_by(get_ident()) != get_ident():
            raise UsageError(f"another thread is using {self.queue.commands.what}")
        self._open = True
        if self.queue.interrupt is not None:
            self._descriptor = self.queue.interrupt.descriptor
            asyncio.get_running_loop().add_reader(self._descriptor, self._signalled)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._open = False
        deadline = Deadline(self.timeout_s)
        try:
            pair = self.queue.pair
            while not self.queue.closed and pair.in_flight and not deadline.passed:
                try:
                    self._reap()
                    self.queue.commands.health.watch(deadline, "what is in flight")
                except VfiotoolError as error:
                    self._fail(error)
                    if kind is None:
                        raise
                    return
                await asyncio.sleep(0 if self._descriptor < 0 else 1e-3)
            if not self.queue.closed and pair.in_flight:
                missing = self.queue.commands.timed_out(f"{pair.in_flight} commands", deadline)
                self._fail(missing)
                if kind is None:
                    raise missing
        finally:
            await self._leave()

    async def _leave(self) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            self._descriptor = -1
        self._fail(UsageError("the queue is used outside its `async with`"))
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
        self.queue.commands.left_by(get_ident())

    async def read(
        self,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer,
        offset: int = 0,
        *,
        timeout_s: float | None = IO_TIMEOUT_S,
    ) -> Completion:
        """Read `blocks` blocks into `buffer` from `offset` on. Raises as `IoQueue.send`, and
        KernelError when the controller fails the command or does not answer in `timeout_s`."""
        return await self._run(nvme_spec.READ, disk, lba, blocks, buffer, offset, timeout_s)

    async def write(
        self,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer,
        offset: int = 0,
        *,
        timeout_s: float | None = IO_TIMEOUT_S,
    ) -> Completion:
        """Write `blocks` blocks out of `buffer` from `offset` on; as `read`."""
        return await self._run(nvme_spec.WRITE, disk, lba, blocks, buffer, offset, timeout_s)

    async def flush(self, disk: Namespace, *, timeout_s: float | None = IO_TIMEOUT_S) -> Completion:
        """Until all writes that were done before are on stable media."""
        return await self._run(nvme_spec.FLUSH, disk, 0, 0, None, 0, timeout_s)

    async def _run(
        self,
        opcode: int,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer | None,
        offset: int,
        timeout_s: float | None,
    ) -> Completion:
        what = f"blocks {lba} and on, opcode {opcode:#x}"
        deadline = Deadline(timeout_s)
        holds = () if buffer is None else (buffer,)
        loop = asyncio.get_running_loop()
        commands = self.queue.commands
        send = self.queue.sender(opcode, disk, lba, blocks, buffer, offset, 0)
        number = 0
        waited = False
        while not number:
            self._refuse_closed()
            if not waited and (self._for_room or not self._spare()):
                await self._room(deadline, what, again=False)
                waited = True
                continue
            future: asyncio.Future[Completion] = loop.create_future()

            def ended(done: Completion, future: asyncio.Future[Completion] = future) -> None:
                if not future.done():
                    future.set_result(done)
                self._wake_one()

            number = commands.start(send, holds=holds, call=True, ended=ended)
            if not number:
                await self._room(deadline, what, again=waited)
                waited = True
        self._waiting.add(future)
        self._start_poller()
        try:
            async with asyncio.timeout(_finite(deadline)):
                done = await future
        except TimeoutError:
            raise commands.timed_out(what, deadline) from None
        finally:
            self._waiting.discard(future)
            if (sent := commands.out.get(number)) is not None:
                sent.late = True
        if done.status:
            raise failed_with(done.status, what)
        return done

    def _refuse_closed(self) -> None:
        if not self._open:
            raise UsageError("the queue is used outside its `async with`")
        self.queue.refuse_closed()

    async def _room(self, deadline: Deadline, what: str, *, again: bool) -> None:
        """Wait for a turn: behind all others, or before them if one was in vain (`again`)."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if again:
            self._for_room.appendleft(turn)
        else:
            self._for_room.append(turn)
        self._start_poller()
        used = False
        try:
            async with asyncio.timeout(_finite(deadline)):
                await turn
            used = True
        except TimeoutError:
            raise self.queue.commands.timed_out(what, deadline) from None
        finally:
            if turn in self._for_room:
                self._for_room.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._turns -= 1
                if not used:
                    self._wake_one()  # the turn was ours, and we do not take it

    def _spare(self) -> bool:
        """Whether there is room that nobody has been given."""
        return self.queue.depth - self.queue.pair.in_flight > self._turns

    def _wake_one(self) -> None:
        while self._for_room and self._spare():
            turn = self._for_room.popleft()
            if not turn.done():
                turn.set_result(None)
                self._turns += 1
                return

    def _start_poller(self) -> None:
        if self._poller is None or self._poller.done():
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def _poll(self) -> None:
        """While somebody waits: takes completions, and notices a controller that died and a queue
        that was closed, by whomever."""
        deadline = Deadline(None)
        while self._waiting or self._for_room:
            try:
                self.queue.refuse_closed()
                if self._reap():
                    deadline = Deadline(None)
                self.queue.commands.health.watch(deadline)
                self._wake_one()
            except VfiotoolError as error:
                # Nothing more will come.
                self._fail(error)
                return
            await asyncio.sleep(0 if self._descriptor < 0 else _TICK_S)

    def _signalled(self) -> None:
        interrupt = self.queue.interrupt
        try:
            if interrupt is not None:
                interrupt.wait(0.0)
            self._reap()
        except VfiotoolError as error:
            self._fail(error)
            if self._descriptor >= 0:
                asyncio.get_running_loop().remove_reader(self._descriptor)
                self._descriptor = -1

    def _reap(self) -> int:
        taken = self.queue.commands.gather()
        self.queue.commands.settle()
        return taken

    def _fail(self, error: VfiotoolError) -> None:
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(error)
        while self._for_room:
            turn = self._for_room.popleft()
            if not turn.done():
                turn.set_exception(error)


def _finite(deadline: Deadline) -> float | None:
    # For asyncio.timeout: wait_for (Python 3.11) returns a result that comes together with a
    # cancellation, and the cancellation is lost.
    left = deadline.left()
    return None if left == float("inf") else left
