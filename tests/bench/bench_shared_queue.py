"""A SharedQueue with one thread and with four, over a controller that takes no time of its own.

    python -m tests.bench.bench_shared_queue [--rounds 15] [--delays-us 0 5 100]

The controller is C that answers when the queue is looked at, each command so many microseconds
after it was sent, or after the one before: one that works in a thread would be measured with the
machine's scheduler. 32 commands are out, a quarter of them each thread's. Prints commands a second,
the median and in brackets the best of the rounds; and what a command cost the threads: processor
time, and how often a thread gave its processor away.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import tempfile
from pathlib import Path
from subprocess import run
from types import SimpleNamespace
from typing import Any

from tests.bench.bench_nvme import drive
from tests.fakes.nvme import Memory
from vfiotool.drivers.nvme.health import Health
from vfiotool.drivers.nvme.in_flight import InFlight
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.queue_pair import Doorbells, QueuePair, Rings
from vfiotool.drivers.nvme.shared import SharedQueue
from vfiotool.native.library import QueueCalls, ffi, lib

DEPTH, ENTRIES, COMPLETIONS = 32, 128, 256


class Doorbell:
    """The window of the doorbells: nobody reads them."""

    def __init__(self) -> None:
        self.memory = Memory({}, 4096, 0)
        self.gate = (ctypes.c_uint32 * 2)(1, 0)

    def pin(self) -> int:
        return ctypes.addressof(self.gate)

    def unpin(self) -> None:
        """Nothing counts them."""

    def address(self, offset: int, width: int) -> int:
        return self.memory.address + offset


def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        text, built = Path(__file__).with_name("shared_queue.c"), Path(folder, "controller.so")
        run(["gcc", "-O2", "-shared", "-fPIC", "-o", built, text], check=True)
        found = ctypes.CDLL(str(built))
    numbers = [ctypes.c_uint64] * 4 + [ctypes.c_uint32] * 2 + [ctypes.c_uint64] * 2
    found.begin.argtypes = numbers
    return found


def address(of: Any) -> int:
    return int(ffi.cast("uintptr_t", of))


def queue_over(controller: ctypes.CDLL, delay_us: float, in_turn: bool) -> IoQueue:
    rings = Rings(
        Memory({}, ENTRIES * 64, 0),  # type: ignore[arg-type]
        Memory({}, COMPLETIONS * 16, 0),  # type: ignore[arg-type]
        None,
        ENTRIES,
        COMPLETIONS,
        4096,
        1,
        lazy=True,
    )
    pair = QueuePair(rings, Doorbells(Doorbell(), 0, 4))  # type: ignore[arg-type]
    controller.begin(
        *(address(ffi.addressof(lib, name)) for name in ("vt_nvme_submit", "vt_nvme_poll")),
        *(rings.submission.address, rings.completion.address, ENTRIES, COMPLETIONS),
        *(round(delay_us * 1000), in_turn),
    )
    calls = [
        ctypes.cast(call, ctypes.c_void_p).value for call in (controller.sent, controller.looked)
    ]
    pair._calls = QueueCalls(
        address(pair._queue), *calls, address(pair._done), address(pair._held), pair.depth,
        (pair._queue, pair._done, pair._held, controller),
    )  # type: ignore[call-arg]  # fmt: skip
    ready = SimpleNamespace(read=lambda: 1)
    health = Health("bench", SimpleNamespace(status=ready, configuration=ready))  # type: ignore[arg-type]
    device = SimpleNamespace(name="bench")
    return IoQueue(InFlight(pair, health), device, 1 << 20, lambda _: None)  # type: ignore[arg-type]


def measured(
    controller: ctypes.CDLL, delay_us: float, in_turn: bool, threads: int, seconds: float
) -> tuple[float, float, float]:
    """Commands a second; microseconds of processor time and switches of threads a command."""
    disk = SimpleNamespace(blocks=1 << 24, transfer_bytes=512, nsid=1)
    buffer = Memory({}, DEPTH * 4096, 1 << 20)
    queue = queue_over(controller, delay_us, in_turn)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with SharedQueue(queue) as shared:
        rate = drive(shared, disk, buffer, DEPTH, threads, seconds)  # type: ignore[arg-type]
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert buffer.pins == 0
    done = queue.pair.counters().completed
    queue.pair.close()
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return rate, busy / done * 1e6, (after.ru_nvcsw - before.ru_nvcsw) / done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--delays-us", nargs="*", type=float, default=[0, 5, 100])
    parser.add_argument("--in-turn", action="store_true", help="a delay after the one before")
    options = parser.parse_args()
    controller = library()
    for delay in options.delays_us:
        seen: dict[int, list[tuple[float, float, float]]] = {1: [], 4: []}
        for _ in range(options.rounds):
            for threads, taken in seen.items():
                found = measured(controller, delay, options.in_turn, threads, options.seconds)
                taken.append(found)
        middle = {}
        for threads, taken in seen.items():
            rates, costs, switches = (sorted(column) for column in zip(*taken, strict=True))
            middle[threads] = statistics.median(rates)
            print(
                f"{delay:g} us, {threads} threads: {middle[threads]:,.0f} ({rates[-1]:,.0f}) a "
                f"second, {statistics.median(costs):.1f} us and {statistics.median(switches):.3f} "
                "switches each"
            )
        best = max(one[0] for one in seen[4]) / max(one[0] for one in seen[1])
        print(f"  four to one: {middle[4] / middle[1]:.2f} ({best:.2f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
