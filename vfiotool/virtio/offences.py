"""How long a socket takes no connection after its front end held up a thread that others share."""

from __future__ import annotations

from dataclasses import dataclass

# One costs the others up to some 20 ms (VT_SIGNAL_PATIENCE_MS, twice).
FIRST_S = 0.5
LONGEST_S = 10.0
# So long after the last wait ended the next one is a first one again.
FORGOTTEN_S = 60.0


@dataclass
class Offences:
    """Those of one export. Times are seconds of a clock that never runs backwards; `until` is when
    connections are taken again."""

    wait_s: float = 0.0
    until: float = 0.0

    def note(self, now: float) -> float:
        """One more. Returns the seconds to wait from now on: twice as many as the last time."""
        if now > self.until + FORGOTTEN_S:
            self.wait_s = 0.0
        self.wait_s = min(max(FIRST_S, 2 * self.wait_s), LONGEST_S)
        self.until = now + self.wait_s
        return self.wait_s
