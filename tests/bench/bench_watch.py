"""What `vfiotool watch` costs: CPU time over a minute of 100 events a second, in a lab guest.

    vfiotool lab run --machine basic -- python tests/bench/bench_watch.py [SECONDS]

edu is bound to vfio-pci and unbound fifty times a second, two events each. The processor time of
`watch` is given beside that of the kernel and of the writer for the same events, and of
`udevadm monitor --kernel` where there is one: under TCG only the ratios mean something.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

EDU = "0000:00:01.0"
PCI = Path("/sys/bus/pci")
TICK = os.sysconf("SC_CLK_TCK")
PAIRS_PER_S = 50


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def all_cpu_s() -> float:
    """Busy time of all processors, user and system."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / TICK


def start(command: list[str], log: str) -> subprocess.Popen[bytes]:
    with open(log, "wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def drive(seconds: float) -> tuple[int, float]:
    """Bind and unbind at the wanted rate; returns the events caused and the seconds it took."""
    unbind, probe = PCI / "drivers" / "vfio-pci" / "unbind", PCI / "drivers_probe"
    begun = time.monotonic()
    pairs = 0
    while (now := time.monotonic()) < begun + seconds:
        due = begun + pairs / PAIRS_PER_S
        if now < due:
            time.sleep(due - now)
        probe.write_text(EDU)
        unbind.write_text(EDU)
        pairs += 1
    return 2 * pairs, time.monotonic() - begun


def measure(name: str, command: list[str] | None, seconds: float) -> None:
    process = None if command is None else start(command, f"/tmp/{name}.log")
    while process and "\n" not in Path(f"/tmp/{name}.log").read_text(errors="replace"):
        # It says so when it watches; before that it is only starting.
        time.sleep(0.2)
    before = cpu_s(process.pid) if process else 0.0
    time.sleep(10)
    idle = (cpu_s(process.pid) - before) if process else 0.0
    before = cpu_s(process.pid) if process else 0.0
    all_before, own_before = all_cpu_s(), cpu_s(os.getpid())
    events, took = drive(seconds)
    time.sleep(5)
    used = (cpu_s(process.pid) - before) if process else 0.0
    busy, own = all_cpu_s() - all_before, cpu_s(os.getpid()) - own_before
    lines = ""
    if process:
        process.terminate()
        process.wait()
        text = Path(f"/tmp/{name}.log").read_text(errors="replace")
        seen = sum(EDU in line for line in text.splitlines())
        lines = f", {seen} lines for {events} events"
    print(
        f"{name:<9} {events / took:6.1f} events/s over {took:.0f} s: {used:6.2f} s CPU "
        f"({100 * used / took:.1f} %), idle 10 s: {idle:.2f} s; writer {own:.2f} s, "
        f"whole guest busy {busy:.2f} s{lines}",
        flush=True,
    )


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    if "VFIOTOOL_LAB_KERNEL" not in os.environ:
        sys.exit("this binds and unbinds a device: run it in a lab guest")
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    (PCI / "devices" / EDU / "driver_override").write_text("vfio-pci")
    measure("nobody", None, seconds)
    measure("watch", [sys.executable, "-m", "vfiotool", "watch", "--json"], seconds)
    if shutil.which("udevadm"):
        measure("udevadm", ["udevadm", "monitor", "--kernel"], seconds)


if __name__ == "__main__":
    main()
