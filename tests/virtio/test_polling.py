"""Workers that look at their rings: when they stop doing so."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA, T_GET_ID
from tests.virtio.test_vhost_user_blk import connected, serving
from vfiotool.virtio.block import DiskSettings

REQUESTS = 400


@pytest.fixture
def one_processor() -> Iterator[None]:
    """All that this thread starts shares one processor with it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_processor")
def test_rings_are_not_looked_at_while_their_driver_wants_the_processor(tmp_path: Path) -> None:
    """A look of 5 ms finds each request, but only because the driver has taken the processor."""
    path = tmp_path / "disk.sock"
    with (
        serving(path, DiskSettings(size=1 << 20, serial="s"), poll_us=5_000) as (server, _),
        connected(path) as front,
    ):
        front.up()
        seen = [0]
        # Once more where others took the processor from both.
        for _ in range(5):
            for _ in range(REQUESTS):
                assert front.request(T_GET_ID, room=20)[0] == 0
            seen.append(server.workers[0].figures().sleeps)
            if seen[-1] - seen[-2] > REQUESTS // 10:
                return
    pytest.fail(f"asleep so often after each {REQUESTS} requests: {seen}")


def test_a_driver_that_sleeps_is_told_before_all_that_it_asked_for_is_done(tmp_path: Path) -> None:
    """By the time that it runs there is work for both ends."""
    path, count = tmp_path / "disk.sock", 20
    with (
        serving(path, DiskSettings(size=1 << 20, serial="s")) as (server, _),
        connected(path) as front,
    ):
        front.up()
        ring = front.rings[0]
        for number in range(count):
            at = DATA + 64 * number
            front.memory[at : at + 16] = struct.pack("<IIQ", T_GET_ID, 0, 0)
            front.put(ring, 3 * number, [(at, 16, False), (at + 32, 20, True), (at + 16, 1, True)])
        before = server.workers[0].figures().batches
        for number in range(count):
            front.add(ring, 3 * number, kick=number == count - 1)
        assert sorted(front.wait(ring, count)) == [(3 * number, 21) for number in range(count)]
        batches = server.workers[0].figures().batches - before
    # It is looked whether the driver wants to be told after 8, after 16, and after the rest.
    assert batches >= 3
