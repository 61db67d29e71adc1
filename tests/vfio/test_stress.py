"""Threads that close what others use, over every object of the library that needs no device.

Each round makes objects, lets threads use them, and closes them under their hands. Whatever
happens is an answer or a VfiotoolError: never a crash, a hang, or another file's data. The proofs
run 10^5 rounds; the sanitizers a few hundred (tests/native/test_cext.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Callable

import pytest

from tests.vfio.fake_space import FakeSpace
from tests.vfio.test_interrupts import OwnedInterrupt
from vfiotool.errors import VfiotoolError
from vfiotool.native.library import Handle, Mapper, Window
from vfiotool.vfio import dma_of
from vfiotool.vfio.reach import Reach

USERS = 3
ROUNDS = int(os.environ.get("VFIOTOOL_STRESS_ROUNDS", "1000"))

Work = Callable[[], object]


def windows(chance: random.Random) -> tuple[list[Work], list[Work]]:
    fd = os.memfd_create("bar")
    os.ftruncate(fd, 4096)
    window = Window(fd, 0, 0, 4096, 3, 0)
    os.close(fd)
    reach = Reach("memory", None)
    reach.add(window)

    def pinned() -> None:
        window.pin()
        window.unpin()

    def resetting() -> None:
        with reach.resetting():
            pass

    uses: list[Work] = [
        lambda: window.read32(8),
        lambda: window.write64(16, 1),
        lambda: window._read_into(0, bytearray(256), 4, False),
        lambda: window._poll_until(0, 4, 1, 1, 200_000),
        pinned,
        resetting,
        lambda: reach.low_power(chance.random() < 0.5, lambda: None),
    ]
    return uses, [lambda: window._close(chance.random() < 0.7), lambda: window._close(True)]


def interrupts(chance: random.Random) -> tuple[list[Work], list[Work]]:
    interrupt = OwnedInterrupt()

    async def tasks() -> None:
        waiting = [asyncio.create_task(interrupt.wait_async(0.002)) for _ in range(3)]
        await asyncio.gather(*waiting, return_exceptions=True)

    uses: list[Work] = [
        lambda: interrupt.wait(0.001),
        lambda: interrupt.wait(0.002, spin_s=0.0001),
        lambda: interrupt.descriptor >= 0 and fired(interrupt),
        lambda: asyncio.run(tasks()),
        interrupt.trigger,
    ]
    return uses, [interrupt.end, interrupt.end]


def fired(interrupt: OwnedInterrupt) -> None:
    # The number may be another file's by now: only what the object does itself is safe.
    interrupt._collect() if interrupt._loop is None else None


def mappers(chance: random.Random) -> tuple[list[Work], list[Work]]:
    handle = Handle(os.open("/dev/null", os.O_RDWR))

    class Failing(Mapper):
        def _map_failed(self, result: int, address: int, iova: int, size: int) -> None:
            # ENOTTY from /dev/null, or EBADF once it is closed: never another file's answer.
            assert result in (-25, -9), result

        def _unmap_failed(self, result: int, iova: int, size: int) -> int:
            assert result in (-25, -9), result
            return 0

    mapper = Failing()
    mapper._aim(handle, chance.choice((None, 1)))
    rows = [(0, number << 12, 4096) for number in range(8)]

    def held() -> None:
        with handle as fd:
            os.fstat(fd)

    uses: list[Work] = [
        lambda: mapper.map(0, 0, 4096, read=True, write=True),
        lambda: mapper.unmap(0, 4096),
        lambda: mapper.map_many(rows, read=True, write=True),
        lambda: mapper.unmap_many([row[1:] for row in rows]),
        held,
        # What takes a number that was closed under a call.
        lambda: os.close(os.open("/dev/zero", os.O_RDONLY)),
    ]
    return uses, [handle.close]


def buffers(chance: random.Random) -> tuple[list[Work], list[Work]]:
    space = FakeSpace()
    dma = dma_of(space)
    shared = dma.alloc(4096)

    def pinned() -> None:
        shared.pin()
        try:
            shared.view[0] = 1
        finally:
            shared.unpin()

    uses: list[Work] = [
        lambda: dma.alloc(8192).close(),
        lambda: [one.close() for one in dma.alloc_many(3, 4096)],
        lambda: dma.map(bytearray(100)).close(),
        pinned,
        lambda: repr((dma, shared, space)),
        shared.close,
    ]
    return uses, [space.close]


KINDS = {made.__name__: made for made in (windows, interrupts, mappers, buffers)}


def one_round(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    uses, closes = KINDS[kind](chance)
    start, failed = threading.Barrier(USERS + 1), []

    def use(own: random.Random) -> None:
        start.wait(30)
        for _ in range(own.randrange(1, 12)):
            try:
                own.choice(uses)()
            except VfiotoolError:
                pass
            except BaseException as error:
                failed.append(error)

    threads = [
        threading.Thread(target=use, args=(random.Random(seed * USERS + n),), daemon=True)
        for n in range(USERS)
    ]
    for thread in threads:
        thread.start()
    start.wait(30)
    for close in closes:
        with contextlib.suppress(VfiotoolError):
            close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), f"{kind}, seed {seed}: a thread hangs"
    # Those closed while they were pinned or waited for.
    for close in closes:
        close()
    assert failed == [], f"{kind}, seed {seed}: {failed[:3]}"


@pytest.mark.parametrize("kind", KINDS)
def test_closing_under_the_hands_of_other_threads(kind: str) -> None:
    for seed in range(ROUNDS // len(KINDS)):
        one_round(kind, seed)


@pytest.mark.proof
@pytest.mark.parametrize("kind", KINDS)
def test_closing_under_the_hands_of_other_threads_at_length(kind: str) -> None:
    for seed in range(100_000 // len(KINDS)):
        one_round(kind, 1_000_000 + seed)
