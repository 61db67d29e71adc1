"""How slow an emulated guest is: the same small work there and on its host.

tests/guests/runs.py measures it on the host and hands it to the guest, whose tests can then hold a
bound that is meant for a machine of today: 1 s times as many as the guest is slower.
"""

from __future__ import annotations

import json
import os
import time

HOST_S = "VFIOTOOL_YARDSTICK_S"


def measure(times: int = 3) -> float:
    """Seconds of work like that of a change: small files, JSON, a process. The best of `times`."""
    return min(_work() for _ in range(times))


def slowness() -> float:
    """How many times slower than its host this guest is now; 1 where the host was not measured."""
    host_s = float(os.environ.get(HOST_S, "inf"))
    return max(1.0, measure() / host_s)


def _work() -> float:
    begun = time.monotonic()
    for _ in range(20):
        with open("/proc/self/stat") as file:
            fields = file.read().split()
        json.loads(json.dumps({name: [name] for name in fields}))
        os.listdir("/proc/self/fd")
        os.path.exists("/sys/bus/pci/nothing")
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return time.monotonic() - begun
