"""A file system through the kernel's driver and through ours, both ways, checked by the kernel."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from tests.lab.nvme_guest import DISKS, bind_nvme, checksums, mounted, run, sha256_of, to_vfio
from tests.lab.vfio_guest import BACKENDS
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.vfio import Device

MACHINE = "storage"
KERNELS = ("6.1", "6.12", "iommufd")
DISK = DISKS[0]
# Of the disk's 128 MiB: hashing is slow in an emulated guest.
SIZE = 40 << 20


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def fill(folder: Path, seed: int) -> None:
    """Files of many sizes, some large, some sparse, in folders."""
    source = random.Random(seed)
    for number in range(60):
        path = folder / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.randbytes(source.choice([0, 1, 511, 4096, 70_001, 900_000])))
    with (folder / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(source.randbytes(1000))


def test_what_the_kernel_wrote_is_read_block_for_block(backend: str, tmp_path: Path) -> None:
    node = bind_nvme(DISK)
    run("mkfs.ext4", "-q", "-F", str(node), f"{SIZE >> 10}k")
    with mounted(node, tmp_path / "there") as there:
        fill(there, 1)
        written = checksums(there)
    whole = sha256_of(node, SIZE)

    to_vfio(DISK)
    image = tmp_path / "image"
    with Device.open(DISK, backend=backend) as device:
        controller = Controller(device)
        disk = controller.namespace(1)
        queue = controller.create_queue()
        digest = hashlib.sha256()
        with image.open("wb") as file:
            blocks = SIZE // disk.block_bytes
            for lba in range(0, blocks, 8192):
                data = queue.read(disk, lba, min(8192, blocks - lba))
                digest.update(data)
                file.write(data)
    assert digest.hexdigest() == whole
    # And it is a file system to the kernel again, from the bytes that we read.
    with mounted(image, tmp_path / "copy", "-o", "loop,ro") as copy:
        assert checksums(copy) == written


def test_what_we_write_is_a_sound_file_system_to_the_kernel(backend: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", str(image))
    with mounted(image, tmp_path / "made", "-o", "loop") as made:
        fill(made, 2)
        written = checksums(made)

    to_vfio(DISK)
    with Device.open(DISK, backend=backend) as device:
        controller = Controller(device)
        disk = controller.namespace(1)
        queue = controller.create_queue()
        # What lay there before must not help.
        queue.write(disk, 0, os.urandom(1 << 20))
        with image.open("rb") as file:
            at = 0
            # Pieces of odd lengths, so that chunks and PRP lists come in all shapes.
            lengths = random.Random(3)
            while data := file.read(lengths.randrange(1, 3000) * disk.block_bytes):
                queue.write(disk, at, data)
                at += len(data) // disk.block_bytes
        queue.flush(disk)
        assert at * disk.block_bytes == SIZE

    node = bind_nvme(DISK)
    checked = run("fsck.ext4", "-f", "-n", str(node))
    assert "non-contiguous" in checked
    with mounted(node, tmp_path / "back", "-o", "ro") as back:
        assert checksums(back) == written
