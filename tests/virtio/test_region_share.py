"""Memory regions: each export has its own share of what a process can map."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import pytest

from tests.virtio.frontend import Frontend
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.message import VhostRequest
from vfiotool.virtio.server import Export, Server

ROOM = 40
PAGE = 4096


def add_region(front: Frontend, number: int) -> bool:
    """Whether one more page of memory was taken."""
    at = (number + 1) << 32
    slot = struct.pack("<QQQQQ", 0, at, PAGE, at, 0)
    return front.acknowledged(VhostRequest.ADD_MEM_REG, slot, [front.fd]) == 0


def slots(front: Frontend) -> int:
    return int(struct.unpack("<Q", front.ask(VhostRequest.GET_MAX_MEM_SLOTS))[0])


def test_no_export_uses_up_the_memory_regions_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfiotool.virtio.server.MEMORY_ROOM", ROOM)
    with Server(report=print) as server:
        for name in ("greedy", "honest"):
            settings = DiskSettings(size=1 << 20)
            server.add(Export(name, BlockDisk(settings), listen(str(tmp_path / name))))
        thread = threading.Thread(target=server.run)
        thread.start()
        fronts = [Frontend(str(tmp_path / "greedy")) for _ in range(3)]
        honest = Frontend(str(tmp_path / "honest"))
        try:
            taken = 0
            for front in fronts:
                front.negotiate()
                announced, before = slots(front), taken
                while taken < ROOM and add_region(front, taken):
                    taken += 1
                assert taken - before >= announced - 1
            # A map is made beside the one that it replaces: half of the share is in use for good.
            assert ROOM // 2 - 4 <= taken <= ROOM // 2
            honest.up()
            data = os.urandom(PAGE)
            assert honest.write(0, data) == 0 and honest.read(0, PAGE) == data
            # What was refused is not held against those that have what they need.
            assert not add_region(fronts[0], ROOM)
            fronts[0].close()
            assert honest.write(8, data) == 0
        finally:
            for front in [*fronts[1:], honest]:
                front.close()
            server.stop()
            thread.join()
