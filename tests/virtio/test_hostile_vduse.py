"""A hostile driver behind VDUSE: the kernel's messages are its own, what they lead to is the
driver's. An honest one is served afterwards."""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.virtio.test_hostile import resident_kib
from vfiotool.errors import VfiotoolError
from vfiotool.native.virtqueue import Worker
from vfiotool.virtio import vduse
from vfiotool.virtio import vduse_wire as wire
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.vduse import VduseDevice
from vfiotool.virtio.vduse_wire import IovaRegion, VduseQueue

pytestmark = pytest.mark.slow

HUNDRED_THOUSAND = 100_000
WARM = 200

SIZE, MEMORY = 256, 1 << 20
BASE = 0x10_0000
AVAILABLE = 0x2000


class OddDriver:
    """The kernel's side of a VDUSE device, whose driver keeps to nothing."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.memory = os.memfd_create("bounce")
        os.ftruncate(self.memory, MEMORY)
        self.honest = False

    def number(self) -> int:
        rng = self.rng
        return rng.choice((0, BASE, BASE + MEMORY, (1 << 64) - 1, rng.getrandbits(64), 1 << 63))

    def queue_info(self, _: int, index: int) -> VduseQueue:
        at = BASE + 0x4000 * index
        if self.honest:
            return VduseQueue(SIZE, at, at + AVAILABLE, at + 0x1000, 0, True)
        rng = self.rng
        places = [rng.choice((at, at, self.number())) for _ in range(3)]
        size = rng.choice((SIZE, 1, 0, 3, 1 << 15, 0xFFFF))
        return VduseQueue(size, *places, rng.getrandbits(16), rng.random() < 0.9)

    def regions(self, _: int) -> list[IovaRegion]:
        if self.honest:
            found = [(BASE, BASE + MEMORY - 1, 0)]
        else:
            rng = self.rng
            found = [(BASE, BASE + MEMORY - 1, 0)] if rng.random() < 0.7 else []
            for _ in range(rng.randrange(3)):
                start = self.number()
                length = rng.choice((0, 4095, MEMORY, 1 << 40))
                found.append((start, min(start + length, (1 << 64) - 1), self.number()))
        return [
            IovaRegion(start, last, offset, os.dup(self.memory), self.honest or offset % 2 == 0)
            for start, last, offset in found
        ]

    def scramble(self) -> None:
        """Rings of noise, and memory that goes and comes back."""
        os.pwrite(self.memory, self.rng.randbytes(0x8000), 0)
        if self.rng.random() < 0.2:
            os.ftruncate(self.memory, self.rng.choice((0, 0x1000, MEMORY // 2)))
            os.ftruncate(self.memory, MEMORY)

    def message(self) -> bytes:
        rng = self.rng
        kind = rng.choice((0, 1, 1, 1, 2, 3, rng.getrandbits(32)))
        first = rng.choice((0, 1, 4, 15, 255, rng.getrandbits(32)))
        body = struct.pack("<II", first, rng.choice((0, 1, rng.getrandbits(32))))
        data = struct.pack("<II16x", kind, rng.getrandbits(32)) + body.ljust(128, b"\0")
        return data[: rng.choice((152, 152, 152, 8, 31))]


@contextmanager
def driven(
    tmp_path: Path, odd: OddDriver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[socket.socket, VduseDevice, list[str]]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    said: list[str] = []
    monkeypatch.setattr(vduse, "open_control", lambda: (os.open("/dev/null", os.O_RDONLY), 1))
    monkeypatch.setattr(VduseDevice, "_create", lambda *_: True)
    monkeypatch.setattr(VduseDevice, "_open", lambda *_: os.dup(theirs.fileno()))
    monkeypatch.setattr(wire, "setup_queue", lambda *_: None)
    monkeypatch.setattr(wire, "set_kick", lambda *_: None)
    monkeypatch.setattr(wire, "negotiated", lambda _: odd.rng.getrandbits(64))
    monkeypatch.setattr(wire, "queue_info", odd.queue_info)
    monkeypatch.setattr(wire, "regions", odd.regions)
    disk, worker = BlockDisk(DiskSettings(size=1 << 20, queues=2)), Worker(0)
    log = str(tmp_path / "log")
    device = VduseDevice("vd0", disk, 2, [worker], log=log, report=said.append)
    thread = threading.Thread(target=device.run)
    thread.start()
    try:
        yield ours, device, said
    finally:
        device.stop()
        thread.join(60)
        assert not thread.is_alive()
        with suppress(VfiotoolError):
            device.close()
        worker.close()
        disk.close()
        ours.close()
        theirs.close()


def is_served(odd: OddDriver, kernel: socket.socket, device: VduseDevice) -> None:
    """An honest driver has both queues."""
    odd.honest = True
    for status, wanted in ((0, 0), (15, 0)):
        kernel.send(struct.pack("<II16x", 1, 7) + bytes([status]).ljust(128, b"\0"))
        os.pwrite(odd.memory, bytes(0x8000), 0)
        assert struct.unpack_from("<II", kernel.recv(152)) == (7, wanted)
    assert sorted(device._queues) == [0, 1]


def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, seed: int) -> None:
    """`count` odd messages, and an honest driver; prints what it came to."""
    odd, began, settled = OddDriver(random.Random(seed)), time.monotonic(), 0
    with driven(tmp_path, odd, monkeypatch) as (kernel, device, said):
        kernel.settimeout(30)
        for number in range(count):
            if odd.rng.random() < 0.5:
                odd.scramble()
            kernel.send(odd.message())
            assert len(kernel.recv(152)) == 152
            if number == WARM:
                settled = resident_kib(os.getpid())
        is_served(odd, kernel, device)
        assert said
        if settled:
            said.clear()
            grown = resident_kib(os.getpid()) - settled
            print(f"{count} messages, {time.monotonic() - began:.0f} s, {settled} KiB, {grown:+}")
            assert grown < 64 << 10
    os.close(odd.memory)


def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that breaks, which is signalled: a process's first signal begins the watch of those
    that block, whose eventfd stays."""
    odd = OddDriver(random.Random(0))
    with driven(tmp_path, odd, monkeypatch) as (kernel, device, said):
        is_served(odd, kernel, device)
        os.pwrite(odd.memory, b"\xff\xff", AVAILABLE + 2)
        os.eventfd_write(device._kicks[0], 1)
        while not said:
            os.sched_yield()
    os.close(odd.memory)


def drive_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, seed: int) -> None:
    warm(tmp_path, monkeypatch)
    gc.collect()  # what tests before this one left open
    before = len(os.listdir("/proc/self/fd"))
    drive(tmp_path, monkeypatch, count, seed)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_driver_that_keeps_to_nothing_behind_vduse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive_flat(tmp_path, monkeypatch, 500, seed=5)


@pytest.mark.proof
def test_a_hundred_thousand_odd_messages_of_vduse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive_flat(
        tmp_path, monkeypatch, int(os.environ.get("VFIOTOOL_HOSTILE", HUNDRED_THOUSAND)), seed=6
    )
