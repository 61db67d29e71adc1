"""Disks over vhost-user, beside qemu-storage-daemon, with the neutral client blkio-bench.

    python -m tests.bench.bench_vhost_blk [--rounds N] [--seconds S] [--only memory|file|python]

4 KiB random reads and writes at depth 1, 32 and 128: a disk in memory beside the peer's null-co,
and a file on tmpfs beside the peer's raw file; ours without polling and with the adaptive polling
that the table names; and a disk in memory that is a class in Python, at depth 32, beside the peer's
null-co. Who begins changes from round to round. The table has the median of the ratios
of each round; processor time is that of both processes, server and client, for each operation.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.rounds import in_turn, ratio
from tests.virtio import peers

SIZE = 256 << 20
DEPTHS = (1, 32, 128)
POLL_US = 50
_START_S = 60.0


@dataclass(frozen=True)
class Served:
    """A server process and the socket that it listens on."""

    name: str
    pid: int
    path: str


@dataclass(frozen=True)
class Result:
    kiops: float
    cpu_us: float
    """Processor time for each operation, of both ends."""


@contextmanager
def running(command: list[str], environment: dict[str, str], path: Path) -> Iterator[int]:
    """A server's process id, once its socket is there, until the block ends. What it says of its
    clients is not shown."""
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _START_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{' '.join(command)} does not listen")
            select.select([], [], [], 0.01)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=_START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def peer_command(found: peers.Peers, node: str, path: Path) -> list[str]:
    """qemu-storage-daemon with a block node on a socket, in a thread of its own."""
    export = "type=vhost-user-blk,id=e,node-name=d,writable=on,iothread=t"
    return [
        *found.command("qemu-storage-daemon"),
        *("--object", "iothread,id=t", "--blockdev", f"{node},node-name=d"),
        *("--export", f"{export},addr.type=unix,addr.path={path}"),
    ]


def our_command(disk: list[str], path: Path, poll_us: int) -> list[str]:
    command = [sys.executable, "-m", "vfiotool", "serve", "vhost-user-blk"]
    return [*command, "--socket-path", str(path), "--poll-us", str(poll_us), *disk]


def cpu_ns(pid: int) -> int:
    """The processor time of a process, with that of threads that have ended: its clock as
    clock_getcpuclockid(3) gives it."""
    return time.clock_gettime_ns(~pid << 3 | 2)


def measure(found: peers.Peers, server: Served, depth: int, kind: str, seconds: int) -> Result:
    command = [
        *found.command("blkio-bench"),
        *(f"--runtime={seconds}", f"--iodepth={depth}", f"--readwrite={kind}"),
        *("virtio-blk-vhost-user", f"path={server.path}"),
    ]
    before, own = cpu_ns(server.pid), os.times()
    done = subprocess.run(command, env=found.env(), capture_output=True, text=True, check=True)
    after = os.times()
    spent = (cpu_ns(server.pid) - before) / 1e9 + (
        after.children_user - own.children_user + after.children_system - own.children_system
    )
    kiops = float(json.loads(done.stdout)["aggregate"]["kiops"])
    return Result(kiops, spent * 1e6 / (kiops * 1000 * seconds))


def python_command(path: Path) -> list[str]:
    name = "vfiotool.virtio.storage:MemoryStorage"
    return [
        sys.executable,
        "-m",
        "vfiotool",
        "serve",
        "vhost-user",
        name,
        "--socket-path",
        str(path),
    ]


def compare_python(
    found: peers.Peers, stack: ExitStack, folder: Path, rounds: int, seconds: int
) -> None:
    """A disk that is a class in Python, and the peer's of as many bytes."""
    print(f"a class in Python, {rounds} rounds of {seconds} s", flush=True)
    path = folder / "peer-python"
    command = peer_command(found, f"driver=null-co,size={64 << 20},read-zeroes=on", path)
    peer = Served("peer", stack.enter_context(running(command, found.env(), path)), str(path))
    path = folder / "python"
    pid = stack.enter_context(running(python_command(path), dict(os.environ), path))
    ours = Served("ours", pid, str(path))
    fill(found, ours)
    for kind in ("randread", "randwrite"):
        line(found, peer, ours, 32, kind, rounds, seconds, 0)


def fill(found: peers.Peers, server: Served) -> None:
    """Write a disk once: what is compared later is not the first use of its memory."""
    command = [*found.command("blkio-bench"), "--runtime=2", "--iodepth=4", "--blocksize=1048576"]
    command += ["--readwrite=write", "virtio-blk-vhost-user", f"path={server.path}"]
    subprocess.run(command, env=found.env(), capture_output=True, check=True)


def serve_all(found: peers.Peers, stack: ExitStack, folder: Path) -> dict[str, list[Served]]:
    """The servers of each comparison, the peer first."""
    shared = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
    for name in ("peer", "ours"):
        with open(shared / name, "wb") as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(4096) * 256)
    null = f"driver=null-co,size={SIZE},read-zeroes=on"
    raw = f"driver=raw,file.driver=file,file.filename={shared / 'peer'}"
    wanted = {
        "memory": (null, ["--ram", str(SIZE)]),
        "file on tmpfs": (raw, ["--blk-file", str(shared / "ours")]),
    }
    served: dict[str, list[Served]] = {}
    for number, (name, (node, disk)) in enumerate(wanted.items()):
        path = folder / f"peer{number}"
        pid = stack.enter_context(running(peer_command(found, node, path), found.env(), path))
        served[name] = [Served("peer", pid, str(path))]
        path = folder / f"ours{number}"
        # One server at a time can have the image: polling is switched by starting it again.
        served[name].append(Served(" ".join(disk), 0, str(path)))
    return served


def compare(
    found: peers.Peers, stack: ExitStack, servers: list[Served], rounds: int, seconds: int
) -> None:
    """Measure the peer and ours with both ways of polling, and print a line for each."""
    peer, ours = servers
    for poll_us in (0, POLL_US):
        with ExitStack() as running_now:
            path = Path(ours.path)
            command = our_command(ours.name.split(), path, poll_us)
            pid = running_now.enter_context(running(command, dict(os.environ), path))
            now = Served("ours", pid, ours.path)
            fill(found, now)
            for depth in DEPTHS:
                for kind in ("randread", "randwrite"):
                    line(found, peer, now, depth, kind, rounds, seconds, poll_us)


def line(
    found: peers.Peers,
    peer: Served,
    ours: Served,
    depth: int,
    kind: str,
    rounds: int,
    seconds: int,
    poll_us: int,
) -> None:
    taken: dict[str, list[Result]] = {"peer": [], "ours": []}

    def once(server: Served) -> float:
        taken[server.name].append(measure(found, server, depth, kind, seconds))
        return taken[server.name][-1].kiops

    speed = in_turn({one.name: partial(once, one) for one in (peer, ours)}, rounds)
    cpu = {name: [one.cpu_us for one in results[1:]] for name, results in taken.items()}
    shown = [f"  depth {depth:<4} {kind:<9} poll {poll_us:>3} µs"]
    for name in ("peer", "ours"):
        kiops, spent = statistics.median(speed[name]), statistics.median(cpu[name])
        shown.append(f"{name} {kiops:6.1f} kIOPS {spent:6.2f} µs")
    shown.append(f"speed {ratio(speed['ours'], speed['peer']):5.2f}")
    shown.append(f"CPU {ratio(cpu['ours'], cpu['peer']):5.2f}")
    print("  ".join(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=1)
    parser.add_argument("--only", choices=("memory", "file", "python"))
    given = parser.parse_args()
    found = peers.find()
    if isinstance(found, str):
        raise SystemExit(found)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, servers in serve_all(found, stack, folder).items():
            if given.only not in (None, name.split()[0]):
                continue
            print(f"{name}, {given.rounds} rounds of {given.seconds} s", flush=True)
            compare(found, stack, servers, given.rounds, given.seconds)
        if given.only in (None, "python"):
            compare_python(found, stack, folder, given.rounds, given.seconds)


if __name__ == "__main__":
    main()
