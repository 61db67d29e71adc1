"""A disk that is a class in Python, and a driver that takes long to wake.

    chrt -f 1 python -m tests.bench.bench_late_driver [--late US,US] [--rounds N] [--seconds S]

Server and driver lie on a processor each. The driver keeps 32 reads of 4 KiB in flight, takes all
that have ended at once, and after each sleep does nothing for as long as it is told: as a virtual
processor that has to be woken from its halt. Printed are the reads, and its sleeps and kicks.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import struct
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.bench.bench_vhost_blk import python_command, running
from tests.virtio.frontend import DATA, SIZE, Frontend

DEPTH, BLOCK = SIZE // 2, 4096


class LateDriver:
    """A driver with `DEPTH` reads in flight, whose heads are always the same."""

    def __init__(self, path: str, late_s: float) -> None:
        self.front, self.late_s = Frontend(path), late_s
        self.ring, self.words = self.front.rings[0], self.front.words
        self.added = self.seen = self.done = self.sleeps = self.kicks = 0
        self.poll = select.poll()
        self.poll.register(self.ring.call, select.POLLIN)
        self.front.up()
        for number in range(DEPTH):
            at = DATA + 2 * BLOCK * number
            sector = number * 997 % 16_000 * (BLOCK // 512)
            self.front.memory[at : at + 16] = struct.pack("<IIQ", 0, 0, sector)
            self.front.put(self.ring, 2 * number, [(at, 16, False), (at + 16, BLOCK + 1, True)])
        for place in range(SIZE):
            self.words[(self.ring.at + 0x1004) // 2 + place] = 2 * (place % DEPTH)

    def submit(self, count: int) -> None:
        before, self.added = self.added, (self.added + count) & 0xFFFF
        self.words[(self.ring.at + 0x1002) // 2] = self.added
        self.front.fence()
        wanted = self.words[(self.ring.at + 0x2004) // 2 + 4 * SIZE]
        if (self.added - wanted - 1) & 0xFFFF < (self.added - before) & 0xFFFF:
            os.eventfd_write(self.ring.kick, 1)
            self.kicks += 1

    def sleep(self) -> None:
        self.words[(self.ring.at + 0x1004) // 2 + SIZE] = self.seen
        self.front.fence()
        if self.waiting():
            return
        self.poll.poll()
        os.eventfd_read(self.ring.call)
        self.sleeps += 1
        ends = time.perf_counter() + self.late_s
        while time.perf_counter() < ends:
            pass

    def waiting(self) -> int:
        return (self.words[(self.ring.at + 0x2002) // 2] - self.seen) & 0xFFFF

    def run(self, seconds: float) -> float:
        """Thousands of reads a second."""
        self.submit(DEPTH)
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends:
            if ended := self.waiting():
                self.seen = (self.seen + ended) & 0xFFFF
                self.done += ended
                self.submit(ended)
            else:
                self.sleep()
        self.words.release()
        self.front.close()
        return self.done / seconds / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--late", default="0,50,100", help="microseconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4)
    given = parser.parse_args()
    first, second = sorted(os.sched_getaffinity(0))[:2]
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "disk"
        pid = stack.enter_context(running(python_command(path), dict(os.environ), path))
        subprocess.run(
            ["taskset", "-a", "-p", "-c", str(first), str(pid)],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        os.sched_setaffinity(0, {second})
        for late in map(int, given.late.split(",")):
            drivers, speeds = [], []
            for _ in range(given.rounds):
                drivers.append(LateDriver(str(path), late / 1e6))
                speeds.append(drivers[-1].run(given.seconds))
            sleeps, kicks = sum(one.sleeps for one in drivers), sum(one.kicks for one in drivers)
            done = sum(one.done for one in drivers)
            print(
                f"{late:4} µs late: {statistics.median(speeds):6.1f} kIOPS"
                f" ({min(speeds):.0f} to {max(speeds):.0f}),"
                f" a sleep each {done / max(sleeps, 1):.1f} reads, {kicks} kicks",
                flush=True,
            )


if __name__ == "__main__":
    main()
