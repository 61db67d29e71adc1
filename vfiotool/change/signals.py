"""Ctrl-C and SIGTERM while a host is changed: noticed between writes, never inside one.

A write that is in the kernel goes on whatever happens to us, and undoing it needs to know how it
ended. So the first signal is kept until the write has returned; the second one is not.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_KEPT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user ended a change, and it has been taken back. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class KeptSignals:
    """The signals kept during one change; see `kept`."""

    def __init__(self) -> None:
        self.number: int | None = None

    def raise_any(self) -> None:
        """Raise Interrupted if a signal came; once, so that what it starts is not interrupted."""
        number, self.number = self.number, None
        if number is not None:
            raise Interrupted(number)

    def _keep(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def kept() -> Iterator[KeptSignals]:
    """Keep signals until `raise_any` is called; SIGHUP is ignored, so that the change ends.

    In another thread than the main one signals stay as they are: Python hands them to that one.
    """
    interrupts = KeptSignals()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    handlers = {number: signal.signal(number, interrupts._keep) for number in _KEPT}
    handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield interrupts
    finally:
        for number, handler in handlers.items():
            # None: it was not Python that had set it, and then it cannot be put back either.
            if handler is not None:
                signal.signal(number, handler)
