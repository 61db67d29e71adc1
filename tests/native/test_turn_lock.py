"""The lock of a shared queue: who has it, and that everybody gets it."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import pytest

from vfiotool.native.library import TurnLock

LONG_S = 30.0


def tried(lock: TurnLock) -> bool:
    """Whether another thread could have it now."""
    seen: list[bool] = []

    def try_it() -> None:
        seen.append(lock.try_enter())
        if seen[0]:
            lock.__exit__(None, None, None)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join(LONG_S)
    return seen == [True]


def test_a_thread_can_take_it_several_times_and_keeps_others_out() -> None:
    lock = TurnLock()
    with lock:
        with lock:
            assert lock.try_enter() and not tried(lock)
            lock.__exit__(None, None, None)
            assert not tried(lock)
        assert not tried(lock)
    assert tried(lock)


def test_who_has_not_got_it_cannot_let_go_of_it() -> None:
    lock = TurnLock()
    for call in (lambda: lock.__exit__(None, None, None), lambda: lock.without(list)):
        with pytest.raises(RuntimeError, match="not this thread's"):
            call()
    with lock:
        told: list[str] = []

        def leave() -> None:
            try:
                lock.__exit__(None, None, None)
            except RuntimeError as error:
                told.append(str(error))

        thread = threading.Thread(target=leave)
        thread.start()
        thread.join(LONG_S)
        assert told == ["the lock is not this thread's"] and not tried(lock)


def test_without_it_something_is_called_and_then_it_is_back() -> None:
    lock = TurnLock()
    with lock:
        assert lock.without(lambda: tried(lock)) is True
        assert not tried(lock)
        with pytest.raises(ZeroDivisionError):
            lock.without(lambda: 1 // 0)
        assert not tried(lock)
        with lock:
            assert lock.without(lambda: tried(lock)) is False
    assert tried(lock)


def test_two_threads_are_never_inside_and_none_is_left_out() -> None:
    lock, inside, wrong = TurnLock(), [0], 0
    rounds, threads = 300, 8
    done = [0] * threads

    def work(number: int) -> None:
        nonlocal wrong
        for _ in range(rounds):
            with lock:
                inside[0] += 1
                for _ in range(50):  # where the interpreter may change threads
                    wrong += inside[0] != 1
                inside[0] -= 1
                done[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LONG_S)
    assert wrong == 0 and done == [rounds] * threads


def test_a_thread_that_takes_it_again_at_once_lets_another_in() -> None:
    lock, over = TurnLock(), threading.Event()

    def hog() -> None:
        while not over.is_set():
            with lock:
                end = time.perf_counter() + 1e-3
                while time.perf_counter() < end:
                    pass

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        for _ in range(20):
            begun = time.monotonic()
            with lock:
                pass
            assert time.monotonic() - begun < LONG_S
    finally:
        over.set()
        thread.join(LONG_S)


def test_a_signal_ends_the_wait_for_it() -> None:
    class Struck(Exception):
        pass

    def strike(number: int, frame: FrameType | None) -> None:
        raise Struck

    lock, has_it, over = TurnLock(), threading.Event(), threading.Event()

    def keep() -> None:
        with lock:
            has_it.set()
            over.wait(LONG_S)

    thread = threading.Thread(target=keep)
    before = signal.signal(signal.SIGALRM, strike)
    thread.start()
    try:
        assert has_it.wait(LONG_S)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Struck), lock:
            pytest.fail("another thread has it")
    finally:
        over.set()
        thread.join(LONG_S)
        signal.signal(signal.SIGALRM, before)
    assert tried(lock)
