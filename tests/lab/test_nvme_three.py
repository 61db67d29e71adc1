"""One NVMe disk for two VMs and the host itself, all three at once, each with its range of blocks:
each block says whose it is and where it belongs, and the kernel's driver has the disk afterwards.
"""

from __future__ import annotations

import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.lab.commands import modprobe, vfiotool
from tests.lab.nested import Nested, Progress, nested_command
from tests.lab.nested_disk import BLOCK, FIO, FIO_AT, ROOT_OPTIONS, SIZE, content, script
from tests.lab.nvme_guest import bind_nvme, mounted, run
from tests.lab.test_nvme_served import (
    DISK,
    FIRST,
    MIB,
    SECOND,
    WAIT_S,
    assert_blocks,
    on_the_disk,
    served,
)

MACHINE = "storage"
KERNELS = ("6.12",)
PROOF = "long: two guests in a guest"
# Two guests in a guest, beside others: patience.
LIMIT_S = 3600.0
NESTED_S = 1500.0

NAME, THIRD, END = "host", (30 * MIB, SIZE), 42 * MIB
# So many blocks of the host, and then fio once.
FIO_EVERY = 500
VMS = {"vm": FIRST, "other": SECOND}
EXPORT = f"""
[[export]]
name = "{NAME}"
nvme = "{DISK}/1"
offset = {THIRD[0]}
size = {THIRD[1]}
vduse = "{NAME}"
attach = "virtio"
"""


class HostDisk(threading.Thread):
    """The host's own use of its range, past its page cache, until it is told to end: single blocks
    that name themselves, and behind them fio, again and again."""

    def __init__(self, node: Path) -> None:
        super().__init__()
        self.node = node
        self.blocks: dict[int, int] = {}
        self.fios = 0
        self.ending = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            # There is one processor, and the guests in the guest are to have most of it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            self.work()
        except BaseException as error:
            self.failure = error

    def work(self) -> None:
        fd = os.open(self.node, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 4096) as buffer:
                for number in range(1 << 30):
                    if self.ending.is_set():
                        return
                    block, turn = number * 37 % (FIO_AT // BLOCK), number
                    buffer[:] = content(NAME, turn, block)
                    assert os.pwritev(fd, [buffer], BLOCK * block) == BLOCK
                    self.blocks[block] = turn
                    buffer[:] = bytes(BLOCK)
                    assert os.preadv(fd, [buffer], BLOCK * block) == BLOCK
                    assert buffer[:] == content(NAME, turn, block)
                    if number % FIO_EVERY == 0:
                        self.fio()
        finally:
            os.close(fd)

    def fio(self) -> None:
        place = f"--filename={self.node} --offset={FIO_AT} --ioengine=libaio --iodepth=8"
        run(fio(), *FIO.split(), *place.split(), "--minimal", limit_s=NESTED_S)
        self.fios += 1


def start_vm(folder: Path, name: str, stack: ExitStack, report: Progress) -> Nested:
    """A VM on one of the sockets, which waits until it is told to go."""
    own = folder / f"{name}.d"
    own.mkdir()
    command = nested_command(
        own,
        ("virtio_pci", "virtio_blk", "9p", "9pnet_virtio"),
        script(name, wait=True, fio=fio()),
        *("-chardev", f"socket,id=blk,path={folder}/{name}"),
        *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1"),
        *ROOT_OPTIONS,
    )
    return Nested(name, command, stack, report)


def fio() -> str:
    found = shutil.which("fio")
    if found is None:
        pytest.skip("no fio in the guest's PATH")
    return found


def disks() -> set[str]:
    return {name for name in os.listdir("/sys/block") if name.startswith("vd")}


@contextmanager
def host_disk(before: set[str]) -> Iterator[Path]:
    """The range that is the host's, as a disk of its own."""
    ends = time.monotonic() + WAIT_S
    while not disks() - before:
        assert time.monotonic() < ends, "no disk of the host appeared"
        time.sleep(0.05)
    (name,) = disks() - before
    while not (node := Path("/dev", name)).exists():
        assert time.monotonic() < ends, "no node appeared"
        time.sleep(0.05)
    try:
        yield node
    finally:
        removed = vfiotool("vdpa", "remove", NAME)
    assert removed.code == 0, removed.err


def test_two_vms_and_the_host_share_a_disk_by_ranges(tmp_path: Path) -> None:
    modprobe("vduse", "virtio_vdpa", "virtio_blk")
    if not Path("/dev/vduse/control").exists():
        pytest.skip("this kernel has no VDUSE")
    before, ends, report = disks(), time.monotonic() + NESTED_S, Progress()
    with ExitStack() as stack:
        stack.enter_context(served(tmp_path, EXPORT, END))
        host = HostDisk(stack.enter_context(host_disk(before)))
        report("the host has its disk")
        vms = [start_vm(tmp_path, name, stack, report) for name in VMS]
        for vm in vms:
            vm.until("ready", ends)
        host.start()
        stack.callback(host.join)
        stack.callback(host.ending.set)
        for vm in vms:
            vm.say("go")
        for vm in vms:
            vm.until("turn 1", ends)
        while_both = len(host.blocks)
        for vm in vms:
            vm.until("good", ends)
        host.ending.set()
        host.join()
        assert host.failure is None, host.failure
        assert 0 < while_both <= len(host.blocks) and host.fios
        report(f"{len(host.blocks)} blocks of the host, {while_both} in turn 1, {host.fios} fio")
    found = on_the_disk((FIRST, SECOND, THIRD), END)
    for name, (start, _) in VMS.items():
        assert_blocks(found, start, name)
    for block, turn in host.blocks.items():
        at = THIRD[0] + BLOCK * block
        assert found[at : at + BLOCK] == content(NAME, turn, block)
    report("what is on the disk is right")
    still_a_disk(tmp_path / "mounted")
    report("and it is a disk")


def still_a_disk(where: Path) -> None:
    """A file system on it is whole."""
    node = bind_nvme(DISK)
    run("mkfs.ext4", "-q", "-F", str(node))
    data = os.urandom(4 * MIB)
    with mounted(node, where):
        (where / "file").write_bytes(data)
    with mounted(node, where):
        assert (where / "file").read_bytes() == data
    run("fsck.ext4", "-fn", str(node))
