"""NVMe random reads on null-co disks: our driver, the kernel's with fio, another program's.

    python -m tests.bench.bench_nvme [--kernel 6.12] [--rounds 5] [--peer COMMAND]

Starts a guest with four controllers over QEMU's null-co, blocks of 512 and of 4096 bytes, two on
the kernel's driver and two on vfio-pci; then measures in turn, one block a read, in rounds:

    kernel   fio, io_uring, direct, on the kernel's driver
    peer     COMMAND, with {device}, {depth}, {seconds} and {bytes} filled in; the first number of
             the last line that it prints is taken for its reads a second
    C        the loop of `vfiotool nvme bench`
    Python   a loop in Python over batches: take what is done, at least half; send as many anew
    shared   a SharedQueue, command by command: one thread with all the depth, and four with a
             quarter of it each

Prints medians and best rounds, and ratios of each. An emulated guest's absolute figures mean
nothing; its ratios do, and the best round is the one that other work on the machine disturbed
least.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import TYPE_CHECKING

from vfiotool.drivers.nvme import spec as nvme_spec

if TYPE_CHECKING:
    from vfiotool.drivers.nvme import Namespace, SharedQueue
    from vfiotool.vfio import DmaBuffer

ROOT = Path(__file__).resolve().parents[2]
CASES = [(size, depth) for size in (512, 4096) for depth in (1, 32)]
PORTS = range(0x14, 0x18)


def hardware() -> tuple[str, ...]:
    """QEMU's arguments for the four disks; their serial numbers tell role and block size."""
    words: list[str] = []
    disks = [(role, size) for role in ("kernel", "vfio") for size in (512, 4096)]
    for number, ((role, size), slot) in enumerate(zip(disks, PORTS, strict=True)):
        blocks = f"logical_block_size={size},physical_block_size={size}"
        words += [
            "-device",
            f"pcie-root-port,id=b{number},bus=pcie.0,addr={slot:#x},chassis={slot}",
        ]
        words += ["-blockdev", f"driver=null-co,node-name=n{number},size={8 << 30}"]
        words += ["-device", f"nvme,id=c{number},bus=b{number},serial={role}{size}"]
        words += ["-device", f"nvme-ns,bus=c{number},drive=n{number},nsid=1,{blocks}"]
    return tuple(words)


def outside(options: argparse.Namespace) -> int:
    from vfiotool.lab.guest import Guest

    inner = [sys.executable, "-m", __spec__.name, "--inside", "--rounds", str(options.rounds)]
    inner += ["--seconds", str(options.seconds), "--backend", options.backend]
    inner += ["--peer", options.peer] if options.peer else []
    inner += ["--ways", *options.ways, "--depths", *map(str, options.depths)]
    inner += ["--json"] if options.json else []
    arguments = {"qemu_arguments": hardware(), "load": ("nvme",), "vcpus": options.vcpus}
    with Guest("basic", options.kernel, **arguments) as guest:
        sys.stderr.write(guest.describe() + "\n")
        if options.pin:
            pin(guest._process.pid)
        done = guest.exec(inner, timeout_s=3000, env={"PYTHONPATH": str(ROOT)})
    sys.stdout.write(done.text)
    sys.stderr.write(done.stderr.decode(errors="replace"))
    return done.exit_code


def pin(qemu: int) -> None:
    """A processor for the guest's, another for QEMU's own threads, which are the controller: a
    driver that polls must not keep its device waiting for the scheduler."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        return
    for task in Path(f"/proc/{qemu}/task").iterdir():
        guest = (task / "comm").read_text().startswith("CPU ")
        os.sched_setaffinity(int(task.name), {processors[1] if guest else processors[0]})


def find(serial: str) -> str:
    """The address of the controller with this serial number, once the kernel has it."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for controller in Path("/sys/class/nvme").glob("nvme*"):
            state = (controller / "state").read_text().strip()
            if (controller / "serial").read_text().strip() == serial and state == "live":
                return (controller / "device").resolve().name
        time.sleep(0.05)
    raise SystemExit(f"no controller {serial}")


def block_device(address: str) -> str:
    for entry in Path(f"/sys/bus/pci/devices/{address}").glob("nvme/nvme*/nvme*n1"):
        return "/dev/" + re.sub(r"c\d+", "", entry.name)
    raise SystemExit(f"no block device for {address}")


def to_vfio(address: str) -> None:
    subprocess.run(["modprobe", "-a", "vfio-pci", "vfio_iommu_type1"], check=False)
    device = Path(f"/sys/bus/pci/devices/{address}")
    (device / "driver_override").write_text("vfio-pci")
    (device / "driver/unbind").write_text(address)
    (device.parent.parent / "drivers_probe").write_text(address)


def kernel(node: str, size: int, depth: int, seconds: float) -> float:
    options = f"--rw=randread --bs={size} --iodepth={depth} --runtime={seconds} --time_based"
    engine = "--ioengine=io_uring --direct=1 --output-format=json --name=kernel"
    command = ["fio", f"--filename={node}", *options.split(), *engine.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["iops"])


def peer(template: str, address: str, size: int, depth: int, seconds: float) -> float:
    whole = max(1, round(seconds))
    words = template.format(device=address, depth=depth, seconds=whole, bytes=size)
    done = subprocess.run(shlex.split(words), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    found = re.search(r"\d+(\.\d+)?", lines[-1]) if lines else None
    if done.returncode or not found:
        raise SystemExit(f"{words}: {done.stdout}{done.stderr}")
    return float(found[0])


def ours(address: str, backend: str, size: int, depth: int, batch: int, seconds: float) -> float:
    from vfiotool.drivers.nvme import bench as nvme_bench
    from vfiotool.drivers.nvme.controller import Controller
    from vfiotool.vfio import Device

    with Device.open(address, backend=backend) as device:
        controller = Controller(device)
        job = nvme_bench.Job(size_bytes=size, depth=depth, batch=batch, runtime_s=seconds)
        report = nvme_bench.run(controller, controller.namespace(1), job)
    return report.ios / report.elapsed_s


def python_loop(address: str, backend: str, size: int, depth: int, seconds: float) -> float:
    from vfiotool.drivers.nvme.batch import Batch
    from vfiotool.drivers.nvme.controller import Controller
    from vfiotool.vfio import Device

    with Device.open(address, backend=backend) as device:
        controller = Controller(device)
        disk = controller.namespace(1)
        queue = controller.create_queue(128)
        buffer = device.dma.alloc(depth * 4096)
        batch = Batch(
            queue.pair, nvme_spec.READ, 1, blocks=1, size_bytes=size, buffer=buffer, stride=4096
        )
        places = memoryview(array.array("Q", random.choices(range(disk.blocks), k=1 << 16)))
        for slot in range(depth):
            batch.slots[slot] = slot
        batch.lbas[:depth] = places[:depth]
        clock = time.perf_counter
        at, total, half = depth, 0, max(1, depth // 2)
        begin = clock()
        end = begin + seconds
        batch.submit(depth)
        while clock() < end:
            count = batch.poll(half)
            total += count
            if at + count > len(places):
                at = 0
            batch.lbas[:count] = places[at : at + count]
            at += count
            batch.submit(count)
        spent = clock() - begin
        while queue.pair.in_flight:
            batch.poll(1)
    return total / spent


def drive(
    shared: SharedQueue,
    disk: Namespace,
    buffer: DmaBuffer,
    depth: int,
    threads: int,
    seconds: float,
) -> float:
    """Reads a second of `threads` threads that keep `depth` commands out together: each waits for
    its oldest and sends another."""
    clock = time.perf_counter
    totals: list[int] = []
    # Made before the clock runs: for four threads they take four times as long.
    places = [random.choices(range(disk.blocks), k=1 << 12) for _ in range(threads)]
    ready = threading.Barrier(threads + 1)
    end = 0.0

    def work(number: int) -> None:
        lbas = places[number]
        out: deque[tuple[int, int]] = deque()
        ready.wait()
        ready.wait()
        for slot in range(number, depth, threads):
            begun = shared.begin(nvme_spec.READ, disk, lbas[slot], 1, buffer, slot * 4096)
            out.append((begun, slot))
        total = 0
        while clock() < end:
            begun, slot = out.popleft()
            shared.end(begun)
            total += 1
            lba = lbas[total & 0xFFF]
            begun = shared.begin(nvme_spec.READ, disk, lba, 1, buffer, slot * 4096)
            out.append((begun, slot))
        totals.append(total)
        for begun, _ in out:
            shared.end(begun)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    begin = clock()
    end = begin + seconds
    ready.wait()
    for worker in workers:
        worker.join()
    return sum(totals) / (clock() - begin)


def shared_queue(
    address: str, backend: str, size: int, depth: int, seconds: float, *, threads: int
) -> float:
    from vfiotool.drivers.nvme import SharedQueue
    from vfiotool.drivers.nvme.controller import Controller
    from vfiotool.vfio import Device

    with Device.open(address, backend=backend) as device:
        controller = Controller(device)
        buffer = device.dma.alloc(depth * 4096)
        with SharedQueue(controller.create_queue(128)) as shared:
            return drive(shared, controller.namespace(1), buffer, depth, threads, seconds)


def inside(options: argparse.Namespace) -> int:
    nodes = {size: block_device(find(f"kernel{size}")) for size in (512, 4096)}
    disks = {size: find(f"vfio{size}") for size in (512, 4096)}
    for address in disks.values():
        to_vfio(address)
    seen: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for size, depth in CASES:
            if depth not in options.depths:
                continue
            key = (size, depth)
            disk, seconds = disks[size], options.seconds
            if "kernel" in options.ways:
                seen[*key, "kernel"].append(kernel(nodes[size], size, depth, seconds))
            if options.peer:
                seen[*key, "peer"].append(peer(options.peer, disk, size, depth, seconds))
            batch = max(1, depth // 2)
            seen[*key, "C"].append(ours(disk, options.backend, size, depth, batch, seconds))
            if depth > 1 and "Python" in options.ways:
                rate = python_loop(disk, options.backend, size, depth, seconds)
                seen[*key, "Python"].append(rate)
            if depth > 1 and "shared" in options.ways:
                for threads in (1, 4):
                    rate = shared_queue(
                        disk, options.backend, size, depth, seconds, threads=threads
                    )
                    seen[*key, f"shared {threads}"].append(rate)
    table = [
        {
            "size_bytes": size,
            "depth": depth,
            "way": way,
            "median_iops": round(statistics.median(rates)),
            "best_iops": round(max(rates)),
        }
        for (size, depth, way), rates in seen.items()
    ]
    if options.json:
        print(json.dumps({"rounds": options.rounds, "results": table}, indent=2))
        return 0
    show(table)
    return 0


def show(table: list[dict[str, object]]) -> None:
    print(f"Linux {os.uname().release}; reads a second: median (best) of the rounds")
    rows = {(row["size_bytes"], row["depth"], row["way"]): row for row in table}
    for (size, depth, way), row in rows.items():
        line = f"{size:>5} B  QD{depth:<3} {way:<8} {row['median_iops']:>9,} ({row['best_iops']:,})"
        if (size, depth, "kernel") in rows:
            base = rows[size, depth, "kernel"]
            ratios = [f"{row[k] / base[k]:.1f}" for k in ("median_iops", "best_iops")]  # type: ignore[operator]
            line += f"   {ratios[0]} ({ratios[1]}) times the kernel"
        if (size, depth, "peer") in rows and way in ("C", "Python"):
            other = rows[size, depth, "peer"]
            ratios = [f"{row[k] / other[k]:.2f}" for k in ("median_iops", "best_iops")]  # type: ignore[operator]
            line += f", {ratios[0]} ({ratios[1]}) times the peer"
        if way == "shared 4":
            other = rows[size, depth, "shared 1"]
            ratios = [f"{row[k] / other[k]:.2f}" for k in ("median_iops", "best_iops")]  # type: ignore[operator]
            line += f", {ratios[0]} ({ratios[1]}) times one thread"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="6.12")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--peer", help="another program's command line, see above")
    ways = ["kernel", "Python", "shared"]
    parser.add_argument("--ways", nargs="*", default=ways, choices=ways, help="beside C and peer")
    parser.add_argument("--depths", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--pin", action="store_true", help="one processor each: guest, QEMU")
    parser.add_argument("--vcpus", type=int, default=1, help="for shared: two or more")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return inside(options) if options.inside else outside(options)


if __name__ == "__main__":
    raise SystemExit(main())
