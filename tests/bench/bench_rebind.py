"""Rebinding one device and eight, against driverctl in the same guest.

    python -m tests.bench.bench_rebind [--kernel 6.12] [--runs 5]     on the host: boots a guest

One round takes devices to vfio-pci and gives them back. Three ways: the library in a warm process,
the command as a process of its own, and driverctl (which takes one device a call, and is given
them one after another). The devices are four without a driver and four VFs on igbvf. Medians;
times of an emulated guest are ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PCI = Path("/sys/bus/pci")


def make_vfs() -> None:
    """Four VFs of the network card, on igbvf: with the bare devices they make eight."""
    subprocess.run(["modprobe", "-a", "vfio-pci", "igbvf"], check=True)
    for path in (PCI / "devices").glob("*/sriov_numvfs"):
        if driver_of(path.parent.name) == "igb":
            path.write_text("4")


def driver_of(address: str) -> str | None:
    driver = PCI / "devices" / address / "driver"
    return driver.resolve().name if driver.exists() else None


def endpoints(count: int) -> list[str]:
    """Functions that may be rebound freely: those without a driver, then the VFs, then disks."""
    order = {None: 0, "igbvf": 1, "nvme": 2}
    found = []
    for path in sorted((PCI / "devices").iterdir()):
        bridge = (path / "class").read_text().startswith("0x06")
        lab = path.name.startswith(("0000:00:1e", "0000:00:1f"))
        if (
            not bridge
            and not lab
            and driver_of(path.name) in order
            and (path / "iommu_group").exists()
        ):
            found.append(path.name)
    if len(found) < count:
        raise SystemExit(f"this machine has only {len(found)} devices that may be rebound")
    return sorted(found, key=lambda name: (order[driver_of(name)], name))[:count]


def library() -> Callable[[list[str]], None]:
    """A round of the library, in a process that has one host and one journal for all of them."""
    from vfiotool.change.apply import change
    from vfiotool.change.journal import Journal
    from vfiotool.change.plans.bind import plan_bind, plan_release
    from vfiotool.change.plans.facts import read_facts
    from vfiotool.change.steps.base import Step
    from vfiotool.host.host import Host

    host = Host.local()
    journal = Journal(host)

    def round_trip(devices: list[str]) -> None:
        def planned(plan: Callable[..., tuple[Step, ...]]) -> tuple[Step, ...]:
            return plan(read_facts(host, devices, journal), devices)

        change(host, journal, "bind", partial(planned, plan_bind))
        change(host, journal, "release", partial(planned, plan_release))

    return round_trip


def by_command(devices: list[str]) -> None:
    for verb in ("bind", "release"):
        command = [sys.executable, "-m", "vfiotool", verb, *devices]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def by_driverctl(devices: list[str]) -> None:
    for arguments in (["set-override"], ["unset-override"]):
        for device in devices:
            driver = ["vfio-pci"] if arguments == ["set-override"] else []
            command = ["driverctl", "--nosave", *arguments, device, *driver]
            # It calls it a failure if no driver takes a device back that had none before.
            subprocess.run(
                command, check=bool(driver), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )


def measure(runs: int) -> dict[str, dict[str, float]]:
    """In a guest: the median wall time of a round, by number of devices and way."""
    make_vfs()
    ways: dict[str, Callable[[list[str]], None]] = {
        "library": library(),
        "command": by_command,
        "driverctl": by_driverctl,
    }
    result: dict[str, dict[str, float]] = {}
    for count in (1, 8):
        devices = endpoints(count)
        drivers = [driver_of(device) for device in devices]
        times: dict[str, list[float]] = {name: [] for name in ways}
        ways["library"](devices)
        for _ in range(runs):
            for name, way in ways.items():
                begun = time.perf_counter()
                way(devices)
                times[name].append(time.perf_counter() - begun)
                assert [driver_of(device) for device in devices] == drivers, name
        result[str(len(devices))] = {
            name: statistics.median(values) for name, values in times.items()
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", default="6.12")
    parser.add_argument("--machine", default="full")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--in-guest", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_guest:
        print(json.dumps(measure(options.runs)))
        return
    inside = [sys.executable, "-m", __spec__.name, "--in-guest", "--runs", str(options.runs)]
    command = [sys.executable, "-m", "vfiotool", "lab", "run", "--machine", options.machine]
    command += ["--kernel", options.kernel, "--timeout", "1800", "--", *inside]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for count, times in json.loads(done.stdout.splitlines()[-1]).items():
        base = times["driverctl"]
        print(f"{count} devices, there and back:")
        for name, seconds in times.items():
            print(f"  {name:10} {seconds:7.3f} s   {seconds / base:5.2f} of driverctl")


if __name__ == "__main__":
    main()
