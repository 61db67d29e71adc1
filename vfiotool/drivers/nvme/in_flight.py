"""Which command of a queue pair is whose: each ends by its own completion alone.

Every command gets a number of its own, which is its tag in C. What is sent is remembered until its
completion came: the caller's tag, the buffers that the device may reach (pinned so long), and how
to send it again. Completions of commands for which nobody waits any more (`late`) are put aside.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from threading import get_ident

from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.health import Health
from vfiotool.drivers.nvme.queue_pair import SLICE_S, Completion, QueuePair
from vfiotool.drivers.nvme.status import ABORTED_BY_HOST, failed_with
from vfiotool.drivers.nvme.turn import Turn
from vfiotool.errors import KernelError, UsageError, VfiotoolError
from vfiotool.native.library import SentCommand
from vfiotool.vfio import DmaBuffer, Interrupt

# Tags from here on are ours; what is sent through the QueuePair itself keeps to those below.
OURS = 1 << 63
# An interrupt is not waited for longer: one that was lost costs so much.
_NAP_S = 0.1
Send = Callable[[int], bool]
Ended = Callable[[Completion], object]


def completion_of(sent: SentCommand) -> Completion:
    """What a command that has ended was told."""
    return Completion(sent.tag, sent.status, sent.result, sent.latency_ns)


class InFlight:
    """The commands of one queue pair. For one thread at a time: `held` sees to that."""

    def __init__(self, pair: QueuePair, health: Health, interrupt: Interrupt | None = None) -> None:
        self.pair = pair
        self.health = health
        self.interrupt = interrupt
        # A SentCommand is one of a `call`, or one that the user polls for; `late` once nobody waits
        # for it any more. Its `ended` is told of its completion, whatever became of it.
        self.out: dict[int, SentCommand] = {}
        self.results: dict[int, SentCommand] = {}  # of calls, by number
        self.sent: dict[int, Completion] = {}  # of what the user sent and polls for
        self.aside: deque[Completion] = deque(maxlen=256)
        # The lock of many threads that share the queue, where they do (`SharedInFlight`).
        self.turn: Turn | None = None
        self.numbers = itertools.count(OURS)
        self._holder: dict[str, int] = {}
        # Who takes the queue over, and what others are told meanwhile.
        self._claim: tuple[int, VfiotoolError] | None = None

    @property
    def what(self) -> str:
        return f"queue {self.pair.rings.id} of {self.health.name}"

    def taken_by(self, owner: int) -> int:
        """Make the queue `owner`'s if it is nobody's; whose it is. One step, and safe against
        Ctrl-C: what a thread left behind it may take again."""
        return self._holder.setdefault("thread", owner)

    def left_by(self, owner: int) -> None:
        if self._holder.get("thread") == owner:
            self._holder.pop("thread", None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the time of a whole call the queue is this thread's. Raises UsageError, at once, if
        it is another's."""
        me = get_ident()
        # A thread that calls again and again must not keep out the one that takes the queue over.
        claim = self._claim
        if claim is not None and claim[0] != me:
            raise copy(claim[1])
        if self.taken_by(me) != me:
            claim = self._claim
            if claim is not None:
                raise copy(claim[1])
            raise UsageError(
                f"another thread is using {self.what}",
                hint="a queue for each thread, or one SharedQueue for all",
            )
        try:
            yield
        finally:
            self.left_by(me)

    @contextmanager
    def taken_over(self, deadline: Deadline, told: VfiotoolError) -> Iterator[None]:
        """For whoever stopped the queue pair: nobody else is at the commands meanwhile, who tries
        is `told`. Raises UsageError if the thread that was using them does not leave in time."""
        if self.turn is not None:
            with self.turn.kept():
                yield
                self.turn.wake_all()
            return
        me = get_ident()
        held_before = self._holder.get("thread") == me
        self._claim = (me, told)
        try:
            while self.taken_by(me) != me:
                if deadline.passed:
                    raise UsageError(f"another thread does not leave {self.what}")
                deadline.pause()
            yield
        finally:
            self._claim = None
            if not held_before:
                self.left_by(me)

    def start(
        self,
        send: Send,
        *,
        tag: int = 0,
        holds: Sequence[DmaBuffer] = (),
        call: bool = False,
        ended: Ended | None = None,
        place: int = -1,
    ) -> int:
        """Send a command: `send(number)` gives it to the queue pair. Its number, or 0 where the
        queue is full. The buffers in `holds` cannot be closed until it has ended."""
        self.health.refuse()
        if not 0 <= tag < OURS:
            raise UsageError(f"a tag is from 0 to {OURS - 1:#x}, not {tag:#x}")
        number = next(self.numbers)
        before = self.pair.submitted
        sent = self.out[number] = SentCommand(tag, send, holds, call, ended, place)
        taken = False
        try:
            sent.pin()
            taken = send(number)
        except UsageError:
            self.health.refuse()  # a reset in another thread says more than "closed"
            raise
        finally:
            # After Ctrl-C only the queue pair knows whether it was sent.
            if not taken and self.pair.submitted == before:
                self._forget(number)
        return number if taken else 0

    def _forget(self, number: int) -> None:
        try:
            self._forget_once(number)
        except BaseException:
            # Ctrl-C in between: what was left to do is done, nothing twice.
            self._forget_once(number)
            raise

    def _forget_once(self, number: int) -> None:
        sent = self.out.get(number)
        if sent is None:
            return
        sent.unpin()
        self.out.pop(number, None)

    def settle(self) -> None:
        """Give the completions that the queue pair has taken to whom they belong."""
        ready = self.pair.ready
        while ready:
            count = next(iter(ready))
            self._end(count, ready[count])
            ready.pop(count, None)

    def _end(self, count: int, done: Completion) -> None:
        sent = self.out.get(done.tag)
        if sent is not None:
            self._finish(done.tag, sent, count, done.status, done.result, done.latency_ns)
        elif done.tag < OURS:
            self.sent[count] = done

    def _finish(
        self, number: int, sent: SentCommand, count: int, status: int, result: int, latency_ns: int
    ) -> None:
        sent.end(status, result, latency_ns)
        if sent.late:
            self.aside.append(completion_of(sent))
        elif sent.ended is None:
            if sent.call:
                self.results[number] = sent
            else:
                self.sent[count] = completion_of(sent)
        if sent.ended is not None:
            sent.ended(completion_of(sent))
        self._forget(number)

    def look(self) -> None:
        """Take what has come, without waiting."""
        self.gather()
        self.settle()

    def gather(self, least: int = 0, timeout_s: float = 0.0, spin_ns: int = 0) -> int:
        """As `QueuePair.gather`; a queue that a reset in another thread stopped is told as that."""
        try:
            return self.pair.gather(least, timeout_s, spin_ns)
        except UsageError:
            self.health.refuse()  # says more than "closed"
            raise

    def wait(self, over: Callable[[], bool], deadline: Deadline, what: str) -> bool:
        """Until `over()` or the deadline: which of the two. Raises KernelError as soon as the
        controller is known not to answer, UsageError when it was closed."""
        self.look()
        while not over():
            self.health.watch(deadline, what)
            left = deadline.left()
            if left <= 0 or not self.pair.in_flight:
                return over()
            self._sleep(left)
        return True

    def _sleep(self, left: float) -> None:
        if self.interrupt is None:
            self.gather(1, min(left, SLICE_S))
        else:
            self.interrupt.wait(min(left, _NAP_S))
            self.gather()
        self.settle()

    def result(self, number: int, deadline: Deadline, what: str) -> Completion:
        """The completion of a call's command. Raises KernelError (ETIMEDOUT) when it did not come;
        if it comes later it is put aside."""
        try:
            if self.wait(lambda: number in self.results, deadline, what):
                return completion_of(self.results.pop(number))
            raise self.timed_out(what, deadline)
        finally:
            self.give_up(number)

    def timed_out(self, what: str, deadline: Deadline) -> KernelError:
        return self.health.timed_out(what, deadline, self.pair.counters().strays)

    def give_up(self, number: int) -> None:
        """Nobody waits for `number` any more."""
        if (sent := self.out.get(number)) is not None:
            sent.late = True
        # Another thread may have ended it just now.
        if (done := self.results.pop(number, None)) is not None:
            self.aside.append(completion_of(done))

    def call(
        self, send: Send, deadline: Deadline, what: str, holds: Sequence[DmaBuffer] = ()
    ) -> Completion:
        """Send a command as soon as there is room, and wait for its own completion. Raises
        KernelError if the controller fails it or does not answer."""
        number = 0
        while not number:
            self.room(deadline, what)
            number = self.start(send, holds=holds, call=True)
        done = self.result(number, deadline, what)
        if done.status:
            raise failed_with(done.status, what)
        return done

    def room(self, deadline: Deadline, what: str) -> None:
        """Wait until another command fits the queue."""
        if self.pair.in_flight < self.pair.depth:
            return
        if not self.wait(lambda: self.pair.in_flight < self.pair.depth, deadline, what):
            raise self.timed_out(what, deadline)

    @property
    def calls_out(self) -> int:
        """InFlight out that no `poll` of the user's will tell."""
        return sum(sent.call or sent.late for sent in self.out.values())

    def after_reset(self, *, resubmit: bool) -> None:
        """The controller was reset and the queue pair is empty again: each command that was out is
        sent again in its order, with `resubmit`, or else ends with the status "aborted by the
        host"."""
        for number, sent in list(self.out.items()):
            if resubmit and not sent.late and sent.send(number):
                continue
            self._finish(number, sent, next(self.numbers), ABORTED_BY_HOST, 0, 0)

    def identifier(self, tag: int) -> int:
        """The command identifier of what was sent with the caller's `tag`. Raises UsageError where
        no such command is out."""
        for number, sent in self.out.items():
            if sent.tag == tag and not sent.call:
                return self.pair.identifier(number)
        raise UsageError(f"no command with tag {tag} is out on {self.what}")

    def uses(self, buffer: DmaBuffer) -> bool:
        """Whether a command that is out may reach `buffer`."""
        return any(held is buffer for sent in self.out.values() for held in sent.holds)

    def drop(self) -> None:
        """The controller cannot reach memory any more: let go of all buffers."""
        for number in list(self.out):
            self._forget(number)
