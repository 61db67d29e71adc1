"""Packets through a switch between two ports, by testpmd: ours, and the kernel's bridge.

    python -m tests.bench.bench_vhost_net [--rounds N] [--seconds S]

testpmd hands the packets of one port to the other (`io`), so those that it sent at first go round
for ever: through `serve vhost-user-net` from virtio-user ports, and through a bridge between
two tap interfaces in a network namespace of its own, for which one has to be root. Counted is what
testpmd receives; who begins changes from round to round.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.bench_vhost_blk import running
from tests.bench.rounds import in_turn, ratio
from tests.virtio import peers

SIZES = (64, 1500)
_LIMIT_S = 20.0
_UP, _END = "Press enter to exit", "Stopping port"
_RECEIVED = re.compile(r"^\s*RX-packets:\s*(\d+)\s+RX-dropped", re.MULTILINE)
_BRIDGE = """
ip link add br0 type bridge && ip link set br0 up || exit 1
for tap in one two; do
    ip tuntap add dev $tap mode tap multi_queue && ip link set $tap master br0 up || exit 1
done
exec "$@"
"""
IN_NAMESPACE = ["unshare", "-n", "sh", "-c", _BRIDGE, "sh"]


def command(found: peers.Peers, name: str, size: int, ports: list[str]) -> list[str]:
    """testpmd: its main core on one processor, the packets on the last one."""
    cores = sorted(os.sched_getaffinity(0))
    return [
        *found.command("dpdk-testpmd"),
        *peers.drivers(found, "bus_vdev", "mempool_ring", "net_virtio", "net_tap"),
        *("-l", f"{cores[0]},{cores[-1]}", "--no-huge", "--no-pci", "-m", "256"),
        *("--no-telemetry", f"--file-prefix={name}"),
        *(word for port in ports for word in ("--vdev", port)),
        *("--", "--forward-mode=io", "--tx-first", f"--txpkts={size}"),
        *("--total-num-mbufs=4096", "--no-flush-rx", "--auto-start"),
    ]


def packets(line: list[str], found: peers.Peers, seconds: float) -> float:
    """Thousands of packets received a second, of both ports together."""
    # On a terminal it says at once that it has begun.
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        line, env=found.env(), stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    try:
        os.close(theirs)
        assert process.stdin is not None
        said = _until(ours, _UP)
        began = time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        process.stdin.write(b"\n")
        process.stdin.flush()
        said += _until(ours, _END)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return int(_RECEIVED.findall(said)[-1]) / took / 1e3


def _until(terminal: int, mark: str) -> str:
    said, ends = "", time.monotonic() + _LIMIT_S
    while mark not in said:
        if not select.select([terminal], [], [], max(ends - time.monotonic(), 0))[0]:
            raise SystemExit(f"testpmd says no more: {said[-1000:]}")
        try:
            said += os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            raise SystemExit(f"testpmd ended: {said[-1000:]}") from None
    return said


def compare(found: peers.Peers, folder: Path, size: int, rounds: int, seconds: float) -> None:
    paths = [folder / f"{size}-{number}" for number in range(2)]
    line = [sys.executable, "-m", "vfiotool", "serve", "vhost-user-net"]
    for path in paths:
        line += ["--socket-path", str(path)]
    users = [f"net_virtio_user{number},path={path}" for number, path in enumerate(paths)]
    taps = [f"net_tap{number},iface={name}" for number, name in enumerate(("one", "two"))]
    with ExitStack() as stack:
        stack.enter_context(running(line, dict(os.environ), paths[-1]))
        ours = command(found, folder.name, size, users)
        kernel = [*IN_NAMESPACE, *command(found, folder.name, size, taps)]
        speed = in_turn(
            {
                "ours": partial(packets, ours, found, seconds),
                "bridge": partial(packets, kernel, found, seconds),
            },
            rounds,
        )
    shown = [f"{size:5} bytes"]
    for name, found_now in speed.items():
        low, high = min(found_now), max(found_now)
        median = statistics.median(found_now)
        shown.append(f"{name} {median:6.1f} thousand packets/s ({low:.0f} to {high:.0f})")
    shown.append(f"ratio {ratio(speed['ours'], speed['bridge']):5.2f}")
    print("  ".join(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    given = parser.parse_args()
    found = peers.find_net()
    if isinstance(found, str):
        raise SystemExit(found)
    with tempfile.TemporaryDirectory() as folder:
        for size in given.sizes:
            compare(found, Path(folder), size, given.rounds, given.seconds)


if __name__ == "__main__":
    main()
