"""One VDUSE device for the host, then for a VM, and back: each reads what the other wrote."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.commands import modprobe, vfiotool
from tests.lab.nested import run_nested

MACHINE = "basic"
KERNELS = ("6.12",)
PROOF = "long: a guest in a guest"

MIB = 1 << 20
NAME = "vd0"
# A guest in a guest, beside others: patience.
LIMIT_S = 3600.0
WAIT_S = 300.0
# The VM reads the host's first MiB into its second, and writes its own mark into the third.
SCRIPT = """
for n in $(seq 100); do [ ! -b /dev/vda ] || break; sleep 0.1; done
echo size $(cat /sys/block/vda/size)
dd if=/dev/vda of=/dev/vda bs=64k count=16 seek=16 conv=notrunc 2>/dev/null
yes written-by-the-vm 2>/dev/null | head -c 1048576 >/tmp/mark
dd if=/tmp/mark of=/dev/vda bs=64k seek=32 conv=notrunc,fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k skip=32 count=16 2>/dev/null | cmp - /tmp/mark
"""


def until(holds: Callable[[], object], what: str) -> None:
    ends = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


def disks() -> set[str]:
    return {name for name in os.listdir("/sys/block") if name.startswith("vd")}


def bound_to(driver: str) -> None:
    done = vfiotool("vdpa", "bind", NAME, driver)
    assert done.code == 0, done.out + done.err


def host_disk() -> Path:
    """The device as a disk of this host."""
    before = disks()
    bound_to("virtio_vdpa")
    until(lambda: disks() - before, "no disk appeared")
    (name,) = disks() - before
    until(Path(f"/dev/{name}").exists, "no node appeared")
    return Path(f"/dev/{name}")


def vm_node() -> Path:
    """The device as one for a VM."""
    bound_to("vhost_vdpa")
    until(lambda: list(Path("/dev").glob("vhost-vdpa-*")), "no vhost device appeared")
    (node,) = Path("/dev").glob("vhost-vdpa-*")
    return node


@pytest.fixture(autouse=True)
def modules() -> None:
    modprobe("vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk")
    if not Path("/dev/vduse/control").exists():
        pytest.skip("this kernel has no VDUSE")


def test_a_vm_has_the_hosts_disk_and_gives_it_back(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    line = [sys.executable, "-m", "vfiotool", "serve", "vduse-blk", NAME, "--attach", "vhost"]
    server = subprocess.Popen([*line, "--blk-file", str(image)])
    try:
        until(lambda: list(Path("/dev").glob("vhost-vdpa-*")), "no vhost device appeared")
        data = random.Random(7).randbytes(MIB)
        with host_disk().open("r+b", buffering=0) as disk:
            assert disk.write(data) == MIB
            os.fsync(disk.fileno())
        device = f"vhost-vdpa-device-pci,vhostdev={vm_node()}"
        said = run_nested(tmp_path, ("virtio_pci", "virtio_blk"), SCRIPT, "-device", device)
        assert f"size {16 * MIB // 512}" in said
        with host_disk().open("rb", buffering=0) as disk:
            assert disk.read(MIB) == data
            assert disk.read(MIB) == data
            assert disk.read(MIB) == (b"written-by-the-vm\n" * (MIB // 18 + 1))[:MIB]
    finally:
        removed = vfiotool("vdpa", "remove", NAME)
        server.send_signal(signal.SIGTERM)
        code = server.wait(WAIT_S)
    assert (removed.code, code) == (0, 0), removed.err
