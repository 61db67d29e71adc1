"""Time-outs, made sense of in one place."""

from __future__ import annotations

import math
import time

from vfiotool.errors import UsageError


class Deadline:
    """The moment at which a wait of `timeout_s` seconds ends. None and infinity have none, a
    negative number is now. Raises UsageError for what is not a number of seconds."""

    def __init__(self, timeout_s: float | None) -> None:
        if timeout_s is None:
            timeout_s = math.inf
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
            raise UsageError(f"{timeout_s!r} is not a number of seconds")
        if math.isnan(timeout_s):
            raise UsageError("nan is not a number of seconds")
        self.began = time.monotonic()
        self.timeout_s = max(0.0, float(timeout_s))
        self._end = self.began + self.timeout_s

    def left(self) -> float:
        """Seconds that are left, at least 0; may be infinite."""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end

    def pause(self) -> None:
        """A short sleep between two looks."""
        time.sleep(min(1e-3, self.left()))

    def within(self, timeout_s: float | None) -> Deadline:
        """The earlier of this moment and the one `timeout_s` from now."""
        other = Deadline(timeout_s)
        return other if other.left() < self.left() else self

    def __str__(self) -> str:
        return f"{self.timeout_s:g} s"
