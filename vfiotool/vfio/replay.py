"""A trace done again on a device: the same accesses in the same order, with what came out other.

Writes are written; reads and polls are made and compared; memory is mapped where it was, zeroed,
for its contents are not in a trace; interrupts are turned on and waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.vfio.caps import Area
from vfiotool.vfio.device import Device
from vfiotool.vfio.dma import DmaBuffer
from vfiotool.vfio.irq import InterruptSet
from vfiotool.vfio.region import Registers
from vfiotool.vfio.trace import Event


class Replay:
    """`differences` grows by one sentence for each event that went otherwise."""

    def __init__(self, device: Device, *, timeout_s: float = 5.0) -> None:
        self.device = device
        self.timeout_s = timeout_s
        self.differences: list[str] = []
        self._buffers: dict[int, DmaBuffer] = {}
        self._interrupts: dict[int, InterruptSet] = {}
        self._mapped: dict[int, Registers] = {}
        self._steps: dict[str, Callable[[dict[str, Any]], str | None]] = {
            "read": self._read,
            "write": self._write,
            "poll": self._poll,
            "copy-out": self._copy_out,
            "copy-in": lambda event: "bulk data is not in a trace: not replayed",
            "dma-map": self._map,
            "dma-unmap": self._unmap,
            "irq-on": self._irq_on,
            "irq-off": self._irq_off,
            "irq": self._irq,
            "reset": lambda event: self.device.reset(),
            "hot-reset": self._hot_reset,
        }

    def run(self, events: Iterable[Event]) -> list[str]:
        """All events in order; returns `differences`. What is still mapped or on at the end is
        taken away, bus mastering first. Raises UsageError for what is no event."""
        with ExitStack() as stack:
            stack.callback(self._end)
            for number, event in enumerate(events, 1):
                step = self._steps.get(str(event.get("event")))
                if step is None:
                    raise UsageError(f"event {number} of the trace: {event.get('event')!r}")
                try:
                    said = step(event)
                except (KeyError, AttributeError) as error:
                    raise UsageError(f"event {number} of the trace lacks {error}") from error
                except VfiotoolError as error:
                    said = str(error)
                if said:
                    self.differences.append(f"event {number} ({event['event']}): {said}")
        return self.differences

    def _end(self) -> None:
        self.device.set_bus_master(False)
        for interrupts in self._interrupts.values():
            interrupts.close()
        for buffer in self._buffers.values():
            buffer.close()

    def _registers(self, index: int) -> Registers:
        """A mapping where the whole region can be mapped: the kernel may split wide accesses."""
        if index not in self._mapped:
            region = self.device.region(index)
            whole = region.info.areas == (Area(0, region.size),)
            self._mapped[index] = region.map() if whole else region
        return self._mapped[index]

    def _read(self, event: dict[str, Any]) -> str | None:
        read = getattr(self._registers(event["region"]), f"read{8 * event['width']}")
        return _other(event["value"], read(event["offset"]))

    def _write(self, event: dict[str, Any]) -> None:
        write = getattr(self._registers(event["region"]), f"write{8 * event['width']}")
        write(event["offset"], event["value"])

    def _poll(self, event: dict[str, Any]) -> str | None:
        mask, wanted, width = event["mask"], event["wanted"], event["width"]
        registers = self._registers(event["region"])
        value = registers.poll(event["offset"], mask, wanted, self.timeout_s, width=width)
        # The bits that were not waited for may be anything.
        return _other(event["value"] & mask, value & mask)

    def _copy_out(self, event: dict[str, Any]) -> None:
        self.device.region(event["region"]).read_bytes(event["offset"], event["length"])

    def _map(self, event: dict[str, Any]) -> None:
        rights = {"read": event["read"], "write": event["write"]}
        buffer = self.device.dma.alloc(event["size"], iova=event["iova"], **rights)
        self._buffers[buffer.iova] = buffer

    def _unmap(self, event: dict[str, Any]) -> None:
        self._buffers.pop(event["iova"]).close()

    def _irq_on(self, event: dict[str, Any]) -> None:
        index = event["index"]
        self._interrupts[index] = self.device.irqs.enable(index, event["count"])

    def _irq_off(self, event: dict[str, Any]) -> None:
        self._interrupts.pop(event["index"]).close()

    def _irq(self, event: dict[str, Any]) -> str | None:
        interrupt = self._interrupts[event["index"]][event["vector"]]
        return _other(event["count"], interrupt.wait(self.timeout_s))

    def _hot_reset(self, event: dict[str, Any]) -> None:
        del event
        self.device.hot_reset()


def _other(before: int, now: int) -> str | None:
    return None if before == now else f"{before:#x} before, {now:#x} now"
