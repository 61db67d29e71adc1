"""Disks whose blocks name their place, so that a block of another place is seen."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import Namespace, SharedQueue
from vfiotool.vfio import Device


def content(lba: int) -> bytes:
    """A block of 512 bytes that names its place."""
    return struct.pack("<QQ", lba, ~lba & 0xFFFFFFFF) * 32


@contextmanager
def numbered() -> Iterator[FakeNvme]:
    """A controller in memory, all blocks of which are `content`."""
    with FakeNvme() as device:
        for lba in range(device.blocks):
            device.disk[lba * 512 : lba * 512 + 512] = content(lba)
        yield device


def placed(disk: Namespace, lba: int, count: int, mark: int) -> bytes:
    """Blocks that name their place, and who wrote them: no two alike."""
    unit = disk.block_bytes // 16
    return b"".join(
        (mark.to_bytes(8, "little") + (lba + n).to_bytes(8, "little")) * unit for n in range(count)
    )


def right_in_threads(
    shared: SharedQueue, device: Device, disk: Namespace, *, turns: int, limit_s: float
) -> list[bool]:
    """Four threads write blocks of their own and read them back; whether each came back."""
    ended: list[bool] = []

    def work(number: int) -> None:
        with device.dma.alloc(4096) as data:
            for turn in range(turns):
                lba = 64 * number + turn
                data.view[:512] = content = placed(disk, lba, 1, number)
                shared.write(disk, lba, 1, data)
                data.view[:512] = bytes(512)
                shared.read(disk, lba, 1, data)
                ended.append(bytes(data.view[:512]) == content)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(limit_s)
    return ended
