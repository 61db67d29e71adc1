"""NVMe's I/O queues for asyncio: many coroutines share one queue pair.

    async with AsyncQueue(queue) as disk_queue:
        await asyncio.gather(*(disk_queue.read(disk, lba, 8, buffer, 4096 * lba) for lba in todo))

A queue with an interrupt is woken by it; one without is polled whenever the loop is idle.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.queue_pair import Completion, failed_with
from vfiotool.drivers.nvme.spec import Namespace
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.vfio import DmaBuffer


class AsyncQueue:
    """`queue` for the coroutines of one event loop. Use it as a context manager: its end waits
    for all that is in flight.

    A command cannot be called back: a coroutine that is cancelled leaves its command running, and
    the DMA buffer must live until the context manager's end.
    """

    def __init__(self, queue: IoQueue) -> None:
        self.queue = queue
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._room = asyncio.Semaphore(queue.depth)
        self._next_tag = 0
        self._poller: asyncio.Task[None] | None = None
        self._open = False

    async def __aenter__(self) -> Self:
        if self.queue.pair.in_flight:
            raise UsageError("the queue has commands in flight: poll them first")
        self._open = True
        if self.queue.interrupt is not None:
            descriptor = self.queue.interrupt.descriptor
            asyncio.get_running_loop().add_reader(descriptor, self._signalled)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._open = False
        if self._waiting:
            await asyncio.wait(list(self._waiting.values()))
        if self.queue.interrupt is not None:
            asyncio.get_running_loop().remove_reader(self.queue.interrupt.descriptor)
        if self._poller is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller

    async def read(
        self, disk: Namespace, lba: int, blocks: int, buffer: DmaBuffer, offset: int = 0
    ) -> Completion:
        """Read `blocks` blocks into `buffer` from `offset` on. Raises as `IoQueue.send`, and
        KernelError when the controller fails the command."""
        return await self._run(nvme_spec.READ, disk, lba, blocks, buffer, offset)

    async def write(
        self, disk: Namespace, lba: int, blocks: int, buffer: DmaBuffer, offset: int = 0
    ) -> Completion:
        """Write `blocks` blocks out of `buffer` from `offset` on; as `read`."""
        return await self._run(nvme_spec.WRITE, disk, lba, blocks, buffer, offset)

    async def flush(self, disk: Namespace) -> Completion:
        """Until all writes that were done before are on stable media."""
        return await self._run(nvme_spec.FLUSH, disk, 0, 0, None, 0)

    async def _run(
        self,
        opcode: int,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer | None,
        offset: int,
    ) -> Completion:
        if not self._open:
            raise UsageError("the queue is used outside its `async with`")
        await self._room.acquire()
        tag, self._next_tag = self._next_tag, self._next_tag + 1
        try:
            # The semaphore counts what is in flight, so the queue has room.
            self.queue.send(opcode, disk, lba, blocks, buffer, offset, tag=tag)
        except BaseException:
            self._room.release()
            raise
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting[tag] = future
        if self.queue.interrupt is None and (self._poller is None or self._poller.done()):
            self._poller = asyncio.create_task(self._poll())
        done = await asyncio.shield(future)
        if done.status:
            raise failed_with(done.status, f"blocks {lba} and on, opcode {opcode:#x}")
        return done

    def _signalled(self) -> None:
        assert self.queue.interrupt is not None
        self.queue.interrupt.wait(0.0)
        self._reap()

    async def _poll(self) -> None:
        while self._waiting:
            self._reap()
            await asyncio.sleep(0)

    def _reap(self) -> None:
        try:
            taken = self.queue.pair.poll()
        except VfiotoolError as error:
            # A controller that answers what nobody asked: nothing more will come.
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()
            return
        for one in taken:
            self._room.release()
            future = self._waiting.pop(one.tag)
            if not future.done():
                future.set_result(one)
