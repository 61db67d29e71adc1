"""The lock of threads that share a queue pair: each waits for something of its own, and is woken
when that is there, not whenever anything has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident

from vfiotool.native.library import TurnLock

Over = Callable[[], bool]


class Turn:
    """`with turn.lock:` has the lock. Whoever changes what others may wait for calls `wake`.

    The lock is taken and left by C alone: an interrupt (Ctrl-C) comes before or after. With methods
    in Python it could come between, and nobody would have the lock ever again.
    """

    def __init__(self) -> None:
        self.lock = TurnLock()
        self.is_kept = False
        # Of each thread that waits: what it waits for, and the lock that holds it up.
        self.waits: dict[int, tuple[Over, Lock]] = {}
        # `wake_one`'s choice, until it has the lock.
        self._chosen: int | None = None

    @property
    def waiting(self) -> int:
        """How many wait and were not woken yet."""
        return len(self.waits)

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
        self.lock.without(act)

    def wait(self, over: Over, timeout_s: float) -> None:
        """Let go of the lock until `over()` was seen by a `wake`, or one was `wake_one`'s choice,
        or `timeout_s` have passed; then have it again."""
        gate = Lock()
        gate.acquire()
        me = get_ident()
        self.waits[me] = over, gate
        try:
            self.without(lambda: gate.acquire(timeout=timeout_s))
        finally:
            self.waits.pop(me, None)
            if self._chosen == me:
                self._chosen = None

    def wake(self) -> None:
        """Wake those whose wait is over."""
        for thread, (over, _) in list(self.waits.items()):
            if over():
                self._open(thread)

    def wake_one(self) -> None:
        """Wake one more, who looks after the others from now on; nobody while one that was chosen
        is on its way."""
        if self._chosen is None:
            for thread in list(self.waits)[:1]:
                self._chosen = thread
                self._open(thread)

    def wake_all(self) -> None:
        """Wake all, whatever they wait for."""
        for thread in list(self.waits):
            self._open(thread)

    def _open(self, thread: int) -> None:
        _, gate = self.waits.pop(thread)
        gate.release()
