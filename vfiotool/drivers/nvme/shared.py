"""One queue pair for many threads.

    with SharedQueue(queue) as shared:
        ... in any thread: shared.read(disk, 0, 8, buffer); shared.flush(disk)

Whoever waits looks for everybody: one thread at a time takes completions and wakes the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, Self

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.identify import Namespace
from vfiotool.drivers.nvme.in_flight import Ended, InFlight, Send, completion_of
from vfiotool.drivers.nvme.io import IO_TIMEOUT_S, IoQueue
from vfiotool.drivers.nvme.queue_pair import Completion
from vfiotool.drivers.nvme.status import failed_with
from vfiotool.drivers.nvme.turn import Turn
from vfiotool.errors import UsageError
from vfiotool.native.library import PinCount, SentCommand, SharedCalls
from vfiotool.vfio import DmaBuffer

# Looks without a result after which they come with a pause.
_EAGER = 2000
_PAUSE_S = 5e-5
_FOLLOWER_S = 0.05
_YIELD, _REST = partial(time.sleep, 0), partial(time.sleep, _PAUSE_S)
# What comes so soon is waited for without letting another thread run: to change threads twice costs
# as much. After looks in vain such waits are left out, each time twice as many.
_SPIN_NS = 20_000
_LEFT_OUT_MAX = 64
# C waits for less than that (WAIT_NS of cext/python/shared_type.c).
_MOMENT_S = 0.01


class SharedInFlight:
    """The commands of a queue pair, for threads side by side."""

    def __init__(self, commands: InFlight) -> None:
        self.commands = commands
        self._turn = Turn()
        self._leading = False
        self._closed = False
        self._left_out = self._leave_out = 0
        commands.turn = self._turn
        # What takes no wait is one call of C, without the lock: see cext/python/shared_type.c.
        self._calls = SharedCalls(
            commands.pair.calls, self._turn.lock, SentCommand, PinCount, Completion,
            commands.out, commands.results, self._turn.waits, commands.numbers, commands.health,
            self._tell,
        )  # fmt: skip
        self.begin, self._ended = self._calls.begin, self._calls.end

    def call(
        self,
        send: Send,
        deadline: Deadline,
        what: str,
        holds: Sequence[DmaBuffer] = (),
    ) -> Completion:
        """As `InFlight.call`, from any thread."""
        number = self.begin(send, holds) or self.start(send, deadline, what, holds)
        done = self.ended(number, deadline) or self.result(number, deadline, what)
        if done.status:
            raise failed_with(done.status, what)
        return done

    def start(
        self, send: Send, deadline: Deadline, what: str, holds: Sequence[DmaBuffer] = ()
    ) -> int:
        """Send a command as soon as there is room; its number, for `result`."""
        pair = self.commands.pair
        self.commands.health.refuse_child()
        with self._turn.lock:
            while True:
                self._refuse_closed()
                if not self._until(lambda: pair.in_flight < pair.depth, deadline, what):
                    raise self.commands.timed_out(what, deadline)
                if number := self.commands.start(send, holds=holds, call=True):
                    return number

    def ended(self, number: int, deadline: Deadline | None) -> Completion | None:
        """The completion of command `number` if it comes within a moment."""
        waits = deadline is None or deadline.timeout_s > _MOMENT_S
        try:
            return self._ended(number, waits and self.commands.interrupt is None)
        except BaseException:
            self.commands.give_up(number)
            raise

    def _tell(self) -> None:
        """Take what C leaves of what has come; wake who waits for what C took."""
        with self._turn.lock:
            self._take()
            self._turn.wake()

    def result(self, number: int, deadline: Deadline, what: str) -> Completion:
        """The completion of command `number`. Raises KernelError when it did not come in time;
        if it comes later it is put aside. UsageError where no such command is out (any more)."""
        out, results = self.commands.out, self.commands.results
        self.commands.health.refuse_child()
        try:
            with self._turn.lock:
                if self._until(lambda: number in results or number not in out, deadline, what):
                    if (sent := results.pop(number, None)) is None:
                        self._refuse_unknown(number)
                    else:
                        return completion_of(sent)
            raise self.commands.timed_out(what, deadline)
        finally:
            self.commands.give_up(number)

    def _refuse_unknown(self, number: int) -> NoReturn:
        self._refuse_closed()
        self.commands.health.refuse()
        self._take()  # raises where the queue was closed: that says more
        raise UsageError(
            f"no command {number} is out on {self.commands.what}",
            hint="each is waited for once, by one thread",
        )

    def close(self) -> None:
        """Who waits is told (UsageError), and nobody is at the commands when this returns. Nothing
        in a child process."""
        if self.commands.health.in_child:
            return
        with self._turn.lock:
            self._closed = True
            self._calls.shut()
            self.commands.turn = None
            self._turn.wake_all()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError(f"the SharedQueue of {self.commands.what} is closed")

    def send(self, send: Send, ended: Ended) -> None:
        """Send a command for which nobody waits; `ended` gets its completion."""
        self.commands.health.refuse_child()
        with self._turn.lock:
            if not self.commands.start(send, call=True, ended=ended):
                raise UsageError(f"{self.commands.what} is full")

    def look(self) -> None:
        """Take what has come, without waiting."""
        self.commands.health.refuse_child()
        with self._turn.lock:
            self._take()

    def _until(self, over: Callable[[], bool], deadline: Deadline, what: str) -> bool:
        try:
            while not over():
                self._refuse_closed()
                # Whoever has the lock looks, also while another thread waits for all.
                if self._take() or self._spin(over):
                    continue
                self.commands.health.watch(deadline, what)
                if deadline.passed:
                    return False
                if self._leading and not self._turn.is_kept:
                    self._turn.wait(over, min(deadline.left(), _FOLLOWER_S))
                else:
                    self._lead(over, deadline, what)
            return True
        finally:
            # Also who was chosen to look for the others, and need not wait any more.
            if not self._leading:
                self._turn.wake_one()

    def _spin(self, over: Callable[[], bool]) -> bool:
        """Look for a moment, without pause: whether that ended the wait."""
        if self.commands.interrupt is not None:
            return False
        if self._left_out < self._leave_out:
            self._left_out += 1
            return False
        left = _SPIN_NS
        end = time.monotonic_ns() + left
        while left > 0:
            if self._take(left) and over():
                self._left_out = self._leave_out = 0
                return True
            left = end - time.monotonic_ns()
        self._left_out, self._leave_out = 0, min(2 * self._leave_out + 1, _LEFT_OUT_MAX)
        return False

    def _take(self, spin_ns: int = 0) -> int:
        """Take what has come, for everybody."""
        taken = self.commands.gather(spin_ns=spin_ns)
        self.commands.settle()
        if taken:
            self._turn.wake()
        return taken

    def _lead(self, over: Callable[[], bool], deadline: Deadline, what: str) -> None:
        before, self._leading = self._leading, True
        try:
            self._watch(over, deadline, what)
        finally:
            self._leading = before

    def _watch(self, over: Callable[[], bool], deadline: Deadline, what: str) -> None:
        commands = self.commands
        looks = 0
        while not over() and not deadline.passed:
            self._refuse_closed()
            if self._take():
                looks = 0
                continue
            commands.health.watch(deadline, what)
            looks += 1
            if (interrupt := commands.interrupt) is not None:
                self._turn.without(partial(interrupt.wait, min(deadline.left(), _FOLLOWER_S)))
            else:
                self._turn.without(_YIELD if looks < _EAGER else _REST)


class SharedQueue:
    """`queue` for many threads, until it is closed; meanwhile the queue itself refuses calls.

    `read`, `write` and `flush` wait for the end of their own command, and take a DMA buffer that
    cannot be closed meanwhile. `begin` and `end` are the halves: a thread can keep several out.
    """

    def __init__(self, queue: IoQueue) -> None:
        queue.refuse_closed()
        self.queue = queue
        self._owner = -id(self)
        if queue.commands.taken_by(self._owner) != self._owner:
            raise UsageError(f"another thread is using {queue.commands.what}")
        self._shared = SharedInFlight(queue.commands)

    def begin(
        self,
        opcode: int,
        disk: Namespace,
        lba: int = 0,
        blocks: int = 0,
        buffer: DmaBuffer | None = None,
        offset: int = 0,
        *,
        control: int = 0,
        timeout_s: float | None = IO_TIMEOUT_S,
    ) -> int:
        """Send a command as `IoQueue.send`, waiting for room; the number for `end`."""
        send = self.queue.sender(opcode, disk, lba, blocks, buffer, offset, control)
        holds = () if buffer is None else (buffer,)
        deadline = None if timeout_s is IO_TIMEOUT_S else Deadline(timeout_s)
        if number := self._shared.begin(send, holds):
            return number
        what = f"opcode {opcode:#x}"
        return self._shared.start(send, deadline or Deadline(timeout_s), what, holds)

    def end(self, number: int, timeout_s: float | None = IO_TIMEOUT_S) -> Completion:
        """Wait for the command that `begin` sent, once. Raises KernelError with the controller's
        words if it failed, and ETIMEDOUT; UsageError where no such command is out."""
        deadline = None if timeout_s is IO_TIMEOUT_S else Deadline(timeout_s)
        done = self._shared.ended(number, deadline)
        if done is None:
            done = self._shared.result(number, deadline or Deadline(timeout_s), "a command")
        if done.status:
            raise failed_with(done.status, "a command")
        return done

    def read(
        self,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer,
        offset: int = 0,
        *,
        timeout_s: float | None = IO_TIMEOUT_S,
    ) -> Completion:
        """Read `blocks` blocks into `buffer` from `offset` on."""
        return self._run(nvme_spec.READ, disk, lba, blocks, buffer, offset, timeout_s)

    def write(
        self,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer,
        offset: int = 0,
        *,
        timeout_s: float | None = IO_TIMEOUT_S,
    ) -> Completion:
        """Write `blocks` blocks out of `buffer` from `offset` on."""
        return self._run(nvme_spec.WRITE, disk, lba, blocks, buffer, offset, timeout_s)

    def flush(self, disk: Namespace, *, timeout_s: float | None = IO_TIMEOUT_S) -> Completion:
        """Until all writes that had ended when this was called are on stable media."""
        return self._run(nvme_spec.FLUSH, disk, 0, 0, None, 0, timeout_s)

    def _run(
        self,
        opcode: int,
        disk: Namespace,
        lba: int,
        blocks: int,
        buffer: DmaBuffer | None,
        offset: int,
        timeout_s: float | None,
    ) -> Completion:
        send = self.queue.sender(opcode, disk, lba, blocks, buffer, offset, 0)
        what = f"opcode {opcode:#x} on blocks {lba} and on"
        holds = () if buffer is None else (buffer,)
        return self._shared.call(send, Deadline(timeout_s), what, holds)

    def close(self) -> None:
        """Give the queue back to one thread; who still waits is told. Closing twice is nothing."""
        self._shared.close()
        self.queue.commands.left_by(self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
