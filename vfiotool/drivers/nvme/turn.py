"""The lock of threads that share a queue pair: each waits for something of its own, and is woken
when that is there, not whenever anything has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock, get_ident

Over = Callable[[], bool]


class Turn:
    """`with turn:` has the lock; the thread that has it may take it again, as a reset does for its
    admin commands. Whoever changes what others may wait for calls `wake`."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._depth = 0
        # Of each thread that waits: what it waits for, and the lock that holds it up.
        self._waiting: dict[int, tuple[Over, Lock]] = {}

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        self._lock.release()

    @property
    def nested(self) -> bool:
        """Whether the thread that has the lock has it more than once: `left` does not let go."""
        return self._depth > 1

    @property
    def waiting(self) -> int:
        """How many wait and were not woken yet."""
        return len(self._waiting)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Without the lock, for the time of the block."""
        self._depth -= 1
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._depth += 1

    def wait(self, over: Over, timeout_s: float) -> None:
        """Let go of the lock until `over()` was seen by a `wake`, or one was `wake_one`'s choice,
        or `timeout_s` have passed; then have it again."""
        gate = Lock()
        gate.acquire()
        me = get_ident()
        self._waiting[me] = over, gate
        try:
            with self.left():
                gate.acquire(timeout=timeout_s)
        finally:
            self._waiting.pop(me, None)

    def wake(self) -> None:
        """Wake those whose wait is over."""
        for thread, (over, _) in list(self._waiting.items()):
            if over():
                self._open(thread)

    def wake_one(self) -> None:
        """Wake one more, who looks after the others from now on."""
        for thread in list(self._waiting)[:1]:
            self._open(thread)

    def wake_all(self) -> None:
        """Wake all, whatever they wait for."""
        for thread in list(self._waiting):
            self._open(thread)

    def _open(self, thread: int) -> None:
        _, gate = self._waiting.pop(thread)
        gate.release()
