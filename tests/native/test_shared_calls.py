"""Commands of a shared queue pair in one call each: what is done at once, what is left alone."""

from __future__ import annotations

import itertools
import mmap
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from vfiotool.native.library import (
    PinCount,
    QueueCommand,
    SentCommand,
    SharedCalls,
    TurnLock,
    ffi,
    lib,
    queue_calls,
)

OURS = 1 << 63
ENTRIES = 4


class Told(NamedTuple):
    tag: int
    status: int
    result: int
    latency_ns: int


class Refused(Exception):
    """What a command's `check` raises."""


def refuse(result: int) -> object:
    raise Refused(result)


def strike() -> None:
    """What tells, and is interrupted (Ctrl-C)."""
    raise KeyboardInterrupt


class Memory(PinCount):
    def __init__(self) -> None:
        self.released = 0

    def close(self) -> None:
        self._shut()

    def _refuse_pin(self) -> None:
        raise Refused("closed")

    def _unpinned(self) -> None:
        self.released += 1


class Rig:
    """A queue pair over plain memory, its commands and its controller."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 3 * 4096)
        start = int(ffi.cast("uintptr_t", ffi.from_buffer(self.memory)))
        layout, made = ffi.new("struct vt_nvme_layout *"), ffi.new("struct vt_nvme_queue **")
        layout.submission, layout.completion = start, start + 4096
        layout.tail_doorbell, layout.head_doorbell = start + 8192, start + 8196
        layout.sq_entries = layout.cq_entries = ENTRIES
        layout.page_size, layout.id = 4096, 1
        assert lib.vt_nvme_new(layout, made) == 0
        self.queue = ffi.gc(made[0], lib.vt_nvme_free)
        done = ffi.new("struct vt_nvme_done[]", ENTRIES - 1)
        self.held = ffi.new("uint32_t *")
        self.calls = queue_calls(self.queue, done, ENTRIES - 1, self.held)
        self.out: dict[int, SentCommand] = {}
        self.results: dict[int, SentCommand] = {}
        self.waiting: dict[int, object] = {}
        self.lock, self.health = TurnLock(), SimpleNamespace(closed=False, failure=None)
        self.tells = self.answers = 0
        self.numbers = itertools.count(OURS)
        self.shared = self.calls_that_tell(self.tell)
        self.buffer = Memory()

    def calls_that_tell(self, tell: Callable[[], object]) -> SharedCalls[Told]:
        """The commands of this queue pair, where `tell` is who is told."""
        return SharedCalls(
            self.calls, self.lock, SentCommand, PinCount, Told, self.out, self.results,
            self.waiting, self.numbers, self.health, tell,
        )  # fmt: skip

    def tell(self) -> None:
        self.tells += 1
        self.waiting.clear()

    def command(self, lba: int = 0, iova: int = 0x10000) -> QueueCommand:
        return QueueCommand(self.calls, refuse, 2, 1, lba, 8, iova, 4096, 0)

    def begin(self, lba: int = 0) -> int:
        return self.shared.begin(self.command(lba), (self.buffer,))

    def answer(self, place: int, status: int = 0, result: int = 0) -> None:
        """End the command in a place of the submission queue."""
        at = 4096 + 16 * (self.answers % ENTRIES)
        phase = 1 - self.answers // ENTRIES % 2
        identifier = self.memory[64 * place + 2 : 64 * place + 4]
        self.memory[at : at + 4] = struct.pack("<I", result)
        self.memory[at + 8 : at + 12] = struct.pack("<HH", 0, 1)
        self.memory[at + 12 : at + 16] = identifier + struct.pack("<H", status << 1 | phase)
        self.answers += 1


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    for sent in made.out.values():
        sent.unpin()
    assert made.buffer.pins == 0


def test_each_gets_its_own_completion_once_and_the_buffer_is_free_then(rig: Rig) -> None:
    numbers = [rig.begin(lba) for lba in range(3)]
    assert numbers == [OURS, OURS + 1, OURS + 2] and rig.buffer.pins == 3
    assert list(rig.out) == numbers and rig.shared.end(numbers[0]) is None
    rig.answer(2, status=0x4281, result=7)
    rig.answer(0)
    found = rig.shared.end(numbers[2])
    assert isinstance(found, Told) and found[:3] == (0, 0x4281, 7) and found.latency_ns > 0
    assert rig.buffer.pins == 1 and list(rig.results) == numbers[:1]
    assert rig.shared.end(numbers[2]) is None
    told = rig.shared.end(numbers[0])
    assert told is not None and told.status == 0
    assert rig.results == {} and list(rig.out) == numbers[1:2] and rig.tells == 0


def test_room_is_looked_for_before_a_full_queue_is_left_to_others(rig: Rig) -> None:
    numbers = [rig.begin() for _ in range(3)]
    assert rig.begin() == 0 and rig.buffer.pins == 3 and list(rig.out) == numbers
    rig.answer(1)
    fourth = rig.begin()
    assert fourth > numbers[2] and list(rig.results) == [numbers[1]]
    assert rig.tells == 0


def test_who_waits_is_told_when_something_has_come(rig: Rig) -> None:
    number = rig.begin()
    rig.waiting[1] = object()
    assert rig.begin() and rig.tells == 0  # nothing has come
    rig.answer(0)
    assert rig.begin() and rig.tells == 1
    assert list(rig.results) == [number]
    rig.waiting[1] = object()
    rig.answer(1)
    assert rig.shared.end(number + 1) is not None and rig.tells == 2


def test_what_is_not_plain_is_left_where_it_lies(rig: Rig) -> None:
    numbers = [rig.begin() for _ in range(3)]
    rig.out[numbers[1]].late = True
    for place in range(3):
        rig.answer(place)
    assert rig.shared.end(numbers[2]) is None and rig.tells == 1
    assert list(rig.results) == numbers[:1] and rig.held[0] == 2
    assert rig.shared.end(numbers[0]) is not None


def test_nothing_is_sent_or_looked_for_while_another_has_the_lock(rig: Rig) -> None:
    number = rig.begin()
    rig.answer(0)
    with rig.lock:
        assert rig.begin() == 0 and rig.shared.end(number) is None
    assert rig.shared.end(number) is not None


def test_nothing_is_sent_once_it_is_shut_or_the_controller_does_not_work(rig: Rig) -> None:
    rig.health.failure = "it is being reset"
    assert rig.begin() == 0
    rig.health.failure, rig.health.closed = None, True
    assert rig.begin() == 0
    rig.health.closed = False
    number = rig.begin()
    assert number
    rig.answer(0)
    rig.shared.shut()
    assert rig.begin() == 0 and rig.shared.end(number) is None and list(rig.out) == [number]


def test_what_cannot_be_sent_is_refused_by_the_other_way(rig: Rig) -> None:
    wrong = rig.command(iova=0x10002)
    assert rig.shared.begin(wrong, (rig.buffer,)) == 0 and rig.out == {}
    with pytest.raises(Refused, match="-22"):
        wrong(5)
    assert rig.shared.begin(rig.command(), [rig.buffer]) == 0
    assert rig.shared.begin(rig.command(), (object(),)) == 0
    assert rig.shared.begin(lambda tag: True, ()) == 0
    other = Rig()
    assert rig.shared.begin(other.command(), ()) == 0
    closed = Memory()
    closed.close()
    assert rig.shared.begin(rig.command(), (closed,)) == 0 and closed.pins == 0
    assert rig.out == {} and rig.command()(7) is True


def test_a_buffer_that_was_closed_meanwhile_is_let_go_of_by_python(rig: Rig) -> None:
    memory = Memory()
    number = rig.shared.begin(rig.command(), (memory,))
    memory.close()
    with pytest.raises(Refused, match="closed"):
        memory.pin()
    rig.answer(0)
    assert rig.shared.end(number) is None and rig.tells == 1 and memory.pins == 1
    rig.out.pop(number).unpin()
    assert (memory.pins, memory.released) == (0, 1)
    with pytest.raises(RuntimeError, match="not pinned"):
        memory.unpin()


def test_what_is_still_pinned_is_not_told_before_it_is_let_go_of(rig: Rig) -> None:
    sent = SentCommand(0, rig.command(), (rig.buffer,), True, None, -1)
    sent.pin()
    rig.results[5] = sent
    assert rig.shared.end(5) is None and list(rig.results) == [5]
    sent.unpin()
    assert rig.shared.end(5) == (0, 0, 0, 0)


def test_pins_that_fail_are_counted_as_far_as_they_went() -> None:
    good, closed = Memory(), Memory()
    closed.close()
    sent = SentCommand(0, bool, (good, closed), True, None, -1)
    with pytest.raises(Refused):
        sent.pin()
    assert (sent.pinned, good.pins) == (1, 1)
    sent.unpin()
    assert (sent.pinned, good.pins) == (0, 0)


def test_an_error_of_who_tells_loses_no_completion(rig: Rig) -> None:
    number = rig.begin()
    rig.waiting[1] = 0

    shared = rig.calls_that_tell(strike)
    rig.answer(0)
    with pytest.raises(KeyboardInterrupt):
        shared.end(number)
    assert shared.end(number) is not None and rig.buffer.pins == 0


def test_nothing_is_kept_of_what_has_ended(rig: Rig) -> None:
    command, holds = rig.command(), (rig.buffer,)
    before = [sys.getrefcount(one) for one in (command, holds, rig.buffer)]
    for turn in range(50):
        number = rig.shared.begin(command, holds)
        assert number and rig.begin() and rig.begin()
        for place in range(3):
            rig.answer((3 * turn + place) % ENTRIES)
        for place in range(3):
            assert rig.shared.end(number + place) is not None
    assert rig.begin() and rig.shared.begin(command, holds) and rig.begin() and not rig.begin()
    for number in list(rig.out):
        rig.out.pop(number).unpin()
    assert [sys.getrefcount(one) for one in (command, holds, rig.buffer)] == before


def test_threads_that_change_as_often_as_can_be_get_what_is_theirs(rig: Rig) -> None:
    """The interpreter's lock is all that there is between them."""
    answering, wrong, rounds = threading.Lock(), [], 300  # type: ignore[var-annotated]
    interval = sys.getswitchinterval()

    def work(mine: int) -> None:
        memory = Memory()
        for turn in range(rounds):
            number = 0
            while not number:
                with answering:  # the controller: who sends is answered before another sends
                    number = rig.shared.begin(rig.command(turn), (memory,))
                    if number:
                        rig.answer((rig.answers) % ENTRIES, result=mine)
            found = None
            while found is None:
                found = rig.shared.end(number)
            if found.result != mine or memory.pins:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == [] and rig.out == {} == rig.results


def ended_by_threads(
    rig: Rig, numbers: list[int]
) -> tuple[dict[int, Told], list[threading.Thread]]:
    """What threads that began to wait got: filled as they get it."""
    found: dict[int, Told] = {}

    def wait(number: int) -> None:
        while (told := rig.shared.end(number, True)) is None:
            if not rig.out:
                return
        found[number] = told

    threads = [threading.Thread(target=wait, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    return found, threads


def test_a_short_wait_is_for_what_comes_meanwhile(rig: Rig) -> None:
    numbers = [rig.begin() for _ in range(3)]
    assert rig.shared.end(numbers[0], False) is None
    assert rig.shared.end(numbers[0], True) is None  # nothing comes: it ends all the same
    found, threads = ended_by_threads(rig, numbers)
    for place in (2, 0, 1):
        rig.answer(place, result=place + 1)
    for thread in threads:
        thread.join(20)
    assert [found[number].result for number in numbers] == [1, 2, 3]
    assert rig.out == {} == rig.results and rig.buffer.pins == 0


def test_who_waits_leaves_when_it_is_shut_or_another_takes_the_lock(rig: Rig) -> None:
    numbers = [rig.begin() for _ in range(3)]
    with rig.lock:
        assert rig.shared.end(numbers[0], True) is None
    found, threads = ended_by_threads(rig, numbers)
    rig.shared.shut()
    assert rig.shared.end(numbers[0], True) is None
    for number in numbers:
        rig.out.pop(number).unpin()
    for thread in threads:
        thread.join(20)
    assert found == {} and not any(thread.is_alive() for thread in threads)


def test_who_waits_looks_no_more_once_another_has_the_lock(rig: Rig) -> None:
    """A reset, say, or the thread that has the queue pair next: what has come is for them."""
    number, calls, found = rig.begin(), [], []  # type: ignore[var-annotated]

    def wait() -> None:
        while not found:
            calls.append(told := rig.shared.end(number, True))
            if told is not None:
                found.append(told)

    thread = threading.Thread(target=wait)
    thread.start()
    for _ in range(20):
        before = len(calls)
        while len(calls) < before + 2:
            time.sleep(0)  # so that the thread waits in C again
        with rig.lock:
            if rig.answers == 0:
                rig.answer(0, result=7)
            before = len(calls)
            while len(calls) < before + 2 and not found:
                time.sleep(0)
            if found or number not in rig.out:
                break
            rig.memory[4096:4112] = bytes(16)
            rig.answers = 0
    was_taken = bool(found or rig.results)
    if not was_taken:
        rig.answer(0, result=7)
    thread.join(20)
    assert [told.result for told in found] == [7] and not was_taken


def test_an_error_of_who_tells_comes_to_who_waits_and_leaves_the_others_waiting(rig: Rig) -> None:
    numbers = [rig.begin() for _ in range(2)]
    rig.out[numbers[1]].late = True  # left to Python, which is told

    shared = rig.calls_that_tell(strike)
    rig.answer(1)
    with pytest.raises(KeyboardInterrupt):
        shared.end(numbers[0], True)
    rig.answer(0)
    rig.held[0] = 0  # as Python takes it
    assert shared.end(numbers[0], True) is not None


def test_threads_that_wait_in_turn_get_what_is_theirs(rig: Rig) -> None:
    """A controller in a thread of its own; each waits for its own, and none for ever."""
    sending, left, over = threading.Lock(), deque[tuple[int, int]](), threading.Event()
    wrong, rounds, slow = [], 200, []  # type: ignore[var-annotated]

    def controller() -> None:
        while not over.is_set():
            with sending:
                if left:
                    place, mine = left.popleft()
                    rig.answer(place, result=mine)

    def work(mine: int) -> None:
        memory = Memory()
        for turn in range(rounds):
            number = 0
            while not number:
                with sending:
                    number = rig.shared.begin(rig.command(turn), (memory,))
                    if number:
                        left.append(((number - OURS) % ENTRIES, mine))
            while (found := rig.shared.end(number, True)) is None:
                slow.append(number)
            if found.result != mine or memory.pins:
                wrong.append(found)

    plays = threading.Thread(target=controller)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in (plays, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    over.set()
    plays.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == [] and rig.out == {} == rig.results


def test_arguments_that_are_none_of_it_are_refused(rig: Rig) -> None:
    for wrong in ((), (rig.command(),), (rig.command(), (), 1)):
        with pytest.raises(TypeError):
            rig.shared.begin(*wrong)  # type: ignore[arg-type]
    for wrong in ((), (1, True, 2)):
        with pytest.raises(TypeError):
            rig.shared.end(*wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        SharedCalls()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        rig.shared.__init__()  # type: ignore[misc]
    with pytest.raises(TypeError):
        QueueCommand(rig.lock, refuse, 2, 1, 0, 8, 0, 0, 0)  # type: ignore[arg-type]
    for place, bits in enumerate((8, 32, 64, 32, 64, 32, 16)):
        words = [0] * 7
        for words[place] in (-1, 1 << bits):
            with pytest.raises(OverflowError):
                QueueCommand(rig.calls, refuse, *words)
