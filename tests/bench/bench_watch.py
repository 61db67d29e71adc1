"""What `vfiotool watch` costs: CPU time over a minute of 100 events a second, in a lab guest.

    vfiotool lab run --machine basic -- python -m tests.bench.bench_watch [SECONDS]

edu is bound to vfio-pci and unbound fifty times a second, two events each. The processor time of
`watch` is given beside that of `udevadm monitor --kernel` for as many events, where there is one,
and beside that of a process that reads the same socket and drops what it read, which is the least
that any listener costs: under TCG only the ratios mean something.
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
IDLE_S = 5.0
# The kernel's uevents as they are, one group for all listeners (lib/kobject_uevent.c).
LEAST = """
import socket
channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15)
channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
channel.bind((0, 1))
print("listening", flush=True)
while True:
    channel.recv(8192)
"""


def cpu_s(pid: int) -> float:
    """Processor time in seconds, to the scheduler's nanosecond where it tells it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


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


def measure(name: str, command: list[str], seconds: float) -> float:
    """Print what a listener used while events came; returns its seconds for a thousand events."""
    process = start(command, f"/tmp/{name}.log")
    while "\n" not in Path(f"/tmp/{name}.log").read_text(errors="replace"):
        # It says so when it listens; before that it is only starting.
        time.sleep(0.2)
    before = cpu_s(process.pid)
    time.sleep(IDLE_S)
    idle = cpu_s(process.pid) - before
    before, own_before = cpu_s(process.pid), cpu_s(os.getpid())
    events, took = drive(seconds)
    own = cpu_s(os.getpid()) - own_before
    settled = -1.0
    while (used := cpu_s(process.pid) - before) != settled:
        settled = used
        time.sleep(1)
    process.terminate()
    process.wait()
    text = Path(f"/tmp/{name}.log").read_text(errors="replace")
    seen = sum(EDU in line for line in text.splitlines())
    print(
        f"{name:<8} {events / took:6.1f} events/s over {took:.0f} s: {used:7.3f} s of processor "
        f"({100 * used / took:.2f} %, {1e6 * used / events:.0f} us an event), idle {IDLE_S:g} s: "
        f"{1000 * idle:.1f} ms; the writer {own:.2f} s; {seen} lines for {events} events",
        flush=True,
    )
    return 1000 * used / events


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    if "VFIOTOOL_LAB_KERNEL" not in os.environ:
        sys.exit("this binds and unbinds a device: run it in a lab guest")
    subprocess.run(["modprobe", "vfio-pci"], check=False)
    (PCI / "devices" / EDU / "driver_override").write_text("vfio-pci")
    watch = measure("watch", [sys.executable, "-m", "vfiotool", "watch", "--json"], seconds)
    least = measure("least", [sys.executable, "-c", LEAST], seconds)
    print(f"watch / least: {watch / least:.2f}")
    if shutil.which("udevadm"):
        udevadm = measure("udevadm", ["udevadm", "monitor", "--kernel"], seconds)
        print(f"watch / udevadm monitor: {watch / udevadm:.2f}")


if __name__ == "__main__":
    main()
