"""The same thing a great many times: what it costs must come back.

    python soak_vfio.py [--device 0000:00:01.0] [--reset-device ADDRESS] [--backend NAME]
                        [--maps N] [--buffers N] [--interrupts N] [--opens N] [--resets N] [--full]

Runs in a guest, and puts the devices on vfio-pci. After each kind it prints what was held before
and after, and the growth a cycle; ends with 1 if anything has grown.
test_vfio_soak.py runs it with small numbers; `make soak` with the full ones.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from tests.lab.vfio_guest import bind_vfio, open_descriptors, status_kib
from vfiotool.vfio import Device

FULL = {"maps": 10**6, "buffers": 10**5, "interrupts": 10**5, "opens": 10**4, "resets": 10**3}
# What may be more after any number of cycles; all else may not grow at all. The heap and the
# interpreter's blocks are counted exactly, so a leak of 16 bytes a cycle is seen long before it
# shows in the resident size, whose pools grow for some hundred cycles and then stand still.
# Python maps its pools a MiB at a time.
SLACK = {"mappings": 2, "blocks": 16, "heap_bytes": 1024, "resident_kib": 1024}
# A leak shows in each part of the cycles. What is taken once, by whatever comes first by there, in
# one: 2976 bytes were seen after 100 cycles and after 400.
PARTS = 4


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _MallInfo


@dataclass(frozen=True)
class Usage:
    """What this process holds. `pins` counts the pages pinned for DMA in the whole system."""

    descriptors: int
    mappings: int
    locked_kib: int
    pinned_kib: int
    pins: int
    blocks: int
    heap_bytes: int
    resident_kib: int


def pins() -> int:
    """Pages pinned now (FOLL_PIN), after a flush of the counts that each processor keeps."""
    Path("/proc/sys/vm/stat_refresh").read_text()
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    counts = {name: int(value) for name, value in lines}
    return counts["nr_foll_pin_acquired"] - counts["nr_foll_pin_released"]


def usage() -> Usage:
    gc.collect()
    descriptors = len(open_descriptors())
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    locked, pinned = status_kib("VmLck"), status_kib("VmPin")
    pinned_pages = pins()
    heap = _mallinfo2()
    return Usage(
        descriptors,
        mappings,
        locked,
        pinned,
        pinned_pages,
        sys.getallocatedblocks(),
        heap.uordblks + heap.hblkhd,
        status_kib("VmRSS"),
    )


def grows(key: str, seen: list[dict[str, int]]) -> bool:
    """Whether there was more each time; what has no slack may not be more in the end."""
    steps = [now[key] - was[key] for was, now in pairwise(seen)]
    return key not in SLACK or min(steps) > SLACK[key] / PARTS


def soak(name: str, count: int, warm: int, once: Callable[[], object]) -> bool:
    """`once` `count` times; whether nothing grew, as it was after `warm` cycles."""
    if not count:
        return True
    for _ in range(warm):
        once()
    usage()
    seen, began = [asdict(usage())], time.monotonic()
    for part in range(PARTS):
        for _ in range(count * part // PARTS, count * (part + 1) // PARTS):
            once()
        seen.append(asdict(usage()))
    took, was, now = time.monotonic() - began, seen[0], seen[-1]
    grown = {key: now[key] - was[key] for key in was}
    leaks = [key for key, by in grown.items() if by > SLACK.get(key, 0) and grows(key, seen)]
    print(f"{'GREW' if leaks else 'ok'} {name}: {count} in {took:.1f} s", end="")
    print(f", {' '.join(leaks) or 'nothing'} grew beyond what pools keep")
    for key, by in grown.items():
        each = f", {by / count:.6f} a cycle" if by else ""
        print(f"   {key:<13} {was[key]:>9} -> {now[key]:>9}{each}", flush=True)
    return not leaks


def soak_one(device: Device, given: argparse.Namespace) -> bool:
    """The kinds that need one open device."""
    bar = device.region(0).map()
    device.set_bus_master(True)
    memory = device.dma.alloc(4096)

    def map_and_unmap() -> None:
        device.space.map(memory.address, 0x100000, 4096, read=True, write=True)
        assert device.space.unmap(0x100000, 4096) == 4096

    def buffer() -> None:
        with device.dma.alloc(8192) as fresh:
            fresh.view[0] = 1

    fine = soak("maps and unmaps", given.maps, 1000, map_and_unmap)
    fine &= soak("buffers", given.buffers, 1000, buffer)
    interrupt = device.irqs.msi()[0]

    def interrupted() -> None:
        bar.write32(0x60, 1)
        assert interrupt.wait(10.0) == 1
        bar.write32(0x64, 1)

    return fine & soak("interrupts", given.interrupts, 100, interrupted)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="0000:00:01.0")
    parser.add_argument("--reset-device", help="one that can be reset; default: none is")
    parser.add_argument("--backend", default="auto")
    for name in FULL:
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="all of them, a great many times")
    given = parser.parse_args()
    if "VFIOTOOL_LAB_KERNEL" not in os.environ:
        parser.error("this runs in a lab guest only: it takes devices from their drivers")
    for name, count in FULL.items() if given.full else ():
        setattr(given, name, count)
    for address in {given.device, given.reset_device or given.device}:
        bind_vfio(address)

    def open_and_close() -> None:
        with Device.open(given.device, backend=given.backend) as device:
            device.region(0).map().read32(0)

    fine = soak("opens", given.opens, 50, open_and_close)
    if given.maps or given.buffers or given.interrupts:
        with Device.open(given.device, backend=given.backend) as device:
            fine &= soak_one(device, given)
    if given.resets:
        with Device.open(given.reset_device or given.device, backend=given.backend) as device:
            device.irqs.msix(2)
            fine &= soak("resets", given.resets, 10, device.reset)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
