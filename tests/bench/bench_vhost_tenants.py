"""One server for many machines, beside qemu-storage-daemon: who gets how much, and what it costs.

    python -m tests.bench.bench_vhost_tenants [--seconds S] [--rounds N]

1, 8, 64 and 256 clients with one read of 4 KiB in flight each, on disks of their own (memory, and
the peer's null-co) of one process with one thread; then 8 of them beside a neighbour at depth 128,
and beside one that is killed every second; then 256 that do nothing. The clients share a thread,
sleep until they are told, and are the same for both.
"""

from __future__ import annotations

import argparse
import ctypes
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.bench_vhost_blk import cpu_ns, running
from tests.bench.rounds import compiled
from tests.virtio import peers
from tests.virtio.frontend import DATA, T_IN, Frontend

COUNTS = (1, 8, 64, 256)
BESIDE = 8
DISK = 1 << 20
BUCKETS = 1 << 20


class Client(ctypes.Structure):
    """`struct client` of tenants.c."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("data", ctypes.c_uint64),
        ("kick", ctypes.c_int32),
        ("call", ctypes.c_int32),
        ("sectors", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("began", ctypes.c_uint64),
        ("added", ctypes.c_uint32),
        ("seen", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Window:
    """What one window gave. kIOPS, microseconds."""

    each: tuple[float, ...]
    p50: int
    p99: int
    cpu_us: float

    @property
    def total(self) -> float:
        return sum(self.each)

    def jain(self) -> float:
        squares = sum(one * one for one in self.each)
        return self.total**2 / (len(self.each) * squares) if squares else 0.0


def exports_file(folder: Path, count: int) -> Path:
    text = "version = 1\n"
    for number in range(count):
        text += f'[[export]]\nname = "d{number}"\nram = "{DISK}"\n'
        text += f'socket_path = "{folder}/ours{number}"\n'
    (folder / "exports.toml").write_text(text)
    return folder / "exports.toml"


def commands(found: peers.Peers, folder: Path, count: int, poll_us: int) -> dict[str, list[str]]:
    """Each server's command, with `count` disks on sockets NAME0, NAME1, …"""
    peer = [*found.command("qemu-storage-daemon"), "--object", "iothread,id=t"]
    for number in range(count):
        peer += ["--blockdev", f"driver=null-co,size={DISK},read-zeroes=on,node-name=d{number}"]
        at = f"addr.type=unix,addr.path={folder}/peer{number}"
        export = f"type=vhost-user-blk,id=e{number},node-name=d{number},writable=on,iothread=t"
        peer += ["--export", f"{export},{at}"]
    ours = [sys.executable, "-m", "vfiotool", "serve", "exports"]
    return {
        "peer": peer,
        "ours": [*ours, str(exports_file(folder, count)), "--poll-us", str(poll_us)],
    }


def prepare(front: Frontend) -> Client:
    """A front end whose queue runs, with the chain of a read laid down."""
    front.up()
    ring = front.rings[0]
    front.memory[DATA : DATA + 4] = T_IN.to_bytes(4, "little")
    front.put(ring, 0, [(DATA, 16, False), (DATA + 4096, 4096, True), (DATA + 16, 1, True)])
    address = ctypes.addressof(ctypes.c_char.from_buffer(front.memory))
    return Client(address, DATA, ring.kick, ring.call, DISK // 512, 0, 0, 0, 0)


@dataclass
class Tenants:
    """Clients that are connected to one server."""

    clients: ctypes.Array[Client]
    drive: Callable[..., int]
    server: int

    def window(self, seconds: float) -> Window:
        buckets = (ctypes.c_uint32 * BUCKETS)()
        for client in self.clients:
            client.done = 0
        spent, own = cpu_ns(self.server), time.process_time_ns()
        took = self.drive(self.clients, len(self.clients), int(seconds * 1e9), buckets, BUCKETS)
        cpu = cpu_ns(self.server) - spent + time.process_time_ns() - own
        done = [client.done for client in self.clients]
        each = tuple(count * 1e6 / took for count in done)
        points, seen = [], 0
        for microseconds, count in enumerate(buckets):
            seen += count
            while len(points) < 2 and seen >= sum(done) * (0.5, 0.99)[len(points)]:
                points.append(microseconds)
            if len(points) == 2:
                break
        return Window(each, points[0], points[1], cpu / 1000 / max(sum(done), 1))


@contextmanager
def connected(name: str, folder: Path, pid: int, count: int) -> Iterator[tuple[Tenants, float]]:
    """`count` clients on a server's disks, and the milliseconds that the last one took."""
    source = Path(__file__).with_name("tenants.c").read_text()
    numbers = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint32]
    drive = compiled(source, "drive", numbers)
    with ExitStack() as stack:
        fronts, took = [], 0.0
        for number in range(count):
            begun = time.perf_counter()
            front = Frontend(f"{folder}/{name}{number}", memory=2 << 20)
            # It holds the memory that its client uses.
            fronts.append((front, prepare(front)))
            took = (time.perf_counter() - begun) * 1000
            stack.callback(front.socket.close)
        yield Tenants((Client * count)(*(client for _, client in fronts)), drive, pid), took


def memory_kib(pid: int) -> tuple[int, int]:
    """A process's anonymous memory and page tables."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous = int(rollup.partition("Anonymous:")[2].split()[0])
    return anonymous, int(status.partition("VmPTE:")[2].split()[0])


@contextmanager
def neighbour(found: peers.Peers, path: str, killed_after_s: float | None) -> Iterator[None]:
    """A client at depth 128 on a disk of its own; killed and started again after that time."""
    command = [*found.command("blkio-bench"), "--runtime=120", "--iodepth=128"]
    command += ["--readwrite=randread", "virtio-blk-vhost-user", f"path={path}"]
    stop = threading.Event()

    def keep_running() -> None:
        while not stop.is_set():
            process = subprocess.Popen(command, env=found.env(), stdout=subprocess.DEVNULL)
            stop.wait(killed_after_s)
            process.send_signal(signal.SIGKILL)
            process.wait()

    thread = threading.Thread(target=keep_running)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def show(name: str, count: int, window: Window, more: str = "") -> None:
    low, high = min(window.each), max(window.each)
    silent = sum(not one for one in window.each)
    print(
        f"  {name} {count:>3} clients  total {window.total:6.1f} kIOPS"
        f"  each {low:.2f} to {high:.2f}"
        f"  Jain {window.jain():.3f}  p50 {window.p50} p99 {window.p99} µs"
        f"  CPU {window.cpu_us:.2f} µs  silent {silent}{more}",
        flush=True,
    )


def best(tenants: Tenants, seconds: float, rounds: int) -> Window:
    """The window of the median total."""
    windows = [tenants.window(seconds) for _ in range(rounds)]
    return sorted(windows, key=lambda one: one.total)[rounds // 2]


def one_server(
    name: str, command: list[str], found: peers.Peers, folder: Path, seconds: float, rounds: int
) -> None:
    for count in COUNTS:
        with running(command, found.env(), folder / f"{name}{COUNTS[-1]}") as pid:
            before = memory_kib(pid)
            try:
                with connected(name, folder, pid, count) as (tenants, took):
                    # Before the disks are read, whose memory is not the clients'.
                    now = memory_kib(pid)
                    window = best(tenants, seconds, rounds)
                    each = [round((b - a) / count) for a, b in zip(before, now, strict=True)]
                    more = f"  last connect {took:.1f} ms  KiB each {each[0]} + tables {each[1]}"
                    show(name, count, window, more)
                    if count == COUNTS[-1]:
                        idle(name, pid)
                    if count == BESIDE:
                        beside(name, tenants, found, folder, seconds, rounds)
            except Exception as error:
                print(f"  {name} {count} clients: {error!r}")


def idle(name: str, pid: int) -> None:
    """The processor time of a server whose clients do nothing."""
    time.sleep(1)
    before = cpu_ns(pid)
    time.sleep(5)
    print(f"  {name} idle: {(cpu_ns(pid) - before) / 5e7:.3f} % of a core")


def beside(
    name: str,
    tenants: Tenants,
    found: peers.Peers,
    folder: Path,
    seconds: float,
    rounds: int,
) -> None:
    path = f"{folder}/{name}{COUNTS[-1]}"
    for words, after in (("a neighbour at depth 128", None), ("one that is killed", 1.0)):
        alone, with_it = [], []
        for _ in range(rounds):
            alone.append(tenants.window(seconds).total)
            with neighbour(found, path, after):
                time.sleep(0.3)
                with_it.append(tenants.window(max(seconds, 3.0)).total)
        kept = statistics.median(b / a for a, b in zip(alone, with_it, strict=True))
        print(f"  {name} {BESIDE} clients beside {words}: they keep {kept:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--poll-us", type=int, default=0)
    given = parser.parse_args()
    found = peers.find()
    if isinstance(found, str):
        raise SystemExit(found)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # One disk more than clients: the neighbour's.
        wanted = commands(found, folder, COUNTS[-1] + 1, given.poll_us)
        for name, command in wanted.items():
            print(f"{name}, medians of {given.rounds} windows of {given.seconds:g} s")
            one_server(name, command, found, folder, given.seconds, given.rounds)


if __name__ == "__main__":
    main()
