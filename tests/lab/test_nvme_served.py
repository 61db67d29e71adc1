"""One NVMe disk behind a real IOMMU for two machines at once, one of them a VM, each with its
range: what each wrote is there, nothing beside, and the kernel's driver has the disk afterwards."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.nested import run_nested
from tests.lab.nested_disk import BLOCK, SIZE, TURNS, blocks, content, script
from tests.lab.nvme_guest import DISKS, bind_nvme, to_vfio
from tests.virtio.frontend import T_OUT, T_ZEROES, Frontend

MACHINE = "storage"
KERNELS = ("6.12", "iommufd")
PROOF = "long: a guest in a guest"
# A guest in a guest, beside others: patience.
LIMIT_S = 3600.0

MIB = 1 << 20
DISK = DISKS[0]
WAIT_S = 300.0
# Ranges of the disk's 128 MiB, and what is looked at afterwards.
FIRST, SECOND, END = (4 * MIB, SIZE), (16 * MIB, SIZE), 28 * MIB
# Blocks that each of two machines has written before they stop.
ENOUGH = 200
EXPORTS = """
version = 1
[[export]]
name = "vm"
nvme = "{disk}/1"
offset = {first[0]}
size = {first[1]}
socket_path = "{folder}/vm"
[[export]]
name = "other"
nvme = "{disk}/1"
offset = {second[0]}
size = {second[1]}
queues = 2
socket_path = "{folder}/other"
"""


def until_there(path: Path, server: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + WAIT_S
    while not path.exists():
        assert server.poll() is None and time.monotonic() < ends
        time.sleep(0.05)


class Other(threading.Thread):
    """A machine that writes and reads its own range, of `size` bytes, until it is told to stop."""

    def __init__(self, path: Path, size: int, seed: int, queues: int) -> None:
        super().__init__()
        self.front = Frontend(str(path), queues=queues)
        self.size, self.lots, self.queues = size, random.Random(seed), queues
        self.blocks: dict[int, bytes] = {}
        self.ending = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.failure = error

    def work(self) -> None:
        front, lots = self.front, self.lots
        # There is one processor, and a guest in the guest is to have most of it.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        front.up()
        while not self.ending.is_set() or len(self.blocks) < 50:
            block = lots.randrange(self.size // 4096)
            data = lots.randbytes(8) * 512
            assert front.write(8 * block, data, index=block % self.queues) == 0
            self.blocks[block] = data
            assert front.read(8 * block, 4096, index=block % self.queues) == data
            # Its memory is mapped anew now and then, under the load of the other machine.
            if block % 16 == 0:
                front.share()
            last = self.size // 512
            assert front.request(T_OUT, last - 1, data=bytes(1024))[0] == 1
            assert front.request(T_ZEROES, data=struct.pack("<QII", last, 8, 0))[0] == 1

    def end(self) -> None:
        """Stop, and raise what failed."""
        self.ending.set()
        self.join()
        self.front.close()
        if self.failure is not None:
            raise self.failure


@contextmanager
def served(folder: Path, more: str = "", end: int = END) -> Iterator[None]:
    """The disk, full of one byte up to `end`, served by ranges at `folder`/vm and `folder`/other,
    and by what `more` has of exports."""
    with bind_nvme(DISK).open("r+b", buffering=0) as disk:
        for _ in range(end // MIB):
            disk.write(b"\xa5" * MIB)
        os.fsync(disk.fileno())
    to_vfio(DISK)
    file = folder / "exports.toml"
    text = EXPORTS.format(disk=DISK, first=FIRST, second=SECOND, folder=folder)
    file.write_text(text + more)
    command = [sys.executable, "-m", "vfiotool", "serve", "exports", str(file)]
    server = subprocess.Popen([*command, "--threads", "2"])
    try:
        until_there(folder / "other", server)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0


def on_the_disk(ranges: tuple[tuple[int, int], ...] = (FIRST, SECOND), end: int = END) -> bytes:
    """What is there, as the kernel's driver reads it; nothing beside the ranges has changed."""
    with bind_nvme(DISK).open("rb", buffering=0) as disk:
        found = b"".join(disk.read(MIB) for _ in range(end // MIB))
    starts, ends = [at for at, _ in ranges] + [end], [0] + [sum(one) for one in ranges]
    assert all(set(found[before:at]) == {0xA5} for before, at in zip(ends, starts, strict=True))
    return found


def assert_blocks(found: bytes, start: int, name: str) -> None:
    """What a nested guest of this name wrote to the range that begins there."""
    for block in blocks():
        at = start + BLOCK * block
        assert found[at : at + BLOCK] == content(name, TURNS, block)


def assert_written(found: bytes, start: int, other: Other) -> None:
    for block, data in other.blocks.items():
        at = start + 4096 * block
        assert found[at : at + 4096] == data


def test_two_machines_share_a_disk_by_ranges(tmp_path: Path) -> None:
    with served(tmp_path):
        places = (("vm", FIRST, 1), ("other", SECOND, 2))
        others = [Other(tmp_path / name, at[1], n, n) for name, at, n in places]
        for other in others:
            other.start()
        ends = time.monotonic() + WAIT_S
        while any(len(other.blocks) < ENOUGH and not other.failure for other in others):
            assert time.monotonic() < ends
            time.sleep(0.05)
        for other in others:
            other.end()
    found = on_the_disk()
    assert_written(found, FIRST[0], others[0])
    assert_written(found, SECOND[0], others[1])


def test_a_vm_and_another_machine_share_a_disk_by_ranges(tmp_path: Path) -> None:
    with served(tmp_path):
        other = Other(tmp_path / "other", SECOND[1], 1, 2)
        other.start()
        try:
            run_nested(
                tmp_path,
                ("virtio_pci", "virtio_blk"),
                script("vm"),
                *("-chardev", f"socket,id=blk,path={tmp_path}/vm"),
                *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1"),
            )
        finally:
            other.end()
    found = on_the_disk()
    assert_blocks(found, FIRST[0], "vm")
    assert_written(found, SECOND[0], other)
