"""Map and unmap, from Python and from plain C, on one container or IOAS.

    python -m tests.bench.bench_dma 0000:00:01.0 [--backend type1|iommufd]    in a guest

For 4 KiB pages, 2 MiB huge pages and transparent huge pages: nanoseconds a page (4 KiB) for the
plain C loop, the library's batches (one call of C for all; from a list of tuples and from an
array), its single calls, and whole buffers (memory, address, mapping and back, which C is not
asked for). The C loop does the same two ioctls on the same descriptors.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import statistics
import time
from array import array
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from tests.bench.rounds import compiled, in_turn, times
from vfiotool.errors import VfiotoolError
from vfiotool.native.library import address_of
from vfiotool.vfio import Device

C_SOURCE = """
#include <linux/vfio.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>
struct ioas_map { uint32_t size, flags, ioas, reserved; uint64_t va, length, iova; };
struct ioas_unmap { uint32_t size, ioas; uint64_t iova, length; };
uint64_t cycle(int fd, uint32_t ioas, uint64_t va, uint64_t iova, uint64_t size, int count)
{
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < count; i++) {
        if (ioas) {
            struct ioas_map m = { sizeof(m), 7, ioas, 0, va + i * size, size, iova + i * size };
            if (ioctl(fd, _IO(';', 0x85), &m))
                return 0;
        } else {
            struct vfio_iommu_type1_dma_map m = { sizeof(m), 3, va + i * size, iova + i * size,
                                                  size };
            if (ioctl(fd, VFIO_IOMMU_MAP_DMA, &m))
                return 0;
        }
    }
    for (int i = 0; i < count; i++) {
        if (ioas) {
            struct ioas_unmap u = { sizeof(u), ioas, iova + i * size, size };
            if (ioctl(fd, _IO(';', 0x86), &u))
                return 0;
        } else {
            struct vfio_iommu_type1_dma_unmap u = { sizeof(u), 0, iova + i * size, size };
            if (ioctl(fd, VFIO_IOMMU_UNMAP_DMA, &u))
                return 0;
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    return (uint64_t)(b.tv_sec - a.tv_sec) * 1000000000u
        + (uint64_t)b.tv_nsec - (uint64_t)a.tv_nsec;
}
"""
IOVA = 1 << 30
Rows = Any  # whatever map_many and unmap_many take
MADV_HUGEPAGE = 14
OPENINGS = 11


def memory_of(kind: str, size: int, count: int) -> tuple[mmap.mmap, int]:
    """Memory for `count` pieces and the address of the first, aligned to the piece."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if kind == "2 MiB":
        Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").write_text(str(count))
        memory = mmap.mmap(-1, size * count, flags=flags | 0x40000 | 21 << 26)
        start = address_of(memory)
    else:
        memory = mmap.mmap(-1, size * (count + 1), flags=flags)
        if kind == "THP 2 MiB":
            memory.madvise(MADV_HUGEPAGE)
        start = -(-address_of(memory) // size) * size
    for offset in range(0, len(memory), 4096):
        memory[offset] = 1
    return memory, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=61)
    given = parser.parse_args()
    with Device.open(given.device, backend=given.backend) as device:
        print(f"{device.name} through {device.backend}; ns a page of 4 KiB, map and unmap")
        for kind, size, count in (
            ("4 KiB", 4096, 512),
            ("THP 2 MiB", 2 << 20, 16),
            ("2 MiB", 2 << 20, 16),
        ):
            try:
                bench(device, kind, size, count, given.rounds)
            except (OSError, VfiotoolError) as error:
                print(f"{kind}: not measured: {error}")
        backend = device.backend
    opening(given.device, backend)


def bench(device: Device, kind: str, size: int, count: int, rounds: int) -> None:
    numbers = [ctypes.c_int, ctypes.c_uint32, *[ctypes.c_uint64] * 3, ctypes.c_int]
    cycle = compiled(C_SOURCE, "cycle", numbers)
    space = device.space
    memory, start = memory_of(kind, size, count)
    handle = getattr(space, "iommufd", None) or space.container
    ioas = getattr(space, "ioas", 0)
    triples = [(start + i * size, IOVA + i * size, size) for i in range(count)]
    pairs = [(iova, length) for _, iova, length in triples]
    tables = array("Q", chain.from_iterable(triples)), array("Q", chain.from_iterable(pairs))
    pages = count * size // 4096

    def plain() -> float:
        with handle as fd:
            spent = cycle(fd, ioas, start, IOVA, size, count)
        if not spent:
            raise OSError("the plain C program could not map")
        return spent / pages

    def batch(rows: Rows, ranges: Rows) -> None:
        space.map_many(rows, read=True, write=True)
        assert space.unmap_many(ranges) == count * size

    def single() -> None:
        for address, iova, length in triples:
            space.map(address, iova, length, read=True, write=True)
        for iova, length in pairs:
            space.unmap(iova, length)

    def buffers() -> None:
        for _ in range(count):
            device.dma.alloc(size).close()

    def timed(work: Callable[[], object]) -> float:
        begin = time.perf_counter_ns()
        work()
        return (time.perf_counter_ns() - begin) / pages

    taken = in_turn(
        {
            "plain C": plain,
            "batch of tuples": lambda: timed(lambda: batch(triples, pairs)),
            "batch of an array": lambda: timed(lambda: batch(*tables)),
            "single calls": lambda: timed(single),
        },
        rounds,
    )
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{kind:<10} {name:<18} {median:10.1f} ns {times(values, taken['plain C'])}")
    whole = statistics.median(timed(buffers) for _ in range(3))
    print(f"{kind:<10} {'whole buffers':<18} {whole:10.1f} ns")
    memory.close()


def opening(name: str, backend: str) -> None:
    """Open to the first register read, and close."""
    opened, closed = [], []
    for _ in range(OPENINGS):
        begin = time.perf_counter_ns()
        device = Device.open(name, backend=backend)
        device.region(0).map().read32(0)
        middle = time.perf_counter_ns()
        device.close()
        opened.append(middle - begin)
        closed.append(time.perf_counter_ns() - middle)
    print(f"open to first register read {statistics.median(opened) / 1e6:8.2f} ms")
    print(f"close                       {statistics.median(closed) / 1e6:8.2f} ms")


if __name__ == "__main__":
    main()
