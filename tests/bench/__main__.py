"""All figures in turn: `make bench`. Prints what each bench prints; asserts nothing.

python -m tests.bench [NAME…]     only these: start mmio groups plan irq dma watch rebind nvme
                               vfio_user vhost_blk vhost_net shared_queue served_in_guest
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

LAB = [sys.executable, "-m", "vfiotool", "lab", "run", "--quiet"]
KERNELS = ("6.1", "6.12", "iommufd")
EDU = "0000:00:01.0"
BOOTS = 3


def bench(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"tests.bench.bench_{name}", *arguments]


def in_guest(command: list[str], *, bind: bool = True) -> list[str]:
    script = f"vfiotool bind {EDU} && " * bind + 'exec "$@"'
    return [*LAB, "--kernel", "iommufd", "--", "sh", "-c", script, "sh", *command]


def start() -> None:
    """Seconds from `lab run -- true` to its exit, by kernel, everything prepared."""
    for kernel in KERNELS:
        seconds = []
        for _ in range(BOOTS):
            begun = time.monotonic()
            if subprocess.run([*LAB, "--kernel", kernel, "--", "true"]).returncode:
                print(f"lab run -- true on {kernel}: not to be had")
                break
            seconds.append(time.monotonic() - begun)
        else:
            print(f"lab run -- true on {kernel}: median {statistics.median(seconds):.1f} s")


COMMANDS: dict[str, list[list[str]]] = {
    "mmio": [bench("mmio")],
    "groups": [bench("groups")],
    "plan": [bench("plan")],
    "irq": [in_guest(bench("irq", EDU, "--backend", name)) for name in ("type1", "iommufd")],
    "dma": [in_guest(bench("dma", EDU, "--backend", name)) for name in ("type1", "iommufd")],
    "watch": [in_guest(bench("watch"), bind=False)],
    "rebind": [bench("rebind")],
    "nvme": [bench("nvme")],
    "vfio_user": [bench("vfio_user")],
    "vhost_blk": [bench("vhost_blk"), bench("vhost_tenants"), bench("late_driver")],
    "vhost_net": [bench("vhost_net")],
    "shared_queue": [bench("shared_queue")],
    "served_in_guest": [bench("served_in_guest")],
}


def main(names: list[str]) -> int:
    unknown = set(names) - {"start", *COMMANDS}
    if unknown:
        print(f"no bench named {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    failed = []
    for name in names or ["start", *COMMANDS]:
        print(f"\n== {name}", flush=True)
        if name == "start":
            start()
            continue
        codes = [subprocess.run(command).returncode for command in COMMANDS[name]]
        if any(codes):
            failed.append(name)
    if failed:
        print(f"\nended with an error: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
