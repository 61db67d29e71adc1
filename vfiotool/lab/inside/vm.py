"""What stands in for a virtual machine in a rehearsal: opens the devices as one does, twice.

`python -m vfiotool.lab.inside.vm [--hold] [--mark ADDRESS]… ADDRESS…` opens all devices in one
address space, maps memory for their DMA, lets go, and does it again. A device that may be marked is
written to at the first start; what is still there at the second one was not reset in between, as a
guest would find it. With --hold it opens them once and waits to be killed. Prints one JSON object.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import ExitStack
from typing import Any

from vfiotool.errors import VfiotoolError
from vfiotool.vfio import Device, Region

# Fits a register of an NVMe controller that keeps what is written (AQA, 24h), and plain storage.
MARK = 0x05A50A5A
_PLACES = (0x24, 0x40, 0x800, 0x0)
_BARS = tuple(f"bar{number}" for number in range(6))
_MEMORY_BYTES = 1 << 20

# Where a device's mark is: region and offset.
Marks = dict[str, tuple[str, int]]


def start(addresses: list[str], work: Any) -> None:
    """Open all devices, in one address space, with memory mapped; call `work` with each."""
    with ExitStack() as stack:
        first: Device | None = None
        for address in addresses:
            space = None if first is None else first.space
            device = stack.enter_context(Device.open(address, space=space))
            first = first or device
            work(device)
        if first is not None:
            stack.enter_context(first.dma.alloc(_MEMORY_BYTES))
        if work is hold:
            print(json.dumps({"open": True}), flush=True)
            signal.pause()


def hold(_device: Device) -> None:
    """Only have it open."""


def mark(device: Device, marks: Marks) -> None:
    """Write `MARK` where the device keeps it, and note the place; nothing where it keeps none."""
    device.set_memory_decode(True)
    for name in _BARS:
        for offset in _PLACES:
            if _keeps(device, name, offset):
                marks[device.name] = (name, offset)
                return


def _keeps(device: Device, name: str, offset: int) -> bool:
    try:
        region: Region = device.region(name)
        if offset + 4 > region.size:
            return False
        before = region.read32(offset)
        region.write32(offset, MARK)
        if before != MARK and region.read32(offset) == MARK:
            return True
        region.write32(offset, before)
    except VfiotoolError:
        return False
    return False


def has_mark(device: Device, place: tuple[str, int]) -> bool:
    """Whether what was written before the device was closed is still there."""
    device.set_memory_decode(True)
    return device.region(place[0]).read32(place[1]) == MARK


def main(words: list[str]) -> int:
    wanted = {words[at + 1] for at, word in enumerate(words) if word == "--mark"}
    addresses = list(dict.fromkeys(word for word in words if not word.startswith("--")))
    try:
        if "--hold" in words:
            start(addresses, hold)
            return 0
        marks: Marks = {}
        start(addresses, lambda one: mark(one, marks) if one.name in wanted else None)
        kept: list[str] = []
        second = {"kept": kept, "marked": sorted(marks)}
        start(
            addresses,
            lambda one: (
                kept.append(one.name)
                if one.name in marks and has_mark(one, marks[one.name])
                else None
            ),
        )
    except VfiotoolError as error:
        print(json.dumps({"error": error.message, "device": error.device}))
        return 5
    print(json.dumps(second))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
