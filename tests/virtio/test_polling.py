"""Workers that look at their rings: when they stop doing so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio.frontend import T_GET_ID
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
        for _ in range(REQUESTS):
            assert front.request(T_GET_ID, room=20)[0] == 0
        sleeps = server.workers[0].figures().sleeps
    assert sleeps > REQUESTS // 10
