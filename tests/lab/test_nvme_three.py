"""One NVMe disk for two VMs and the host itself, all three at once, each with its range of blocks:
each block says whose it is and where it belongs, and the kernel's driver has the disk afterwards.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.lab.commands import modprobe, vfiotool
from tests.lab.nested import nested_command
from tests.lab.nvme_guest import bind_nvme, mounted, run
from tests.lab.test_nvme_served import DISK, FIRST, MIB, SECOND, WAIT_S, on_the_disk, served

MACHINE = "storage"
KERNELS = ("6.12",)
PROOF = "long: two guests in a guest"
# Two guests in a guest, beside others: patience.
LIMIT_S = 3600.0
NESTED_S = 1500.0

NAME, THIRD, END = "host", (30 * MIB, 8 * MIB), 42 * MIB
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
TURNS, RUNS = 3, 8
# Runs of eight blocks that lie 256 apart; all three begin together, when `go` is said.
SCRIPT = """
for n in $(seq 100); do [ ! -b /dev/vda ] || break; sleep 0.1; done
[ $(cat /sys/block/vda/size) = 16384 ]
echo ready
read go
for turn in TURNS; do
    for run in RUNS; do
        awk -v turn=$turn -v run=$run 'BEGIN {
            for (block = 256 * run; block < 256 * run + 8; block++) {
                text = "NAME-" turn "-" block "\\n"
                while (length(text) < 4096) text = text text
                printf "%s", substr(text, 1, 4096)
            }
        }' >/tmp/run$run
        dd if=/tmp/run$run of=/dev/vda bs=4096 seek=$((run * 256)) conv=notrunc 2>/dev/null
    done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    for run in RUNS; do
        dd if=/dev/vda bs=4096 skip=$((run * 256)) count=8 2>/dev/null | cmp - /tmp/run$run
    done
    echo turn $turn
done
"""


def content(name: str, turn: int, block: int) -> bytes:
    return (b"%s-%d-%d\n" % (name.encode(), turn, block) * 1000)[:4096]


def script(name: str) -> str:
    turns, runs = range(1, TURNS + 1), range(RUNS)
    text = SCRIPT.replace("TURNS", " ".join(map(str, turns)))
    return text.replace("RUNS", " ".join(map(str, runs))).replace("NAME", name)


class HostDisk(threading.Thread):
    """The host's own use of its range, past its page cache, until it is told to end."""

    def __init__(self, node: Path) -> None:
        super().__init__()
        self.node = node
        self.blocks: dict[int, int] = {}
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
                    block, turn = number * 37 % (THIRD[1] // 4096), number
                    buffer[:] = content(NAME, turn, block)
                    assert os.pwritev(fd, [buffer], 4096 * block) == 4096
                    self.blocks[block] = turn
                    buffer[:] = bytes(4096)
                    assert os.preadv(fd, [buffer], 4096 * block) == 4096
                    assert buffer[:] == content(NAME, turn, block)
        finally:
            os.close(fd)


class Nested:
    """A VM on one of the sockets, which waits until it is told to go."""

    def __init__(self, folder: Path, name: str, stack: ExitStack) -> None:
        own = folder / f"{name}.d"
        own.mkdir()
        command = nested_command(
            own,
            ("virtio_pci", "virtio_blk"),
            script(name),
            *("-chardev", f"socket,id=blk,path={folder}/{name}"),
            *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1"),
        )
        self.said: list[str] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace"
        )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        assert self.process.stdout is not None
        self.listener = threading.Thread(target=self._listen, args=(self.process.stdout,))
        self.listener.start()

    def _listen(self, output: IO[str]) -> None:
        self.said += (line.strip() for line in iter(output.readline, ""))

    def until(self, line: str, ends: float) -> None:
        while line not in self.said:
            assert time.monotonic() < ends, self.said[-20:]
            self.listener.join(0.1)
            assert self.listener.is_alive() or line in self.said, self.said[-20:]

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


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
    before, ends = disks(), time.monotonic() + NESTED_S
    with ExitStack() as stack:
        stack.enter_context(served(tmp_path, EXPORT, END))
        host = HostDisk(stack.enter_context(host_disk(before)))
        vms = [Nested(tmp_path, name, stack) for name in VMS]
        for vm in vms:
            vm.until("ready", ends)
        host.start()
        stack.callback(host.join)
        stack.callback(host.ending.set)
        for vm in vms:
            vm.go()
        for vm in vms:
            vm.until("turn 1", ends)
        while_both = len(host.blocks)
        for vm in vms:
            vm.until("good", ends)
        host.ending.set()
        host.join()
        assert host.failure is None, host.failure
        assert 0 < while_both <= len(host.blocks)
        print(f"the host wrote {len(host.blocks)} blocks, {while_both} in the first turn")
    found = on_the_disk((FIRST, SECOND, THIRD), END)
    for name, (start, _) in VMS.items():
        for run_ in range(RUNS):
            for block in range(256 * run_, 256 * run_ + 8):
                at = start + 4096 * block
                assert found[at : at + 4096] == content(name, TURNS, block)
    for block, turn in host.blocks.items():
        at = THIRD[0] + 4096 * block
        assert found[at : at + 4096] == content(NAME, turn, block)
    still_a_disk(tmp_path / "mounted")


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
