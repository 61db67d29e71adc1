"""One NVMe disk behind a real IOMMU for a VM and for a second machine at once, each with its range:
what each wrote is there, nothing beside, and the kernel's driver has the disk again afterwards."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.lab.nested import run_nested
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
FIRST, SECOND, END = (4 * MIB, 8 * MIB), (16 * MIB, 8 * MIB), 28 * MIB
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
# Each block of the VM's disk gets a text with the block's own number: eight runs of eight blocks,
# which lie 256 apart. A process takes long to start in there: few do.
SCRIPT = """
for n in $(seq 100); do [ ! -b /dev/vda ] || break; sleep 0.1; done
[ $(cat /sys/block/vda/size) = 16384 ]
for turn in 1 2; do
    for run in 0 1 2 3 4 5 6 7; do
        awk -v turn=$turn -v run=$run 'BEGIN {
            for (block = 8 * run; block < 8 * run + 8; block++) {
                text = "vm-" turn "-" block "\\n"
                while (length(text) < 4096) text = text text
                printf "%s", substr(text, 1, 4096)
            }
        }' >/tmp/run$run
        dd if=/tmp/run$run of=/dev/vda bs=4096 seek=$((run * 256)) conv=notrunc 2>/dev/null
    done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    for run in 0 1 2 3 4 5 6 7; do
        dd if=/dev/vda bs=4096 skip=$((run * 256)) count=8 2>/dev/null | cmp - /tmp/run$run
    done
done
"""


def until_there(path: Path, server: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + WAIT_S
    while not path.exists():
        assert server.poll() is None and time.monotonic() < ends
        time.sleep(0.05)


class Other(threading.Thread):
    """A machine that writes and reads its own range until it is told to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.front = Frontend(str(path), queues=2)
        self.blocks: dict[int, bytes] = {}
        self.ending = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.failure = error

    def work(self) -> None:
        front, lots = self.front, random.Random(1)
        # There is one processor, and the guest in the guest is to have most of it.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        front.up()
        while not self.ending.is_set() or len(self.blocks) < 50:
            block = lots.randrange(SECOND[1] // 4096)
            data = block.to_bytes(8, "little") * 512
            assert front.write(8 * block, data, index=block % 2) == 0
            self.blocks[block] = data
            assert front.read(8 * block, 4096, index=block % 2) == data
            # Its memory is mapped anew now and then, under the load of the other machine.
            if block % 16 == 0:
                front.share()
            last = SECOND[1] // 512
            assert front.request(T_OUT, last - 1, data=bytes(1024))[0] == 1
            assert front.request(T_ZEROES, data=struct.pack("<QII", last, 8, 0))[0] == 1


def test_a_vm_and_another_machine_share_a_disk_by_ranges(tmp_path: Path) -> None:
    node = bind_nvme(DISK)
    with node.open("r+b", buffering=0) as disk:
        for _ in range(END // MIB):
            disk.write(b"\xa5" * MIB)
        os.fsync(disk.fileno())
    to_vfio(DISK)
    file = tmp_path / "exports.toml"
    file.write_text(EXPORTS.format(disk=DISK, first=FIRST, second=SECOND, folder=tmp_path))
    command = [sys.executable, "-m", "vfiotool", "serve", "exports", str(file)]
    server = subprocess.Popen([*command, "--threads", "2"])
    try:
        until_there(tmp_path / "other", server)
        other = Other(tmp_path / "other")
        other.start()
        try:
            run_nested(
                tmp_path,
                ("virtio_pci", "virtio_blk"),
                SCRIPT,
                *("-chardev", f"socket,id=blk,path={tmp_path}/vm"),
                *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1"),
            )
        finally:
            other.ending.set()
            other.join()
        assert other.failure is None, other.failure
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0
    with bind_nvme(DISK).open("rb", buffering=0) as disk:
        found = b"".join(disk.read(MIB) for _ in range(END // MIB))
    for block in range(64):
        text = b"vm-2-%d\n" % block
        at = FIRST[0] + (block // 8 * 256 + block % 8) * 4096
        assert found[at : at + 4096] == (text * 1000)[:4096]
    for block, data in other.blocks.items():
        at = SECOND[0] + 4096 * block
        assert found[at : at + 4096] == data
    outside = ((0, FIRST[0]), (sum(FIRST), SECOND[0]), (sum(SECOND), END))
    assert all(set(found[start:end]) == {0xA5} for start, end in outside)
