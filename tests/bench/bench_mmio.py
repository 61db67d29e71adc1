"""What one register access costs: C loop, bulk and single reads from Python, on one mapping.

    python tests/bench/bench_mmio.py                     over ordinary memory, on any machine
    python tests/bench/bench_mmio.py --device 00:01.0    over BAR 0 of a device on vfio-pci

Prints nanoseconds of the thread's own time for each way and the ratios; asserts nothing. The C
loop is compiled here, with the flags of the library, and reads the same mapping by its address.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vfiotool.vfio import Device
from vfiotool.vfio.native import Window

LOOP = """
#include <stdint.h>
#include <time.h>
uint64_t read_loop(const volatile uint32_t *registers, uint64_t count, uint32_t *out)
{
    struct timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    for (uint64_t i = 0; i < count; i++)
        out[i] = registers[i];
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    return (uint64_t)(b.tv_sec - a.tv_sec) * 1000000000u
        + (uint64_t)b.tv_nsec - (uint64_t)a.tv_nsec;
}
"""
WORDS = 16384


def compiled() -> Callable[[int, int, object], int]:
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "loop.c", folder / "loop.so"
    source.write_text(LOOP)
    subprocess.run(["gcc", "-O3", "-shared", "-fPIC", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).read_loop
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    return lambda address, count, out: int(function(address, count, out))


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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=200_000)
    given = parser.parse_args()
    if given.device:
        with Device.open(given.device) as device:
            # edu answers 4-byte reads; its first KiB is enough for 32-bit registers.
            report(device.region(0).map(), given.rounds, given.count // 20, 32)
        return
    fd = os.memfd_create("registers")
    os.ftruncate(fd, 4 * WORDS)
    window = Window(fd, 0, 0, 4 * WORDS, 3, 0)
    plain = mmap.mmap(fd, 4 * WORDS)
    report(window, given.rounds, given.count, WORDS, memoryview(plain).cast("I"), plain)


def report(
    window: Window,
    rounds: int,
    count: int,
    words: int,
    view: memoryview | None = None,
    plain: mmap.mmap | None = None,
) -> None:
    c_loop = compiled()
    buffer = bytearray(4 * words)
    out = (ctypes.c_uint32 * words).from_buffer(buffer)
    address = window.address(0, 4 * words)
    blocks = max(1, count // words)

    def bulk() -> float:
        begin = time.thread_time_ns()
        for _ in range(blocks):
            window._read_into(0, buffer, 4, False)
        return (time.thread_time_ns() - begin) / (blocks * words)

    ways: dict[str, Callable[[], float]] = {
        "C loop": lambda: (
            sum(c_loop(address, words, out) for _ in range(blocks)) / (blocks * words)
        ),
        "bulk from Python": bulk,
        "single from Python": lambda: loop_ns(window.read32, count),
    }
    if view is not None and plain is not None:
        ways["memoryview item"] = lambda: loop_ns(view.__getitem__, count)
        unpack = struct.Struct("=I").unpack_from
        ways["struct.unpack_from"] = lambda: loop_ns(lambda _: unpack(plain, 0), count)
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(way())
    best = {name: min(values) for name, values in taken.items()}
    for name, values in taken.items():
        print(f"{name:<20} {best[name]:9.2f} ns   median {statistics.median(values):9.2f} ns")
    print(f"single above C       {best['single from Python'] - best['C loop']:9.2f} ns")
    print(f"bulk / C             {best['bulk from Python'] / best['C loop']:9.3f}")


if __name__ == "__main__":
    main()
