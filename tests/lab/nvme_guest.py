"""What the NVMe tests in guests share: disks between the kernel's driver and VFIO, file systems."""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.vfio_guest import PCI, bind_vfio

DISKS = tuple(f"0000:0{number}:00.0" for number in range(1, 6))


def run(*command: str, limit_s: float = 120) -> str:
    """A command's output; fails with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def bind_nvme(address: str) -> Path:
    """Give a disk to the kernel's driver; its block device, once it is there."""
    subprocess.run(["modprobe", "nvme"], check=False)
    device = PCI / address
    (device / "driver_override").write_text("nvme")
    driver = device / "driver"
    if driver.exists() and driver.resolve().name != "nvme":
        (driver / "unbind").write_text(address)
    if not driver.exists():
        (PCI.parent / "drivers_probe").write_text(address)
    return block_device(address)


def block_device(address: str) -> Path:
    """The node of a disk's first namespace; with multipath sysfs calls it nvme0c0n1 there."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for entry in (PCI / address).glob("nvme/nvme*/nvme*n1"):
            node = Path("/dev") / re.sub(r"c\d+", "", entry.name)
            if node.is_block_device():
                return node
        time.sleep(0.05)
    raise AssertionError(f"{address} has no block device")


def to_vfio(address: str) -> str:
    """Take a disk from the kernel for VFIO; its address."""
    bind_vfio(address)
    return address


@contextlib.contextmanager
def mounted(node: Path, where: Path, *options: str) -> Iterator[Path]:
    """The file system on `node`, mounted for the time of the block."""
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(["modprobe", "-a", "ext4", "loop"], check=False)
    run("mount", *options, str(node), str(where))
    try:
        yield where
    finally:
        run("umount", str(where))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sha256_of(node: Path, size: int) -> str:
    """SHA-256 of the first `size` bytes (whole MiB) of a block device, not from the page cache."""
    digest = hashlib.sha256()
    run("blockdev", "--flushbufs", str(node))
    with node.open("rb") as file:
        for _ in range(size >> 20):
            digest.update(file.read(1 << 20))
    return digest.hexdigest()
