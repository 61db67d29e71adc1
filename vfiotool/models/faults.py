"""What a model can be made to do wrong, at any time and from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, get_args

from vfiotool.errors import UsageError

ResetFault = Literal["none", "hangs", "nothing", "fails", "lost"]
# The faults that have a name of their own on the command line, and what sets each.
FAULT_NAMES = (
    "slow",
    "mute",
    "gone",
    "reset-hangs",
    "reset-nothing",
    "reset-fails",
    "reset-lost",
    "d3-gone",
)
_SLOW_S = 0.1


class Faults:
    """`delay_s` seconds pass before each answer; `mute` answers no access any more; `gone` is a
    removed card: reads give all ones, writes do nothing, DMA and interrupts end. `reset` "hangs"
    (no answer until the server ends), does "nothing", "fails", or the function is "lost": it is
    answered, and as hardware that does not come back from a reset it reads as all ones until the
    fault is lifted. After `d3_gone` a card that was put to D3hot is gone. `lie` is
    handed (region, offset, width, value) of each register read and gives the answer.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.mute = False
        self.gone = False
        self._reset: ResetFault = "none"
        self.d3_gone = False
        self.lie: Callable[[int, int, int, int], int] | None = None
        # Set when the server ends: what hangs is let go.
        self.released = threading.Event()

    @property
    def reset(self) -> ResetFault:
        """What a reset does wrong. Setting it raises UsageError for what is not one of them."""
        return self._reset

    @reset.setter
    def reset(self, what: ResetFault) -> None:
        if what not in get_args(ResetFault):
            raise UsageError(
                f"{what!r} is not a fault of a reset",
                hint=f"one of: {', '.join(get_args(ResetFault))}",
            )
        self._reset = what

    def set(self, name: str) -> None:
        """Turn on the fault called `name` (`FAULT_NAMES`). Raises UsageError."""
        if name == "slow":
            self.delay_s = _SLOW_S
        elif name == "mute":
            self.mute = True
        elif name == "gone":
            self.gone = True
        elif name == "d3-gone":
            self.d3_gone = True
        elif name.startswith("reset-") and name.removeprefix("reset-") in get_args(ResetFault)[1:]:
            self.reset = name.removeprefix("reset-")  # type: ignore[assignment]
        else:
            raise UsageError(f"{name!r} is not a fault", hint=f"one of: {', '.join(FAULT_NAMES)}")

    def wait(self) -> None:
        """What a slow device does before it answers."""
        if self.delay_s:
            self.released.wait(self.delay_s)
