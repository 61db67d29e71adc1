"""Interrupt round trips: from the write that raises edu's MSI to the wait that returns.

    python -m tests.bench.bench_irq 0000:00:01.0 [--backend NAME]      in a guest, on vfio-pci

Two signals: edu's MSI (raised and acknowledged by a register write each, on the same mapping for
all ways), and the kernel's loopback trigger. For each a peer in C that does poll(2) and read(2) as
programs do, one that reads first as the library does, and the library blocking, spinning and in
asyncio. Prints microseconds and the ratios to the first peer and to the faster one.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial

from tests.bench.rounds import compiled, in_turn, times
from vfiotool.vfio import Device, Interrupt, Mapping

RAISE, ACKNOWLEDGE = 0x60, 0x64
WAIT_S = 10.0
C_SOURCE = """
#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
uint64_t round_trips(volatile uint32_t *raise, volatile uint32_t *acknowledge, int device, int fd,
                     int read_first, int count)
{
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < count; i++) {
        struct pollfd waiting = { .fd = fd, .events = POLLIN };
        struct vfio_irq_set set = { .argsz = sizeof(set), .index = VFIO_PCI_MSI_IRQ_INDEX,
            .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, .count = 1 };
        uint64_t seen = 0;
        if (raise)
            *raise = 1;
        else if (ioctl(device, VFIO_DEVICE_SET_IRQS, &set))
            return 0;
        if (!read_first || read(fd, &seen, 8) != 8)
            if (poll(&waiting, 1, 10000) != 1 || read(fd, &seen, 8) != 8)
                return 0;
        if (acknowledge)
            *acknowledge = 1;
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    return (uint64_t)(b.tv_sec - a.tv_sec) * 1000000000u
        + (uint64_t)b.tv_nsec - (uint64_t)a.tv_nsec;
}
"""


Wait = Callable[[], int]


class Lost(SystemExit):
    """A signal did not arrive: the figures mean nothing."""


def by_register(bar: Mapping, interrupt: Interrupt, count: int, wait: Wait) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        bar.write32(RAISE, 1)
        if not wait():
            raise Lost("an interrupt was lost")
        bar.write32(ACKNOWLEDGE, 1)
    return (time.perf_counter_ns() - begin) / count


def by_trigger(bar: Mapping, interrupt: Interrupt, count: int, wait: Wait) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        interrupt.trigger()
        if not wait():
            raise Lost("a signal was lost")
    return (time.perf_counter_ns() - begin) / count


async def by_register_in_asyncio(bar: Mapping, interrupt: Interrupt, count: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        bar.write32(RAISE, 1)
        if not await interrupt.wait_async(WAIT_S):
            raise Lost("an interrupt was lost")
        bar.write32(ACKNOWLEDGE, 1)
    return (time.perf_counter_ns() - begin) / count


async def by_trigger_in_asyncio(bar: Mapping, interrupt: Interrupt, count: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        interrupt.trigger()
        if not await interrupt.wait_async(WAIT_S):
            raise Lost("a signal was lost")
    return (time.perf_counter_ns() - begin) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    with Device.open(given.device, backend=given.backend) as device:
        measure(device, given.count, given.rounds)


def measure(device: Device, count: int, rounds: int) -> None:
    pointers, numbers = [ctypes.c_void_p] * 2, [ctypes.c_int] * 4
    round_trips = compiled(C_SOURCE, "round_trips", [*pointers, *numbers])
    bar = device.region(0).map()
    device.set_bus_master(True)
    interrupt = device.irqs.msi()[0]
    base = bar.address(0, 4096)

    def peer(raising: int | None, acknowledging: int | None, read_first: int) -> float:
        files = (device.descriptor, interrupt.descriptor)
        spent = round_trips(raising, acknowledging, *files, read_first, count)
        if not spent:
            raise Lost("the peer lost a signal")
        return spent / count

    def spinning() -> int:
        return interrupt.wait(WAIT_S, spin_s=1e-3)

    kinds = (
        ("edu's MSI", by_register, by_register_in_asyncio, (base + RAISE, base + ACKNOWLEDGE)),
        ("loopback", by_trigger, by_trigger_in_asyncio, (None, None)),
    )
    print(f"{device.name} through {device.backend}, {rounds} rounds of {count} round trips")
    for kind, loop, asynchronous, registers in kinds:
        ways = {
            "C, poll and read": partial(peer, *registers, 0),
            "C, read first": partial(peer, *registers, 1),
            "blocking": partial(loop, bar, interrupt, count, partial(interrupt.wait, WAIT_S)),
            "spinning 1 ms": partial(loop, bar, interrupt, count, spinning),
            "asyncio": lambda run=asynchronous: asyncio.run(run(bar, interrupt, count)),
        }
        taken = in_turn(ways, rounds)
        usual, first = taken["C, poll and read"], taken["C, read first"]
        for name, values in taken.items():
            median = statistics.median(values) / 1000
            compared = f"{times(values, usual)},{times(values, first)} that reads first"
            print(f"{kind:<10} {name:<18} {median:8.1f} µs {compared}")


if __name__ == "__main__":
    main()
