"""NVMe's I/O queues: reads, writes and flushes on a namespace, waited for or not.

A part of the driver in `controller.py`. Sources: NVM Command Set Specification 1.0, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.identify import Namespace
from vfiotool.drivers.nvme.in_flight import InFlight, Send
from vfiotool.drivers.nvme.queue_pair import Completion, QueuePair
from vfiotool.drivers.nvme.status import failed_with
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.vfio import Device, DmaBuffer, Interrupt

IO_TIMEOUT_S = 30.0
_BOUNCE_CHUNK = 128 << 10
_BOUNCE_PLACES = 8


class IoQueue:
    """A pair of I/O queues: reads, writes and flushes, one thread at a time.

    A call holds the queue to its end; a second thread is refused at once (UsageError): give each
    thread a queue, or share one as `SharedQueue`. `read`, `write` and `flush` wait for the end.
    `send` and `poll` do not: a DMA buffer cannot be closed until the completion of each command
    that uses it has come.
    """

    def __init__(
        self,
        commands: InFlight,
        device: Device,
        max_transfer: int,
        delete: Callable[[IoQueue], object],
    ) -> None:
        self.commands = commands
        self.device = device
        self.max_transfer = max_transfer
        self.closed = False
        self.priority = "urgent"  # told apart where the controller's arbitration is weighted
        self._delete = delete
        self._bounce: DmaBuffer | None = None

    @property
    def pair(self) -> QueuePair:
        return self.commands.pair

    @property
    def interrupt(self) -> Interrupt | None:
        return self.commands.interrupt

    @property
    def number(self) -> int:
        return self.pair.rings.id

    @property
    def depth(self) -> int:
        """How many commands can be in flight."""
        return self.pair.depth

    @property
    def aside(self) -> list[Completion]:
        """Completions that came after their call had given up: after a time-out or Ctrl-C."""
        return list(self.commands.aside)

    def refuse_closed(self) -> None:
        if self.closed:
            raise UsageError(f"queue {self.number} is closed")

    def sender(
        self,
        opcode: int,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer | None,
        offset: int,
        control: int,
    ) -> Send:
        """What gives the command to the queue pair. Raises UsageError for what does not fit disk,
        buffer or controller, and for data without a place."""
        self.refuse_closed()
        if lba < 0 or blocks < 0 or lba + blocks > disk.blocks:
            raise UsageError(f"blocks {lba} to {lba + blocks} of a disk of {disk.blocks}")
        size = iova = 0
        if buffer is not None:
            if not hasattr(buffer, "iova"):
                raise UsageError(
                    f"a {type(buffer).__name__} is not a DMA buffer",
                    hint="make one of your own memory: device.dma.map(memory)",
                )
            size = blocks * disk.transfer_bytes
            if size > self.max_transfer:
                raise UsageError(f"{size} bytes; the controller takes {self.max_transfer}")
            if offset < 0 or offset + size > buffer.size or offset % 4:
                raise UsageError(f"{size} bytes at {offset:#x} of a buffer of {buffer.size}")
            if buffer.closed:
                raise UsageError("the DMA buffer is closed")
            iova = buffer.iova + offset
        # Bits 1:0 say so (Base Specification 2.0, 3.3.3.1). Such a command moves a block at least:
        # without a place it would be that at address 0, and the first ones of the disk.
        if opcode & 3 and not size:
            raise UsageError(
                f"opcode {opcode:#x} moves data: it takes a buffer and at least one block",
                hint="what is unlike reads and writes: send_command",
            )
        return self.pair.sender(opcode, disk.nsid, lba, blocks, iova, size, control)

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
        send = self.sender(opcode, disk, lba, blocks, buffer, offset, control)
        holds = () if buffer is None else (buffer,)
        with self.commands.held():
            return self.commands.start(send, tag=tag, holds=holds) != 0

    def send_command(
        self, command: bytes, *, tag: int = 0, holds: tuple[DmaBuffer, ...] = ()
    ) -> bool:
        """Send 64 bytes as they are, but for the command identifier (`spec.command` makes them);
        False where the queue is full. `holds`: the buffers that the command's pointers name."""
        self.refuse_closed()
        send = partial(self.pair.submit_raw, command)
        with self.commands.held():
            return self.commands.start(send, tag=tag, holds=holds) != 0

    def poll(self, least: int = 0, timeout_s: float | None = IO_TIMEOUT_S) -> list[Completion]:
        """Take completions of what was sent: all that are there, at least `least` if so many are
        in flight and come within `timeout_s` (None: without limit). Spins, or sleeps for the
        interrupt where the queue has one. Raises KernelError as soon as the controller is known
        not to work; nothing that has come is lost."""
        commands = self.commands
        deadline = Deadline(timeout_s)
        taken: dict[int, Completion] = {}
        try:
            with commands.held():
                commands.look()
                if least > len(commands.sent):
                    commands.wait(lambda: self._enough(least), deadline, "a poll")
                taken, commands.sent = commands.sent, {}
                found = list(taken.values())
        except BaseException:
            # An interrupt (Ctrl-C) can come until the queue is let go of.
            if taken:
                commands.sent = taken | commands.sent
            raise
        return found

    def _enough(self, least: int) -> bool:
        commands = self.commands
        return len(commands.sent) >= least or self.pair.in_flight <= commands.calls_out

    def run(
        self,
        command: bytes,
        what: str,
        *,
        timeout_s: float | None = IO_TIMEOUT_S,
        holds: tuple[DmaBuffer, ...] = (),
    ) -> Completion:
        """Run a command of 64 bytes to its own end. Raises KernelError with the controller's
        words if it fails, and ETIMEDOUT if it does not end in time."""
        self.refuse_closed()
        send = partial(self.pair.submit_raw, command)
        with self.commands.held():
            return self.commands.call(send, Deadline(timeout_s), what, holds)

    def read(
        self, disk: Namespace, lba: int, blocks: int, *, timeout_s: float | None = IO_TIMEOUT_S
    ) -> bytes:
        """`blocks` blocks from `lba` on. Raises UsageError beyond the disk, Unsupported for blocks
        with metadata, KernelError, which names the blocks. `timeout_s` is the longest silence."""
        disk.refuse_metadata()
        self._check_range(disk, lba, blocks)
        data = bytearray(blocks * disk.block_bytes)
        self._move(nvme_spec.READ, disk, lba, memoryview(data), timeout_s)
        return bytes(data)

    def write(
        self,
        disk: Namespace,
        lba: int,
        data: bytes | bytearray | memoryview,
        *,
        timeout_s: float | None = IO_TIMEOUT_S,
    ) -> None:
        """Store whole blocks from `lba` on; they may still be in the device's cache (`flush`)."""
        disk.refuse_metadata()
        view = memoryview(data)
        if not view.c_contiguous:
            raise UsageError(
                "the data does not lie in one piece", hint="copy it: memoryview(data).tobytes()"
            )
        view = view.cast("B")
        if len(view) % disk.block_bytes:
            raise UsageError(f"{len(view)} bytes are not whole blocks of {disk.block_bytes}")
        self._check_range(disk, lba, len(view) // disk.block_bytes)
        self._move(nvme_spec.WRITE, disk, lba, view, timeout_s)

    def _check_range(self, disk: Namespace, lba: int, blocks: int) -> None:
        self.refuse_closed()
        if lba < 0 or blocks < 0 or lba + blocks > disk.blocks:
            raise UsageError(f"blocks {lba} to {lba + blocks} of a disk of {disk.blocks}")

    def flush(self, disk: Namespace, *, timeout_s: float | None = IO_TIMEOUT_S) -> None:
        """Until all that was written is on stable media: waits for what is in flight on this
        queue (a Flush covers what ended before it, 3.2.1), then for the Flush itself. The
        completions of what was sent stay for `poll`."""
        commands, deadline = self.commands, Deadline(timeout_s)
        send = self.sender(nvme_spec.FLUSH, disk, 0, 0, None, 0, 0)
        with commands.held():
            if not commands.wait(self._quiet, deadline, "flush"):
                raise commands.timed_out("what is in flight before a flush", deadline)
            commands.call(send, deadline, "flush")

    def _quiet(self) -> bool:
        late = sum(sent.late for sent in self.commands.out.values())
        return self.pair.in_flight <= late

    def _move(
        self, opcode: int, disk: Namespace, lba: int, view: memoryview, timeout_s: float | None
    ) -> None:
        """All of `view` through the bounce buffer, several chunks in flight."""
        with self.commands.held():
            self.commands.health.refuse()
            bounce = self._bounce_buffer()
            # What another call of this queue may move at the same time: its places are its own.
            flying: dict[int, tuple[int, int, int]] = {}
            try:
                _Move(self, opcode, disk, lba, view, bounce, flying, Deadline(timeout_s)).run()
            finally:
                for number in flying:
                    self.commands.give_up(number)

    def _bounce_buffer(self) -> DmaBuffer:
        if self._bounce is None:
            self._bounce = self.device.dma.alloc(_BOUNCE_CHUNK * _BOUNCE_PLACES)
        return self._bounce

    def free_bounce(self) -> None:
        """Give back the buffer of `read` and `write`; no command may be out."""
        bounce, self._bounce = self._bounce, None
        if bounce is not None:
            bounce.close()

    def drain(self, timeout_s: float = 2.0) -> None:
        """Wait for what is in flight; what another thread runs is halted first. Completions stay
        for `poll`. Raises UsageError while that thread goes on."""
        deadline = Deadline(timeout_s)
        self.pair.halt()
        while self.pair.in_flight:
            try:
                with self.commands.held():
                    self.commands.wait(lambda: not self.pair.in_flight, deadline, "what is out")
                return
            except UsageError:
                if deadline.passed or self.closed:
                    raise
                self.pair.halt()
                deadline.pause()

    def close(self) -> None:
        """Delete the queues. Closing twice is nothing."""
        if not self.closed:
            self._delete(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.pair.in_flight} of {self.depth} in flight"
        return f"<IoQueue {self.number} of {self.device.name}: {state}>"


class _Move:
    """One call of `read` or `write`: its chunks, several of them in flight."""

    def __init__(
        self,
        queue: IoQueue,
        opcode: int,
        disk: Namespace,
        lba: int,
        view: memoryview,
        bounce: DmaBuffer,
        flying: dict[int, tuple[int, int, int]],
        silence: Deadline,
    ) -> None:
        self.queue, self.commands = queue, queue.commands
        self.opcode, self.disk, self.lba, self.view = opcode, disk, lba, view
        self.bounce, self.flying, self.silence = bounce, flying, silence
        self.chunk = max(disk.block_bytes, min(queue.max_transfer, _BOUNCE_CHUNK))
        self.failure: VfiotoolError | None = None
        self.at = 0

    def run(self) -> None:
        view = self.view
        while self.flying or (self.at < len(view) and not self.failure):
            while self.at < len(view) and not self.failure and self._send():
                pass
            if not self.flying:
                # All places, or all of the queue, belong to commands of before.
                room = self.commands.wait(self._room, self.silence, "room")
                if not room:
                    raise self.commands.timed_out("what is in flight before", self.silence)
                continue
            what = f"{self._name} of {self._blocks(self.flying[next(iter(self.flying))])}"
            if not self.commands.wait(self._any, self.silence, what):
                raise self.commands.timed_out(what, self.silence)
            self._take()
            self.silence = Deadline(self.silence.timeout_s)
        if self.failure:
            raise self.failure

    @property
    def _name(self) -> str:
        return "read" if self.opcode == nvme_spec.READ else "write"

    def _blocks(self, chunk: tuple[int, int, int]) -> str:
        _, where, size = chunk
        first = self.lba + where // self.disk.block_bytes
        return f"blocks {first} to {first + size // self.disk.block_bytes - 1}"

    def _free_places(self) -> list[int]:
        """Those that no command uses, of this call or of one before that did not end in time."""
        used = {place for place, _, _ in self.flying.values()}
        used |= {sent.place for sent in self.commands.out.values()}
        return [place for place in range(_BOUNCE_PLACES) if place not in used]

    def _room(self) -> bool:
        pair = self.queue.pair
        return bool(self._free_places()) and pair.in_flight < pair.depth

    def _any(self) -> bool:
        return not self.commands.results.keys().isdisjoint(self.flying)

    def _send(self) -> bool:
        places = self._free_places()
        if not places:
            return False
        place = places[0]
        size = min(self.chunk, len(self.view) - self.at)
        start = place * _BOUNCE_CHUNK
        if self.opcode == nvme_spec.WRITE:
            self.bounce.view[start : start + size] = self.view[self.at : self.at + size]
        block = self.disk.block_bytes
        first, count = self.lba + self.at // block, size // block
        send = self.queue.sender(self.opcode, self.disk, first, count, self.bounce, start, 0)
        number = self.commands.start(send, holds=(self.bounce,), call=True, place=place)
        if not number:
            return False
        self.flying[number] = (place, self.at, size)
        self.at += size
        return True

    def _take(self) -> None:
        """What came back. Whatever failed, the others' data must not arrive in a place already
        used again: so all are waited for."""
        for number in [one for one in self.flying if one in self.commands.results]:
            done = self.commands.results.pop(number)
            place, where, size = chunk = self.flying.pop(number)
            start = place * _BOUNCE_CHUNK
            if done.status:
                what = f"{self._name} of {self._blocks(chunk)}"
                self.failure = self.failure or failed_with(done.status, what)
            elif self.opcode == nvme_spec.READ:
                self.view[where : where + size] = self.bounce.view[start : start + size]
