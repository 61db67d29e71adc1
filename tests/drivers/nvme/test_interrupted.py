"""Ctrl-C and fork at any moment: what is in flight stays in hand, and nothing ends twice."""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import Controller, SharedQueue
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import UsageError

rounds = pytest.mark.parametrize(
    "rounds", [300, pytest.param(100_000, marks=pytest.mark.proof)], ids=str
)


def content(lba: int) -> bytes:
    return struct.pack("<QQ", lba, ~lba & 0xFFFFFFFF) * 32


@pytest.fixture
def fake() -> Iterator[FakeNvme]:
    def interrupted(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        with FakeNvme() as device:
            for lba in range(device.blocks):
                device.disk[lba * 512 : lba * 512 + 512] = content(lba)
            yield device
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def soon(source: random.Random) -> None:
    signal.setitimer(signal.ITIMER_REAL, 1e-6 + source.random() * 2e-3)


def calm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)


@rounds
def test_ctrl_c_at_any_moment_ends_no_command_twice_and_loses_no_buffer(
    fake: FakeNvme, rounds: int
) -> None:
    source = random.Random(21)
    controller = Controller(fake)  # type: ignore[arg-type]
    disk = controller.namespace(1)
    own, other = controller.create_queue(16), controller.create_queue(16)
    memory = fake.alloc(16 * 512)
    places: dict[int, tuple[int, int]] = {}
    told: set[int] = set()
    struck = 0
    tag = 0
    for _ in range(rounds):
        try:
            soon(source)
            for n in range(source.randrange(1, 8)):
                tag += 1
                places[tag] = (source.randrange(disk.blocks), n)
                lba, at = places[tag]
                if not own.send(nvme_spec.READ, disk, lba, 1, memory, 512 * at, tag=tag):
                    break
            if source.random() < 0.5:
                own.poll(1, 1)
            first = source.randrange(disk.blocks - 8)
            got = other.read(disk, first, 8)
            calm()
            assert got == b"".join(content(first + n) for n in range(8))
        except KeyboardInterrupt:
            struck += 1
        finally:
            calm()
        for one in own.poll(16, 5):
            assert one.tag in places and one.tag not in told and one.status == 0
            told.add(one.tag)
        assert own.pair.in_flight == 0
        # The queues are nobody's now, and each call gets its own data.
        for queue in (own, other):
            assert queue.read(disk, 3, 2) == content(3) + content(4)
        assert own.commands.out == {} == other.commands.out
    assert struck > rounds // 10 and memory.pins == 0
    # A completion that a call had in hand when it was interrupted goes with it, no more than that.
    assert own.pair.counters().completed == own.pair.submitted
    controller.close()
    memory.close()
    assert fake.buffers == {}


def test_a_child_at_any_moment_is_refused_and_the_parent_goes_on(fake: FakeNvme) -> None:
    source = random.Random(22)
    controller = Controller(fake)  # type: ignore[arg-type]
    disk, queue = controller.namespace(1), controller.create_queue(16)
    shared = SharedQueue(controller.create_queue(16))
    memory = fake.alloc(16 * 512)
    for turn in range(20):
        count = source.randrange(1, 16)
        for n in range(count):
            assert queue.send(nvme_spec.READ, disk, turn + n, 1, memory, 512 * n, tag=n)
        child = os.fork()
        if not child:
            refused = 0
            for call in (lambda: queue.poll(1, 1), lambda: shared.read(disk, 0, 1, memory)):
                try:
                    call()  # type: ignore[no-untyped-call]
                except UsageError:
                    refused += 1
            os._exit(0 if refused == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert sorted(one.tag for one in queue.poll(count, 5)) == list(range(count))
        for n in range(count):
            assert bytes(memory.view[512 * n : 512 * n + 512]) == content(turn + n)
        assert shared.read(disk, 7, 1, memory).status == 0
    controller.close()
