"""The lock of threads that share a queue pair: each waits for something of its own, and is woken
when that is there, not whenever anything has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock, get_ident

Over = Callable[[], bool]


class Turn:
    """`with turn.lock:` has the lock. Whoever changes what others may wait for calls `wake`.

    The lock is taken and left by C alone: an interrupt (Ctrl-C) comes before or after. With methods
    in Python it could come between, and nobody would have the lock ever again.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.is_kept = False
        # Of each thread that waits: what it waits for, and the lock that holds it up.
        self._waiting: dict[int, tuple[Over, Lock]] = {}

    @property
    def waiting(self) -> int:
        """How many wait and were not woken yet."""
        return len(self._waiting)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """With the lock for the whole block, in which `without` does not let go of it: a reset
        sends its admin commands so, which take the lock again."""
        with self.lock:
            before, self.is_kept = self.is_kept, True
            try:
                yield
            finally:
                self.is_kept = before

    def without(self, act: Callable[[], object]) -> None:
        """`act()` with the lock let go of once; this thread has it again afterwards."""
        if self.is_kept:
            act()
            return
        try:
            self.lock.release()
            act()
        finally:
            # As threading.Condition takes its lock back: no signal ends this early.
            if self.lock._is_owned():  # type: ignore[attr-defined]
                self.lock.acquire()
            else:
                self.lock._acquire_restore((1, get_ident()))  # type: ignore[attr-defined]

    def wait(self, over: Over, timeout_s: float) -> None:
        """Let go of the lock until `over()` was seen by a `wake`, or one was `wake_one`'s choice,
        or `timeout_s` have passed; then have it again."""
        gate = Lock()
        gate.acquire()
        me = get_ident()
        self._waiting[me] = over, gate
        try:
            self.without(lambda: gate.acquire(timeout=timeout_s))
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
