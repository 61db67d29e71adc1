"""Which queues to move between workers, from what each did lately: a pure decision."""

from __future__ import annotations

from collections.abc import Sequence

# Below so many requests a second a worker is not busy enough for a move to matter.
_BUSY = 1000
# The busiest worker has to have so much more than the idlest: moves that gain little go back and
# forth.
_RATIO = 1.5


def next_move(loads: Sequence[Sequence[float]]) -> tuple[int, int, int] | None:
    """The move that evens most: a worker's number, its queue's, and the worker it goes to; None if
    all is even enough. `loads` has the requests a second of each worker's queues.
    """
    sums = [sum(queues) for queues in loads]
    if len(sums) < 2:
        return None
    busiest, idlest = sums.index(max(sums)), sums.index(min(sums))
    gap = sums[busiest] - sums[idlest]
    if sums[busiest] < _BUSY or sums[busiest] < _RATIO * sums[idlest]:
        return None
    # What is moved is taken from one and given to the other: half the gap evens them.
    able = [(load, number) for number, load in enumerate(loads[busiest]) if 0 < load < gap]
    if not able:
        return None
    _, queue = min(able, key=lambda entry: abs(entry[0] - gap / 2))
    return busiest, queue, idlest
