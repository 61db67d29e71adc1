"""Disks and consoles in Python whose methods fail: each request's own error, and nobody else's."""

from __future__ import annotations

import asyncio
import gc
import os
import struct
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA, T_IN, Closed, Frontend
from tests.virtio.test_device import Echo, connected, path, served
from vfiotool.virtio import host
from vfiotool.virtio.console import Console
from vfiotool.virtio.device import VirtioDevice
from vfiotool.virtio.entropy import EntropySource
from vfiotool.virtio.storage import MemoryStorage

__all__ = ["path"]
BAD = 3


def reads(front: Frontend, sectors: range) -> list[int]:
    """One read for each sector, made available together: the statuses."""
    ring = front.rings[0]
    for number in sectors:
        at = DATA + 0x400 * number
        front.memory[at : at + 16] = struct.pack("<IIQ", T_IN, 0, number)
        front.memory[at + 16] = 0xFF
        chain = [(at, 16, False), (at + 0x200, 512, True), (at + 16, 1, True)]
        front.put(ring, 4 * number, chain)
        front.add(ring, 4 * number, kick=number == sectors[-1])
    front.wait(ring, len(sectors))
    return [front.memory[DATA + 0x400 * number + 16] for number in sectors]


class OneBad(MemoryStorage):
    def read(self, offset: int, into: memoryview) -> None:
        if offset == BAD * 512:
            raise ValueError("a fault of the class")
        super().read(offset, into)


class OneBadLater(OneBad):
    async def read(self, offset: int, into: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().read(offset, into)


class Mixed(OneBad):
    """Some answers come at once and some later."""

    def read(self, offset: int, into: memoryview):  # type: ignore[no-untyped-def]
        if offset % 1024:
            return super().read(offset, into)
        return self.later(offset, into)

    async def later(self, offset: int, into: memoryview) -> None:
        await asyncio.sleep(0)
        super().read(offset, into)


class Count(OneBad):
    """Returns what preadv does."""

    def read(self, offset: int, into: memoryview):  # type: ignore[no-untyped-def]
        super(OneBad, self).read(offset, into)
        return 512 if offset == BAD * 512 else None


@pytest.mark.parametrize("kind", [OneBad, OneBadLater, Mixed, Count])
def test_a_fault_is_its_own_requests_alone(path: Path, kind: type[MemoryStorage]) -> None:
    with served(kind(1 << 20), path) as (_, said), connected(path) as front:
        front.up()
        assert reads(front, range(8)) == [1 if number == BAD else 0 for number in range(8)]
    assert len(said) == 1 and said[0].startswith(f"{kind.__name__}.handle, queue 0: "), said


def test_what_does_not_end_with_its_queue_is_no_fault(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(MemoryStorage):
        async def read(self, offset: int, into: memoryview) -> None:  # type: ignore[override]
            await asyncio.Event().wait()

    monkeypatch.setattr(host, "DRAIN_S", 0.05)
    with served(Endless(1 << 20), path) as (_, said), connected(path) as front:
        front.up()
        ring = front.rings[0]
        front.memory[DATA : DATA + 16] = struct.pack("<IIQ", T_IN, 0, 0)
        front.memory[DATA + 16] = 0xFF
        front.put(ring, 0, [(DATA, 16, False), (DATA + 512, 512, True), (DATA + 16, 1, True)])
        front.add(ring, 0)
        assert front.stop() == 1
        assert front.wait(ring) == [(0, 513)]
        assert front.memory[DATA + 16] == 1
        front.start(0, 1)
        assert front.stop() == 1
    assert said == []


def test_what_a_console_cannot_take_costs_it_nothing_that_comes_with_it(path: Path) -> None:
    class Choosy(Console):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[bytes] = []

        def received(self, data: bytes) -> None:
            if data == b"line 1":
                raise ValueError("a fault of the class")
            self.heard.append(data)

    device = Choosy()
    with served(device, path) as (_, said), connected(path, queues=2) as front:
        front.up()
        ring = front.rings[1]
        for number in range(4):
            at = DATA + 64 * number
            front.memory[at : at + 6] = b"line %d" % number
            front.put(ring, number, [(at, 6, False)])
            front.add(ring, number, kick=number == 3)
        assert front.wait(ring, 4) == [(number, 0) for number in range(4)]
    assert device.heard == [b"line 0", b"line 2", b"line 3"]
    assert len(said) == 1 and said[0].startswith("Choosy.handle, queue 1: ValueError: ")


def mapped() -> int:
    """How often the memory of a driver of ours is mapped in this process."""
    return sum("memfd:guest" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("kind", [MemoryStorage, Console, EntropySource, Echo])
@pytest.mark.parametrize("leaves", [True, False])
def test_a_drivers_memory_goes_with_it(path: Path, kind: type[VirtioDevice], leaves: bool) -> None:
    """Not when cycles are collected, which may be never: it may be all that the host has."""
    device = kind()
    with served(device, path) as (_, said):
        gc.collect()
        gc.disable()
        others = mapped()  # what earlier tests left
        try:
            for _ in range(5):
                with connected(path, queues=device.queues) as front:
                    front.up()
                    front.put(front.rings[-1], 0, [(DATA, 64, kind is EntropySource)])
                    front.add(front.rings[-1], 0)
                    front.share()
                    if leaves:
                        front.stop(device.queues - 1)
            with connected(path, queues=device.queues) as front:
                # Once it is served, the one before has been seen to.
                front.up()
                assert mapped() - others == 2, said
        finally:
            gc.enable()


class Unwilling(Echo):
    def started(self, queue: int) -> None:
        raise ValueError("not now")


@pytest.mark.parametrize("kind", [Echo, Unwilling])
def test_a_queue_that_cannot_start_keeps_nothing(
    path: Path, kind: type[VirtioDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        # epoll's answer to what has no poll, such as a KVM machine's descriptor.
        raise PermissionError(1, "Operation not permitted")

    with served(kind(), path) as (_, said):
        if kind is Echo:
            monkeypatch.setattr(asyncio.SelectorEventLoop, "add_reader", refuse)
        gc.collect()
        gc.disable()
        others, files = mapped(), len(os.listdir("/proc/self/fd"))
        try:
            for _ in range(5):
                with connected(path, queues=2) as front:
                    front.negotiate()
                    front.share()
                    with pytest.raises((AssertionError, Closed)):
                        front.start()
            with connected(path, queues=2) as front:
                front.negotiate()
                assert mapped() - others == 1, said
            assert len(os.listdir("/proc/self/fd")) <= files + 3
        finally:
            gc.enable()
