"""Many equal commands in one call: for loops in Python over a queue pair."""

from __future__ import annotations

from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.queue_pair import QueuePair
from vfiotool.drivers.nvme.status import failed_with
from vfiotool.errors import UsageError
from vfiotool.native.library import ffi, lib
from vfiotool.vfio import DmaBuffer

_SLICE_NS = 50_000_000


class Batch:
    """Equal commands on many places, for loops in Python that send and take many at once.

    There are `slots` places for data, `stride` bytes apart in `buffer`. Fill `lbas[:n]` and
    `slots[:n]` (which of the places each command uses), `submit(n)`; after `n = poll(...)`,
    `slots[:n]` are the places whose commands are done. While commands are out `buffer` cannot be
    closed.
    """

    def __init__(
        self,
        queue: QueuePair,
        opcode: int,
        nsid: int,
        *,
        blocks: int,
        size_bytes: int,
        buffer: DmaBuffer,
        stride: int,
    ) -> None:
        if stride < size_bytes or size_bytes <= 0:
            raise UsageError(f"places {stride} bytes apart do not hold {size_bytes} bytes")
        self.queue = queue
        self.buffer = buffer
        self.count = min(queue.depth, buffer.size // stride)
        self._stride = stride
        self._pattern = ffi.new("struct vt_nvme_io *")
        self._pattern.iova, self._pattern.bytes = buffer.iova, size_bytes
        self._pattern.blocks, self._pattern.nsid, self._pattern.opcode = blocks, nsid, opcode
        self._lbas = ffi.new("uint64_t[]", self.count)
        self._tags = ffi.new("uint64_t[]", self.count)
        self._status = ffi.new("uint32_t *")
        # How many of `_tags` were taken by a poll that did not return.
        self._held = ffi.new("uint32_t *")
        self._out = 0
        self._credited = 0
        self.lbas: memoryview[int] = memoryview(ffi.buffer(self._lbas)).cast("Q")
        self.slots: memoryview[int] = memoryview(ffi.buffer(self._tags)).cast("Q")

    def submit(self, count: int) -> int:
        """Send commands for the first `count` entries of `lbas` and `slots`, with one write of
        the doorbell; returns how many were taken (fewer where the queue is full)."""
        if not 0 <= count <= self.count:
            raise UsageError(f"a batch of {count}; there are {self.count} places")
        if not self._out:
            self.buffer.pin()
        queue = self.queue
        taken = 0
        try:
            taken = lib.vt_nvme_submit_many(
                queue._queue, self._pattern, self._lbas, self._tags, count, self._stride, self.count
            )
            return taken if taken >= 0 else queue._check(taken)
        finally:
            self._out += max(0, taken)
            if not self._out:
                self.buffer.unpin()

    def _back(self, total: int) -> None:
        """`total` places are held of commands that have ended: they need the buffer no more."""
        count, self._credited = total - self._credited, total
        if self._out:
            self._out = max(0, self._out - count)
            if not self._out:
                self.buffer.unpin()

    def poll(self, least: int = 1, timeout_s: float | None = None) -> int:
        """Take completions as `QueuePair.poll`; returns how many, their places in `slots`.

        Raises KernelError with the status of the first command that failed. After an exception
        (Ctrl-C, a failed command) the places that were taken come with the next poll.
        """
        queue, held = self.queue, self._held
        deadline = None
        while True:
            before = held[0]
            wanted = least - before if least > before else 0
            result: int = lib.vt_nvme_poll_tags(
                queue._queue, self._tags, self.count, wanted, _SLICE_NS, held, self._status
            )
            if result < 0:
                queue._check(result)
            if self._status[0]:
                self._back(held[0])
                raise failed_with(self._status[0], f"a command on queue {queue.rings.id}")
            total: int = held[0]
            if total < least:
                deadline = deadline or Deadline(timeout_s)
                if not deadline.passed and queue.in_flight:
                    continue
            self._back(total)
            held[0] = self._credited = 0
            return total

    def close(self) -> None:
        """Let go of the buffer once the controller cannot reach it any more: at the end of what
        was in flight, or after its queue pair was closed. Closing twice is nothing."""
        if self._out:
            self._out = 0
            self.buffer.unpin()
