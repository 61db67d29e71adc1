"""The time that waits for the kernel are measured in.

A `Host` carries its clock: on the machine itself it is the kernel's monotonic clock; a fake
kernel has one of its own, which passes when somebody waits, so that its tests do not.
"""

from __future__ import annotations

import time


class Clock:
    """Monotonic time in seconds, unaffected by settings of the date (CLOCK_MONOTONIC)."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let at least `seconds` pass."""
        time.sleep(seconds)
