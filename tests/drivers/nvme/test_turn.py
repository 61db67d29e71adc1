"""The lock of a SharedQueue: who is woken when, and that it can be taken again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vfiotool.drivers.nvme.turn import Turn

LONG_S = 30.0


class Waiters:
    """Threads that wait in a turn, each for its own flag."""

    def __init__(self, count: int) -> None:
        self.turn = Turn()
        self.flags = [False] * count
        self.back: list[int] = []
        self.changed = threading.Condition()
        self.threads = [threading.Thread(target=self.run, args=(n,)) for n in range(count)]
        for thread in self.threads:
            thread.start()
        self.until(lambda: self.turn.waiting == count)

    def run(self, number: int) -> None:
        with self.turn:
            self.turn.wait(lambda: self.flags[number], LONG_S)
        with self.changed:
            self.back.append(number)
            self.changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            while not condition():
                self.changed.wait(0.001)

    def join(self) -> None:
        with self.turn:
            self.turn.wake_all()
        for thread in self.threads:
            thread.join(LONG_S)
        assert sorted(self.back) == list(range(len(self.flags)))


def test_only_those_are_woken_whose_wait_is_over() -> None:
    waiters = Waiters(4)
    with waiters.turn:
        waiters.flags[2] = True
        waiters.turn.wake()
    waiters.until(lambda: bool(waiters.back))
    assert waiters.back == [2] and waiters.turn.waiting == 3
    waiters.join()


def test_one_is_woken_to_look_after_the_others() -> None:
    waiters = Waiters(3)
    with waiters.turn:
        waiters.turn.wake_one()
    waiters.until(lambda: bool(waiters.back))
    assert len(waiters.back) == 1 and waiters.turn.waiting == 2
    waiters.join()


def test_a_wait_ends_by_its_time_and_leaves_nothing() -> None:
    turn = Turn()
    with turn:
        turn.wait(lambda: False, 0.01)
        assert turn.waiting == 0
        turn.wake()
        turn.wake_one()


def enter_once(turn: Turn, seen: list[bool]) -> None:
    with turn:
        seen.append(turn.nested)


def test_who_has_it_may_take_it_again() -> None:
    turn = Turn()
    with turn:
        assert not turn.nested
        with turn:
            assert turn.nested
        assert not turn.nested
        with turn.left():
            inside = threading.Thread(target=enter_once, args=(turn, seen := []))
            inside.start()
            inside.join(LONG_S)
        assert seen == [False] and not turn.nested
    other = threading.Thread(target=enter_once, args=(turn, seen))
    other.start()
    other.join(LONG_S)
    assert seen == [False, False]
