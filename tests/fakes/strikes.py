"""Ctrl-C from a timer, within a block that a test chooses and nowhere else."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def struck(after_s: float, below: str = "") -> Iterator[None]:
    """Raise KeyboardInterrupt in the block once, `after_s` seconds from its start.

    With `below`, only while a function of a file whose path has it is running: as soon after as one
    is. An alarm that comes late, as on a machine with much to do, is nobody's: what follows the
    block is not struck, so that the block, not its surroundings, has to stand where
    KeyboardInterrupt is caught.
    """
    armed = True

    def strike(_number: int, frame: FrameType | None) -> None:
        nonlocal armed
        if not armed:
            return
        while frame is not None and below not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            signal.setitimer(signal.ITIMER_REAL, 1e-5)
            return
        armed = False
        raise KeyboardInterrupt

    # Left as it is afterwards: an alarm that is on its way finds a handler that does nothing.
    signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
