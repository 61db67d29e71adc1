"""Disks served inside a guest: over VDUSE, and an NVMe disk by its own driver; beside
qemu-storage-daemon.

    python -m tests.bench.bench_served_in_guest [--kernel 6.12] [--rounds 5] [--only vduse|nvme]

Starts a guest with three controllers over QEMU's null-co, one on the kernel's driver and two on
vfio-pci, and measures there, 4 KiB at random at depth 1 and 32, in rounds of which each begins with
another one:

    vduse   fio (io_uring, direct) on the disk that the kernel has of a server's VDUSE device: ours
            with --ram beside the peer's null-co, and a file on tmpfs beside the same of the peer
    nvme    blkio-bench on a vhost-user socket: `--nvme` beside the peer's `nvme://` driver and
            beside the peer on the kernel's disk with io_uring

The table has the median of the ratios of each round; processor time is the server's for each
request. An emulated guest's absolute figures mean nothing; its ratios do.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.bench import bench_nvme
from tests.bench.bench_vhost_blk import cpu_ns, our_command, peer_command, running
from tests.bench.rounds import in_turn, ratio
from tests.virtio import peers

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("ours", "peer", "kernel")
DEPTHS = (1, 32)
KINDS = ("randread", "randwrite")
SIZE = 64 << 20
_START_S = 60.0

Load = Callable[[int, str, float], float]
"""Requests a second of 4 KiB at this depth, of this kind, for so many seconds."""


def hardware() -> tuple[str, ...]:
    """QEMU's arguments for a disk for each role, which is its serial number."""
    words: list[str] = []
    for number, role in enumerate(ROLES):
        slot = bench_nvme.PORTS[number]
        port = f"pcie-root-port,id=b{number},bus=pcie.0,addr={slot:#x},chassis={slot}"
        words += ["-device", port]
        words += ["-blockdev", f"driver=null-co,node-name=n{number},size={8 << 30}"]
        words += ["-device", f"nvme,id=c{number},bus=b{number},serial={role}"]
        words += ["-device", f"nvme-ns,bus=c{number},drive=n{number},nsid=1"]
    return tuple(words)


def outside(options: argparse.Namespace) -> int:
    from vfiotool.lab.guest import Guest

    found = peers.find()
    if isinstance(found, str):
        raise SystemExit(found)
    inner = [sys.executable, "-m", __spec__.name, "--inside", "--peers", str(found.folder)]
    inner += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    inner += ["--poll-us", str(options.poll_us)]
    inner += ["--only", options.only] if options.only else []
    arguments = {"qemu_arguments": hardware(), "load": ("nvme",), "vcpus": options.vcpus}
    with Guest("basic", options.kernel, **arguments) as guest:
        sys.stderr.write(guest.describe() + "\n")
        done = guest.exec(inner, timeout_s=3000, env={"PYTHONPATH": str(ROOT)})
    sys.stdout.write(done.text)
    sys.stderr.write(done.stderr.decode(errors="replace"))
    return done.exit_code


def until(there: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _START_S
    while not there():
        if time.monotonic() > end:
            raise SystemExit(what)
        select.select([], [], [], 0.05)


def disks() -> set[str]:
    return {name for name in os.listdir("/sys/block") if name.startswith("vd")}


def vfiotool(*words: str) -> None:
    command = [sys.executable, "-m", "vfiotool", *words]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def vduse(command: list[str], environment: dict[str, str], name: str) -> Iterator[tuple[int, str]]:
    """A server's process id and the node of its disk; the device goes before its server."""
    before = disks()
    with running(command, environment, Path("/dev/vduse", name)) as pid:
        vfiotool("vdpa", "add", name, "vduse", "--driver", "virtio_vdpa")
        try:
            until(lambda: bool(disks() - before), f"{name} is no disk")
            [disk] = disks() - before
            until(Path("/dev", disk).exists, f"/dev/{disk} is not there")
            yield pid, f"/dev/{disk}"
        finally:
            vfiotool("vdpa", "remove", name)


def fio(node: str, depth: int, kind: str, seconds: float) -> float:
    options = f"--rw={kind} --bs=4k --iodepth={depth} --runtime={seconds} --time_based"
    engine = "--ioengine=io_uring --direct=1 --norandommap --output-format=json --name=it"
    command = ["fio", f"--filename={node}", *options.split(), *engine.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["jobs"][0][kind.removeprefix("rand")]["iops"])


def blkio(found: peers.Peers, path: Path, depth: int, kind: str, seconds: float) -> float:
    command = [
        *found.command("blkio-bench"),
        *(f"--runtime={max(1, round(seconds))}", f"--iodepth={depth}", f"--readwrite={kind}"),
        *("virtio-blk-vhost-user", f"path={path}"),
    ]
    done = subprocess.run(command, env=found.env(), capture_output=True, text=True, check=True)
    return 1000 * float(json.loads(done.stdout)["aggregate"]["kiops"])


def measure(
    pid: int, load: Load, depth: int, kind: str, seconds: float, spent: list[float]
) -> float:
    """Requests a second; what the server spends on each, in µs, is added to `spent`."""
    before = cpu_ns(pid)
    rate = load(depth, kind, seconds)
    spent.append((cpu_ns(pid) - before) / 1e3 / (rate * seconds))
    return rate


def compare(title: str, ways: dict[str, tuple[int, Load]], rounds: int, seconds: float) -> None:
    """Lines for each depth and kind; the first way is ours. Each way is its server and a load."""
    print(f"{title}, {rounds} rounds of {seconds:g} s", flush=True)
    for depth in DEPTHS:
        for kind in KINDS:
            spent: dict[str, list[float]] = {name: [] for name in ways}

            turns = {
                name: partial(measure, *way, depth, kind, seconds, spent[name])
                for name, way in ways.items()
            }
            rates = in_turn(turns, rounds)
            ours, *others = ways
            shown = [f"  depth {depth:<3} {kind:<9}"]
            for name in ways:
                rate, cpu = statistics.median(rates[name]), statistics.median(spent[name][1:])
                shown.append(f"{name} {rate:8,.0f} a second {cpu:6.1f} µs")
            for name in others:
                speed = ratio(rates[ours], rates[name])
                cpu = ratio(spent[ours][1:], spent[name][1:])
                shown.append(f"to {name}: speed {speed:.2f}, CPU {cpu:.2f}")
            print("  ".join(shown), flush=True)


def compare_vduse(found: peers.Peers, poll_us: int, rounds: int, seconds: float) -> None:
    subprocess.run(["modprobe", "-a", "vduse", "virtio_vdpa", "virtio_blk"], check=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        for name in ("ours", "peer"):
            Path(shared, name).write_bytes(os.urandom(4096) * (SIZE // 4096))
        file = f"driver=raw,file.driver=file,file.filename={shared}/peer"
        null = f"driver=null-co,size={SIZE},read-zeroes=on"
        kinds = {
            "VDUSE, memory": (["--ram", str(SIZE)], null),
            "VDUSE, file on tmpfs": (["--blk-file", f"{shared}/ours"], file),
        }
        for title, (disk, node) in kinds.items():
            export = "type=vduse-blk,id=e,node-name=d,name=peer,writable=on,iothread=t"
            peer = [*found.command("qemu-storage-daemon"), "--object", "iothread,id=t"]
            peer += ["--blockdev", f"{node},node-name=d", "--export", export]
            ours = [sys.executable, "-m", "vfiotool", "serve", "vduse-blk", "ours"]
            ours += ["--poll-us", str(poll_us), *disk]
            with ExitStack() as stack:
                ways: dict[str, tuple[int, Load]] = {}
                for name, command in {"ours": ours, "peer": peer}.items():
                    pid, at = stack.enter_context(vduse(command, found.env(), name))
                    ways[name] = pid, partial(fio, at)
                compare(title, ways, rounds, seconds)


def compare_nvme(found: peers.Peers, poll_us: int, rounds: int, seconds: float) -> None:
    places = {role: bench_nvme.find(role) for role in ROLES}
    node = bench_nvme.block_device(places["kernel"])
    for role in ("ours", "peer"):
        bench_nvme.to_vfio(places[role])
    nvme = f"driver=nvme,device={places['peer']},namespace=1"
    kernel = f"driver=host_device,filename={node},aio=io_uring,cache.direct=on"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sockets = {role: Path(folder, role) for role in ROLES}
        commands = {
            "ours": our_command(["--nvme", f"{places['ours']}/1"], sockets["ours"], poll_us),
            "peer": peer_command(found, nvme, sockets["peer"]),
            "kernel": peer_command(found, kernel, sockets["kernel"]),
        }
        ways: dict[str, tuple[int, Load]] = {}
        for role, command in commands.items():
            pid = stack.enter_context(running(command, found.env(), sockets[role]))
            ways[role] = pid, partial(blkio, found, sockets[role])
        compare("NVMe", ways, rounds, seconds)


def inside(options: argparse.Namespace) -> int:
    found = peers.Peers(Path(options.peers))
    if options.only != "nvme":
        compare_vduse(found, options.poll_us, options.rounds, options.seconds)
    if options.only != "vduse":
        compare_nvme(found, options.poll_us, options.rounds, options.seconds)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="6.12")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--poll-us", type=int, default=50)
    parser.add_argument("--only", choices=("vduse", "nvme"))
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peers", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return inside(options) if options.inside else outside(options)


if __name__ == "__main__":
    raise SystemExit(main())
