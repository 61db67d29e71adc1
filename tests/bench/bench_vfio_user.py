"""What a register read over vfio-user costs, against a byte that goes to another process and back.

    python -m tests.bench.bench_vfio_user [--rounds N]

The model is served by a process of its own, as `serve vfio-user` does it. Rounds of both are taken
in turn; printed are the fastest round and the median of each, in microseconds a round trip, and the
ratio of the two fastest. Asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vfiotool.vfio import Device

_CALLS = 500


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - begun) / _CALLS


def echo() -> socket.socket:
    """A socket to a process that sends back what comes."""
    here, there = socket.socketpair()
    if not os.fork():
        here.close()
        while data := there.recv(64):
            there.send(data)
        os._exit(0)
    there.close()
    return here


def main(rounds: int) -> None:
    plain = echo()

    def ping() -> None:
        plain.send(b"x" * 36)
        plain.recv(64)

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/s"
        command = [sys.executable, "-m", "vfiotool", "serve", "vfio-user", "edu"]
        with subprocess.Popen([*command, "--socket-path", path]) as server:
            while not Path(path).exists():
                time.sleep(0.01)
            with Device.open(f"vfio-user:{path}") as device:
                region = device.region(0)
                ways = {"register read": lambda: region.read32(0), "byte there and back": ping}
                found: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(rounds):
                    for name, call in ways.items():
                        found[name].append(seconds(call))
            server.terminate()
    plain.close()
    for name, times in found.items():
        best, middle = min(times) * 1e6, statistics.median(times) * 1e6
        print(f"{name}: fastest round {best:.1f} us, median {middle:.1f} us")
    ratio = min(found["register read"]) / min(found["byte there and back"])
    print(f"a register read is {ratio:.1f} times a byte there and back")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    main(parser.parse_args().rounds)
