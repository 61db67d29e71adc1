"""Disks served inside a guest: over VDUSE, and an NVMe disk by its own driver; beside
qemu-storage-daemon.

    python -m tests.bench.bench_served_in_guest [--kernel 6.12] [--rounds 5] [--only vduse|nvme]

Starts a guest with four controllers over QEMU's null-co, one on the kernel's driver and the rest on
vfio-pci, and measures there, 4 KiB at random at depth 1 and 32, in rounds of which each begins with
another one:

    vduse   fio (io_uring, direct) on the disk that the kernel has of a server's VDUSE device: ours
            with --ram beside the peer's null-co, and a file on tmpfs beside the same of the peer
    nvme    blkio-bench on a vhost-user socket: `--nvme` beside the peer on the kernel's disk with
            io_uring, and without a socket the loop of `vfiotool nvme bench`, which only polls

Prints medians of each way and of the ratios of each round, in brackets the least and the greatest
ratio; processor time is the server's for each request. An emulated guest's absolute figures mean
nothing; its ratios do.

`--peer-driver` adds the peer's own `nvme://` driver. It did not come up in the lab's guests: the
IOMMU refuses what the controller writes into the buffer of its first Identify, which is at the top
of the I/O addresses, and it waits for ever.
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
from typing import Any, NamedTuple

from tests.bench import bench_nvme
from tests.bench.bench_vhost_blk import cpu_ns, our_command, peer_command, running
from tests.virtio import peers

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("ours", "peer", "kernel", "loop")
KINDS = ("randread", "randwrite")
SIZE = 64 << 20
_START_S = 60.0


class Done(NamedTuple):
    """Requests a second, and what its server spends on each in microseconds of processor time."""

    rate: float
    us: float


Load = Callable[[int, str, float], Done]
"""Requests of 4 KiB at this depth, of this kind, for so many seconds."""


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
    inner += ["--depths", *map(str, options.depths)]
    inner += ["--peer-driver"] if options.peer_driver else []
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


def virtio_disks() -> set[str]:
    return {name for name in os.listdir("/sys/block") if name.startswith("vd")}


def vfiotool(*words: str) -> None:
    command = [sys.executable, "-m", "vfiotool", *words]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def vduse(command: list[str], environment: dict[str, str], name: str) -> Iterator[tuple[int, str]]:
    """A server's process id and the node of its disk; the device goes before its server."""
    before = virtio_disks()
    with running(command, environment, Path("/dev/vduse", name)) as pid:
        vfiotool("vdpa", "add", name, "vduse", "--driver", "virtio_vdpa")
        try:
            until(lambda: bool(virtio_disks() - before), f"{name} is no disk")
            [disk] = virtio_disks() - before
            until(Path("/dev", disk).exists, f"/dev/{disk} is not there")
            yield pid, f"/dev/{disk}"
        finally:
            vfiotool("vdpa", "remove", name)


def spent_us(text: str) -> float:
    """The processor time in a process's `stat` (proc_pid_stat(5)), with that of threads that have
    ended."""
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) * 1e6 / os.sysconf("SC_CLK_TCK")


def fio(disks: dict[str, tuple[int, str]], depths: list[int], rounds: int, seconds: float) -> None:
    """Measure disks, each with its server, in turn: all in one run of fio, whose start takes longer
    in an emulated guest than a measurement. A server's processor time is read just before and just
    after each job's requests."""
    order = [
        (depth, kind, number, name)
        for number in range(rounds + 1)
        for depth in depths
        for kind in KINDS
        for name in (list(disks) if number % 2 else reversed(disks))
    ]
    lines = ["[global]", "ioengine=io_uring", "direct=1", "norandommap", "bs=4k", "time_based"]
    lines += ["thread", f"runtime={seconds}"]
    for depth, kind, number, name in order:
        pid, node = disks[name]
        look = f"cat /proc/{pid}/stat"
        lines += [f"[{name}-{depth}-{kind}-{number}]", "stonewall", f"filename={node}"]
        lines += [f"rw={kind}", f"iodepth={depth}", f"exec_prerun={look}", f"exec_postrun={look}"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "jobs").write_text("\n".join([*lines, ""]))
        command = ["fio", "--output-format=json", "--output=told", "jobs"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        text = Path(folder, "told").read_text()
        # What fio says of the looks may be before its JSON.
        jobs = {job["jobname"]: job for job in json.loads(text[text.index("{\n") :])["jobs"]}
        found = {
            job: fio_job(Path(folder), jobs["-".join(map(str, (job[3], *job[:3])))], job[1])
            for job in order
        }
    for depth in depths:
        for kind in KINDS:
            taken = {
                name: [found[depth, kind, number, name] for number in range(1, rounds + 1)]
                for name in disks
            }
            print(shown(depth, kind, taken), flush=True)


def fio_job(folder: Path, job: dict[str, Any], kind: str) -> Done:
    before, after = (
        spent_us((folder / f"{job['jobname']}.{when}.txt").read_text())
        for when in ("prerun", "postrun")
    )
    done = job[kind.removeprefix("rand")]
    return Done(float(done["iops"]), (after - before) / done["total_ios"])


def blkio(found: peers.Peers, path: Path, pid: int, depth: int, kind: str, seconds: float) -> Done:
    """What the server spends when it is connected to is counted with the requests."""
    whole = max(1, round(seconds))
    command = [
        *found.command("blkio-bench"),
        *(f"--runtime={whole}", f"--iodepth={depth}", f"--readwrite={kind}"),
        *("virtio-blk-vhost-user", f"path={path}"),
    ]
    before = cpu_ns(pid)
    done = subprocess.run(command, env=found.env(), capture_output=True, text=True, check=True)
    rate = 1000 * float(json.loads(done.stdout)["aggregate"]["kiops"])
    return Done(rate, (cpu_ns(pid) - before) / 1e3 / (rate * whole))


def compare(ways: dict[str, Load], depths: list[int], rounds: int, seconds: float) -> None:
    """Lines for each depth and kind; the first way is ours. The first round does not count."""
    for depth in depths:
        for kind in KINDS:
            taken: dict[str, list[Done]] = {name: [] for name in ways}
            for number in range(rounds + 1):
                start = number % len(ways)
                for name in (names := list(ways))[start:] + names[:start]:
                    taken[name].append(ways[name](depth, kind, seconds))
            counted = {name: values[1:] for name, values in taken.items()}
            print(shown(depth, kind, counted), flush=True)


def shown(depth: int, kind: str, taken: dict[str, list[Done]]) -> str:
    """Medians of each way, and of each round's ratio of the first to the others."""
    words = [f"  depth {depth:<3} {kind:<9}"]
    for name, values in taken.items():
        rate, us = (statistics.median(column) for column in zip(*values, strict=True))
        words.append(f"{name} {rate:8,.0f} a second {us:6.1f} us")
    ours, *others = taken
    for name in others:
        pairs = list(zip(taken[ours], taken[name], strict=True))
        each = sorted(mine.rate / other.rate for mine, other in pairs)
        cpu = statistics.median(mine.us / other.us for mine, other in pairs)
        speed = f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"
        words.append(f"to {name}: speed {speed}, processor {cpu:.2f}")
    return "  ".join(words)


def compare_vduse(found: peers.Peers, options: argparse.Namespace) -> None:
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
            ours += ["--poll-us", str(options.poll_us), *disk]
            with ExitStack() as stack:
                disks = {
                    name: stack.enter_context(vduse(command, found.env(), name))
                    for name, command in {"ours": ours, "peer": peer}.items()
                }
                print(title, flush=True)
                fio(disks, options.depths, options.rounds, options.seconds)


@contextmanager
def loop(address: str) -> Iterator[Load]:
    """The loop of `vfiotool nvme bench` in this process, which only polls."""
    from vfiotool.drivers.nvme import bench
    from vfiotool.drivers.nvme.controller import Controller
    from vfiotool.vfio import Device

    with Device.open(address) as device, Controller(device) as controller:
        disk = controller.namespace(1)

        def load(depth: int, kind: str, seconds: float) -> Done:
            batch = max(1, depth // 4)
            job = bench.Job(
                pattern=kind, size_bytes=4096, depth=depth, batch=batch, runtime_s=seconds
            )
            before = time.process_time_ns()
            report = bench.run(controller, disk, job)
            spent = time.process_time_ns() - before
            return Done(report.ios / report.elapsed_s, spent / 1e3 / report.ios)

        yield load


def compare_nvme(found: peers.Peers, options: argparse.Namespace) -> None:
    places = {role: bench_nvme.find(role) for role in ROLES}
    node = bench_nvme.block_device(places["kernel"])
    for role in ("ours", "peer", "loop"):
        bench_nvme.to_vfio(places[role])
    nvme = f"driver=nvme,device={places['peer']},namespace=1"
    kernel = f"driver=host_device,filename={node},aio=io_uring,cache.direct=on"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sockets = {role: Path(folder, role) for role in ROLES}
        commands = {
            "ours": our_command(
                ["--nvme", f"{places['ours']}/1"], sockets["ours"], options.poll_us
            ),
            "kernel": peer_command(found, kernel, sockets["kernel"]),
        }
        if options.peer_driver:
            commands["peer"] = peer_command(found, nvme, sockets["peer"])
        ways: dict[str, Load] = {}
        for role, command in commands.items():
            pid = stack.enter_context(running(command, found.env(), sockets[role]))
            ways[role] = partial(blkio, found, sockets[role], pid)
        ways["loop"] = stack.enter_context(loop(places["loop"]))
        print("NVMe", flush=True)
        compare(ways, options.depths, options.rounds, options.seconds)


def inside(options: argparse.Namespace) -> int:
    found = peers.Peers(Path(options.peers))
    if options.only != "nvme":
        compare_vduse(found, options)
    if options.only != "vduse":
        compare_nvme(found, options)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="6.12")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--poll-us", type=int, default=50)
    parser.add_argument("--only", choices=("vduse", "nvme"))
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--peer-driver", action="store_true")
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peers", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return inside(options) if options.inside else outside(options)


if __name__ == "__main__":
    raise SystemExit(main())
