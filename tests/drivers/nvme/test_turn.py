"""The lock of a SharedQueue: who is woken when, and that it can be taken again."""

from __future__ import annotations

import contextlib
import signal
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
        with self.turn.lock:
            self.turn.wait(lambda: self.flags[number], LONG_S)
        with self.changed:
            self.back.append(number)
            self.changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            while not condition():
                self.changed.wait(0.001)

    def join(self) -> None:
        with self.turn.lock:
            self.turn.wake_all()
        for thread in self.threads:
            thread.join(LONG_S)
        assert sorted(self.back) == list(range(len(self.flags)))


def test_only_those_are_woken_whose_wait_is_over() -> None:
    waiters = Waiters(4)
    with waiters.turn.lock:
        waiters.flags[2] = True
        waiters.turn.wake()
    waiters.until(lambda: bool(waiters.back))
    assert waiters.back == [2] and waiters.turn.waiting == 3
    waiters.join()


def test_one_is_woken_to_look_after_the_others() -> None:
    waiters = Waiters(3)
    with waiters.turn.lock:
        waiters.turn.wake_one()
    waiters.until(lambda: bool(waiters.back))
    assert len(waiters.back) == 1 and waiters.turn.waiting == 2
    waiters.join()


def test_nobody_else_is_woken_while_the_one_that_was_chosen_is_on_its_way() -> None:
    waiters = Waiters(3)
    with waiters.turn.lock:
        waiters.turn.wake_one()
        waiters.turn.wake_one()
        assert waiters.turn.waiting == 2
    waiters.until(lambda: len(waiters.back) == 1)
    with waiters.turn.lock:
        waiters.turn.wake_one()
    waiters.until(lambda: len(waiters.back) == 2)
    assert waiters.turn.waiting == 1
    waiters.join()


def test_a_wait_ends_by_its_time_and_leaves_nothing() -> None:
    turn = Turn()
    with turn.lock:
        turn.wait(lambda: False, 0.01)
        assert turn.waiting == 0
        turn.wake()
        turn.wake_one()


def is_free(turn: Turn) -> bool:
    """Whether another thread could have it now."""
    seen: list[bool] = []

    def try_it() -> None:
        seen.append(turn.lock.try_enter())
        if seen[0]:
            turn.lock.__exit__(None, None, None)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join(LONG_S)
    return seen == [True]


def test_it_is_let_go_of_but_where_it_is_kept() -> None:
    turn, seen = Turn(), []
    with turn.lock:
        turn.without(lambda: seen.append(is_free(turn)))
        assert not is_free(turn)
    with turn.kept(), turn.lock:
        turn.without(lambda: seen.append(is_free(turn)))
    assert seen == [True, False] and is_free(turn) and not turn.is_kept


def test_taken_twice_it_is_let_go_of_once() -> None:
    turn, seen = Turn(), []
    with turn.lock:
        with turn.lock:
            turn.without(lambda: seen.append(is_free(turn)))
        assert not is_free(turn)
    assert seen == [False] and is_free(turn)


def test_an_interrupt_at_any_moment_leaves_it_free() -> None:
    turn = Turn()

    def strike(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for delay in range(1, 500):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, delay * 1e-6)
                while True:
                    with turn.lock:
                        pass
            assert is_free(turn), delay
    finally:
        signal.signal(signal.SIGALRM, before)
