"""What one register access costs: C loop, bulk and single reads from Python, on one mapping.

    python -m tests.bench.bench_mmio                     over ordinary memory, on any machine
    python -m tests.bench.bench_mmio --device 00:01.0    over BAR 0 of a device on vfio-pci

Prints nanoseconds of the thread's own time for each way and the ratios; asserts nothing. The C
loops are compiled here and read the same mapping by its address into the same memory: a 32-bit
load and a 32-bit store a register, which no compiler may merge. One goes one register a round;
its few instructions take one cycle or two, as they happen to lie in the processor's fetch windows,
so it is placed in three ways, and bulk is compared with the fastest and the slowest. "Unrolled"
goes eight a round, as the library does, and does not depend on its place. "Traced" is what a trace
costs when it is on; off, it costs the difference between a `Mapping` and the C type that it is made
of.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

from tests.bench.rounds import compiled, in_turn, ratio
from vfiotool.native.library import WINDOW_READ, WINDOW_WRITE, Window
from vfiotool.vfio import Area, Device, Mapping, Trace
from vfiotool.vfio.reach import Reach
from vfiotool.vfio.region import TracedMapping

LOOP = """
#include <stdint.h>
#include <time.h>
__attribute__((aligned(64)))
uint64_t read_loop(const volatile uint32_t *registers, uint64_t count, uint32_t *out)
{
    struct timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    __asm__ volatile(".balign 64\\n.skip PLACE, 0x90");
#if EIGHT
#pragma GCC unroll 8
#else
#pragma GCC unroll 1
#endif
    for (uint64_t i = 0; i < count; i++)
        out[i] = registers[i];
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    return (uint64_t)(b.tv_sec - a.tv_sec) * 1000000000u
        + (uint64_t)b.tv_nsec - (uint64_t)a.tv_nsec;
}
"""
WORDS = 16384
# Where the loop begins in 64 bytes, about: what is before it adds a few.
PLACES = (1, 11, 21)


def loop_ns(body: Callable[[int], object], count: int) -> float:
    """The cost of one `body(offset)`, the loop around it included."""
    numbers = range(count)
    begin = time.thread_time_ns()
    for _ in numbers:
        body(0)
    return (time.thread_time_ns() - begin) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="a device on vfio-pci; its BAR 0 is read")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=200_000)
    given = parser.parse_args()
    if given.device:
        with Device.open(given.device) as device:
            # edu answers 4-byte reads; its first KiB is enough for 32-bit registers.
            report(device.region(0).map(), given.rounds, given.count // 20, 32, {})
        return
    fd = os.memfd_create("registers")
    os.ftruncate(fd, 4 * WORDS)
    plain = mmap.mmap(fd, 4 * WORDS)
    with open(os.devnull, "w") as nowhere:
        report(stand_in(Mapping, fd, None), given.rounds, given.count, WORDS, {
            "the C type alone": loops(Window(fd, 0, 0, 4 * WORDS, 3, 0).read32),
            "traced": loops(stand_in(TracedMapping, fd, Trace(nowhere)).read32, 50),
            "memoryview item": loops(memoryview(plain).cast("I").__getitem__),
            "struct.unpack_from": loops(partial(struct.Struct("=I").unpack_from, plain)),
        })  # fmt: skip


def stand_in(kind: type[Any], fd: int, trace: Trace | None) -> Any:
    """A mapping of ordinary memory, as a device's region would give it."""
    info = SimpleNamespace(index=0, position=0)
    calls = SimpleNamespace(mappable=lambda position: nullcontext((fd, position)))
    device = SimpleNamespace(calls=calls, name="memory", reach=Reach("", None))
    region = SimpleNamespace(info=info, device=device, index=0, trace=trace)
    return kind(region, Area(0, 4 * WORDS), WINDOW_READ | WINDOW_WRITE, 0)


def loops(body: Callable[[int], object], fewer: int = 1) -> Callable[[int], float]:
    return lambda count: loop_ns(body, count // fewer)


def report(
    window: Mapping,
    rounds: int,
    count: int,
    words: int,
    others: dict[str, Callable[[int], float]],
) -> None:
    arguments = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]

    def c_loop(place: int, eight: bool) -> Callable[[], float]:
        text = LOOP.replace("PLACE", str(place)).replace("EIGHT", str(int(eight)))
        loop = compiled(text, "read_loop", arguments, "-O3", "-fno-align-loops")
        return lambda: sum(loop(address, words, out) for _ in range(blocks)) / (blocks * words)

    buffer = bytearray(4 * words)
    out = (ctypes.c_uint32 * words).from_buffer(buffer)
    address = window.address(0, 4 * words)
    blocks = max(1, count // words)

    def bulk() -> float:
        begin = time.thread_time_ns()
        for _ in range(blocks):
            window.read_into(0, buffer)
        return (time.thread_time_ns() - begin) / (blocks * words)

    ways: dict[str, Callable[[], float]] = {
        **{f"C loop at {place}": c_loop(place, False) for place in PLACES},
        "C loop, unrolled": c_loop(1, True),
        "bulk from Python": bulk,
        "single from Python": lambda: loop_ns(window.read32, count),
        **{name: partial(other, count) for name, other in others.items()},
    }
    taken = in_turn(ways, rounds)
    best = {name: min(values) for name, values in taken.items()}
    for name, values in taken.items():
        print(f"{name:<20} {best[name]:9.2f} ns   median {statistics.median(values):9.2f} ns")
    single, bulk_taken = taken["single from Python"], taken["bulk from Python"]
    loops_by_time = sorted((best[f"C loop at {place}"], f"C loop at {place}") for place in PLACES)
    print(f"single above C       {best['single from Python'] - loops_by_time[0][0]:9.2f} ns")
    print(f"bulk / C, fastest    {ratio(bulk_taken, taken[loops_by_time[0][1]]):9.3f}")
    print(f"bulk / C, slowest    {ratio(bulk_taken, taken[loops_by_time[-1][1]]):9.3f}")
    print(f"bulk / C, unrolled   {ratio(bulk_taken, taken['C loop, unrolled']):9.3f}")
    if "the C type alone" in taken:
        print(f"trace off / no trace {ratio(single, taken['the C type alone']):9.3f}")


if __name__ == "__main__":
    main()
