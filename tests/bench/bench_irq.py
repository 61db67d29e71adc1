"""Interrupt round trips: from the write that raises edu's MSI to the wait that returns.

    python tests/bench/bench_irq.py 0000:00:01.0 [--backend NAME]      in a guest, on vfio-pci

Ways: C (register write, poll(2), read(2) on the same mapping and eventfd), the library blocking,
spinning and in asyncio, and the kernel's loopback trigger. Prints microseconds and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vfiotool.vfio import Device, Interrupt, Mapping

RAISE, ACKNOWLEDGE = 0x60, 0x64
C_SOURCE = """
#include <poll.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>
uint64_t round_trips(volatile uint32_t *raise, volatile uint32_t *acknowledge, int fd, int count)
{
    struct timespec a, b;
    uint64_t seen;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < count; i++) {
        struct pollfd waiting = { .fd = fd, .events = POLLIN };
        *raise = 1;
        if (poll(&waiting, 1, 10000) != 1 || read(fd, &seen, 8) != 8)
            return 0;
        *acknowledge = 1;
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    return (uint64_t)(b.tv_sec - a.tv_sec) * 1000000000u
        + (uint64_t)b.tv_nsec - (uint64_t)a.tv_nsec;
}
"""


def compiled() -> Callable[[int, int, int, int], int]:
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "irq.c", folder / "irq.so"
    source.write_text(C_SOURCE)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).round_trips
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return lambda *arguments: int(function(*arguments))


def blocking(bar: Mapping, interrupt: Interrupt, count: int, spin_s: float) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        bar.write32(RAISE, 1)
        if not interrupt.wait(10.0, spin_s=spin_s):
            raise SystemExit("an interrupt was lost")
        bar.write32(ACKNOWLEDGE, 1)
    return (time.perf_counter_ns() - begin) / count


def loopback(interrupt: Interrupt, count: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        interrupt.trigger()
        interrupt.wait(10.0)
    return (time.perf_counter_ns() - begin) / count


async def in_asyncio(bar: Mapping, interrupt: Interrupt, count: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        bar.write32(RAISE, 1)
        await interrupt.wait_async(10.0)
        bar.write32(ACKNOWLEDGE, 1)
    return (time.perf_counter_ns() - begin) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    round_trips = compiled()
    with Device.open(given.device, backend=given.backend) as device:
        bar = device.region(0).map()
        device.set_bus_master(True)
        interrupt = device.irqs.msi()[0]
        base = bar.address(0, 4096)
        raising, acknowledging, fd = base + RAISE, base + ACKNOWLEDGE, interrupt.descriptor
        ways: dict[str, Callable[[], float]] = {
            "C, poll and read": lambda: (
                round_trips(raising, acknowledging, fd, given.count) / given.count
            ),
            "blocking": lambda: blocking(bar, interrupt, given.count, 0.0),
            "spinning 1 ms": lambda: blocking(bar, interrupt, given.count, 1e-3),
            "asyncio": lambda: asyncio.run(in_asyncio(bar, interrupt, given.count)),
            "loopback, blocking": lambda: loopback(interrupt, given.count),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                taken[name].append(way())
        print(f"{device.name} through {device.backend}, {given.count} round trips a round")
    c_median = statistics.median(taken["C, poll and read"])
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{name:<20} {median / 1000:9.1f} µs   {median / c_median:6.2f} times C")


if __name__ == "__main__":
    main()
