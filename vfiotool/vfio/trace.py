"""A record of what a driver did to its device, one JSON object a line.

Every line has `t` (seconds since the trace began), `device` and `event`; the rest depends on the
event: `read` and `write` (region, offset, width, value), `copy-out` and `copy-in` (region, offset,
length), `poll` (region, offset, width, mask, wanted, value), `dma-map` and `dma-unmap` (iova,
size), `irq-on`, `irq-off`, `irq` (index, vector, count), `reset`, `hot-reset`. Numbers are numbers.

Two traces can be compared (`differences`).

Without a trace nothing is spent: the accessors of a mapping are C methods, and a traced mapping
is another class.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

from vfiotool.errors import UsageError

Event = dict[str, object]


class Trace:
    """Writes events to a text file, flushed line by line so that it can be followed live."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self.device = ""

    def record(self, event: str, **fields: object) -> None:
        """Append one event."""
        line: Event = {
            "t": round(time.monotonic() - self._begin, 6),
            "device": self.device,
            "event": event,
            **fields,
        }
        with self._lock:
            self._output.write(json.dumps(line) + "\n")
            self._output.flush()


def load(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a trace. Raises UsageError naming the line that is not one."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} of the trace is not JSON: {error}") from error
        if not isinstance(event, dict) or "event" not in event:
            raise UsageError(f"line {number} of the trace is not an event")
        yield event


def differences(old: Iterable[Event], new: Iterable[Event]) -> list[str]:
    """Where two traces part, ignoring times: one sentence a difference, at most one an event.

    I/O addresses are compared too: the allocator gives the same ones to the same requests. Of what
    a poll saw only the bits that it waited for count: the others change while it waits.
    """
    found = []
    left, right = [_comparable(event) for event in old], [_comparable(event) for event in new]
    for number, (a, b) in enumerate(zip(left, right, strict=False), 1):
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        if keys:
            changes = ", ".join(f"{key} {a.get(key)!r} -> {b.get(key)!r}" for key in keys)
            found.append(f"event {number} ({a.get('event')}): {changes}")
    if len(left) != len(right):
        found.append(f"{len(left)} events before, {len(right)} now")
    return found


def _comparable(event: Event) -> Event:
    kept = {key: value for key, value in event.items() if key != "t"}
    value, mask = kept.get("value"), kept.get("mask")
    if isinstance(value, int) and isinstance(mask, int):
        kept["value"] = value & mask
    return kept
