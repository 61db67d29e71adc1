"""NVMe's I/O queues: reads, writes and flushes on a namespace, waited for or not.

A part of the driver in `nvme.py`. Sources: NVM Command Set Specification 1.0, section 3.2.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.queue_pair import Completion, QueuePair, failed_with
from vfiotool.drivers.nvme.spec import Namespace
from vfiotool.errors import KernelError, UsageError, VfiotoolError
from vfiotool.vfio import DmaBuffer, Interrupt

if TYPE_CHECKING:
    from vfiotool.drivers.nvme.controller import Controller

IO_TIMEOUT_S = 30.0
_BOUNCE_CHUNK = 128 << 10
_BOUNCE_PLACES = 8


class IoQueue:
    """A pair of I/O queues: reads, writes and flushes, one thread at a time.

    `read`, `write` and `flush` wait for the end. `send` and `poll` do not: the caller keeps the
    DMA buffer until the completion with its `tag` has come.
    """

    def __init__(
        self, controller: Controller, pair: QueuePair, interrupt: Interrupt | None
    ) -> None:
        self.controller = controller
        self.pair = pair
        self.interrupt = interrupt
        self._bounce: DmaBuffer | None = None

    @property
    def number(self) -> int:
        return self.pair.rings.id

    @property
    def depth(self) -> int:
        """How many commands can be in flight."""
        return self.pair.depth

    def send(
        self,
        opcode: int,
        disk: Namespace,
        lba: int = 0,
        blocks: int = 0,
        buffer: DmaBuffer | None = None,
        offset: int = 0,
        *,
        tag: int = 0,
        control: int = 0,
    ) -> bool:
        """Send a command whose data is `blocks` blocks in `buffer` from `offset` on; False where
        the queue is full. Raises UsageError for what does not fit disk, buffer or controller."""
        size = blocks * disk.block_bytes
        if lba < 0 or blocks < 0 or lba + blocks > disk.blocks:
            raise UsageError(f"blocks {lba} to {lba + blocks} of a disk of {disk.blocks}")
        iova = 0
        if buffer is None:
            size = 0
        else:
            if size > self.controller.max_transfer:
                raise UsageError(
                    f"{size} bytes; the controller takes {self.controller.max_transfer}"
                )
            if offset < 0 or offset + size > buffer.size or offset % 4:
                raise UsageError(f"{size} bytes at {offset:#x} of a buffer of {buffer.size}")
            if buffer.closed:
                raise UsageError("the DMA buffer is closed")
            iova = buffer.iova + offset
        return self.pair.submit(
            opcode,
            disk.nsid,
            lba=lba,
            blocks=blocks,
            iova=iova,
            size_bytes=size,
            control=control,
            tag=tag,
        )

    def poll(self, least: int = 0, timeout_s: float = IO_TIMEOUT_S) -> list[Completion]:
        """Take completions: all that are there, at least `least` if so many are in flight and
        come within `timeout_s`. Spins, or sleeps for the interrupt where the queue has one."""
        if self.interrupt is None or not least:
            return self.pair.poll(least, timeout_s)
        end = time.monotonic() + timeout_s
        done = self.pair.poll()
        while len(done) < least and self.pair.in_flight:
            left = end - time.monotonic()
            if left <= 0:
                break
            self.interrupt.wait(left)
            done += self.pair.poll()
        return done

    def read(self, disk: Namespace, lba: int, blocks: int) -> bytes:
        """`blocks` blocks from `lba` on. Raises UsageError beyond the disk, KernelError."""
        data = bytearray(blocks * disk.block_bytes)
        self._move(nvme_spec.READ, disk, lba, memoryview(data))
        return bytes(data)

    def write(self, disk: Namespace, lba: int, data: bytes | bytearray | memoryview) -> None:
        """Store whole blocks from `lba` on; they may still be in the device's cache (`flush`)."""
        view = memoryview(data).cast("B")
        if len(view) % disk.block_bytes:
            raise UsageError(f"{len(view)} bytes are not whole blocks of {disk.block_bytes}")
        self._move(nvme_spec.WRITE, disk, lba, view)

    def flush(self, disk: Namespace) -> None:
        """Until all that was written is on stable media."""
        self.send(nvme_spec.FLUSH, disk)
        self._check(self.poll(1), "flush")

    def _check(self, done: list[Completion], what: str) -> None:
        if not done:
            raise KernelError(
                f"{self.controller.device.name}: {what} did not end in {IO_TIMEOUT_S:g} s",
                hint="close the device and reset it: vfiotool device reset",
                errno_name="ETIMEDOUT",
            )
        for one in done:
            if one.status:
                raise failed_with(one.status, what)

    def _move(self, opcode: int, disk: Namespace, lba: int, view: memoryview) -> None:
        """All of `view` through a bounce buffer, several chunks in flight."""
        if self.controller.queues.get(self.number) is not self:
            raise UsageError(f"queue {self.number} is closed")
        if self._bounce is None:
            self._bounce = self.controller.device.dma.alloc(_BOUNCE_CHUNK * _BOUNCE_PLACES)
        bounce = self._bounce
        if self.pair.in_flight:
            raise UsageError("the queue has commands in flight: poll them first")
        chunk = max(disk.block_bytes, min(self.controller.max_transfer, _BOUNCE_CHUNK))
        places = list(range(min(_BOUNCE_PLACES, self.depth)))
        flying: dict[int, tuple[int, int]] = {}
        failure: VfiotoolError | None = None
        at = 0
        while flying or (at < len(view) and not failure):
            while places and at < len(view) and not failure:
                size = min(chunk, len(view) - at)
                place = places.pop()
                start = place * _BOUNCE_CHUNK
                if opcode == nvme_spec.WRITE:
                    bounce.view[start : start + size] = view[at : at + size]
                first, count = lba + at // disk.block_bytes, size // disk.block_bytes
                self.send(opcode, disk, first, count, bounce, start, tag=place)
                flying[place] = (at, size)
                at += size
            done = self.poll(1)
            # Whatever failed, the others' data must not arrive in a buffer already reused.
            try:
                self._check(done, f"blocks {lba} and on, opcode {opcode:#x}")
            except VfiotoolError as error:
                failure = failure or error
                if not done:
                    raise
            for one in done:
                where, size = flying.pop(one.tag)
                start = one.tag * _BOUNCE_CHUNK
                if opcode == nvme_spec.READ and not one.status:
                    view[where : where + size] = bounce.view[start : start + size]
                places.append(one.tag)
        if failure:
            raise failure

    def drain(self, timeout_s: float = 2.0) -> None:
        """Wait for what is in flight and forget its completions; what another thread runs is
        halted first. Raises UsageError while that thread goes on."""
        self.pair.halt()
        end = time.monotonic() + timeout_s
        while self.pair.in_flight and time.monotonic() < end:
            try:
                self.pair.poll(self.depth, end - time.monotonic())
            except UsageError:
                if time.monotonic() >= end:
                    raise
                self.pair.halt()
                time.sleep(1e-3)

    def free_bounce(self) -> None:
        """Give back the buffer of `read` and `write`."""
        bounce, self._bounce = self._bounce, None
        if bounce is not None:
            bounce.close()

    def free(self) -> None:
        """Give back all memory, once the controller has deleted the queues."""
        self.free_bounce()
        self.controller.free(self.pair.rings)

    def close(self) -> None:
        """Delete the queues. Closing twice is nothing."""
        if self.controller.queues.get(self.number) is self:
            self.controller.delete_queue(self)
