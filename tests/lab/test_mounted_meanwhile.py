"""A disk that somebody mounts and lets go all the time is taken while it is free, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from tests.lab.blockers_guest import disk_of, run
from tests.lab.commands import driver_of, modprobe, vfiotool

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

DISK = "0000:01:00.0"
SECONDS = 60.0
BUSY_S, FREE_S = 0.3, 0.5


def mount_now_and_then(node: str, at: Path, moments: random.Random) -> Counter[str]:
    """Until SIGTERM; counts what came of it. Nobody asks the tool, or is asked by it."""
    libc = ctypes.CDLL(None, use_errno=True)
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    counts: Counter[str] = Counter()
    while not ended:
        if libc.mount(node.encode(), os.fsencode(at), b"ext4", 0, None):
            counts[errno.errorcode[ctypes.get_errno()]] += 1
            time.sleep(moments.uniform(0, FREE_S / 20))
            continue
        try:
            for _ in range(2):
                with open(at / "file", "wb") as file:
                    file.write(os.urandom(4096))
                    file.flush()
                    os.fsync(file.fileno())
                time.sleep(moments.uniform(0, BUSY_S / 2))
            counts["kept" if driver_of(DISK) == "nvme" else "lost"] += 1
        except OSError:
            counts["lost"] += 1
        libc.umount2(os.fsencode(at), 0)
        time.sleep(moments.uniform(0, FREE_S))
    return counts


def test_no_mount_is_lost_to_a_bind_that_looked_before_it(tmp_path: Path) -> None:
    modprobe("vfio-pci")
    node = f"/dev/{disk_of(DISK)}"
    run("mkfs.ext4", "-qF", node)
    told = tmp_path / "counts"
    child = os.fork()
    if not child:
        moments = random.Random(1)
        counts = mount_now_and_then(node, tmp_path, moments)
        told.write_text(repr(dict(counts)))
        os._exit(int(counts["lost"] > 0))
    codes: Counter[int] = Counter()
    begun = time.monotonic()
    while time.monotonic() - begun < SECONDS:
        codes[vfiotool("bind", DISK).code] += 1
        if driver_of(DISK) == "vfio-pci":
            assert vfiotool("release", DISK).code == 0
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, told.read_text()
    # It came at a free disk and at a mounted one, or nothing was shown.
    assert set(codes) == {0, 4}, codes
    assert driver_of(DISK) == "nvme"
