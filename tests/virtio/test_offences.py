"""A front end whose interrupt blocks holds a shared thread up once, and then has to wait itself."""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA, T_IN, Closed, Frontend, Ring
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.message import VhostRequest
from vfiotool.virtio.offences import FIRST_S, FORGOTTEN_S, LONGEST_S, Offences
from vfiotool.virtio.server import Export, Server
from vfiotool.virtio.status import status_of

MIB = 1 << 20


def test_each_wait_is_twice_the_last_one_up_to_a_limit() -> None:
    offences, now, waits = Offences(), 100.0, []
    for _ in range(8):
        waits.append(offences.note(now))
        assert offences.until == now + waits[-1]
        now = offences.until
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_S, LONGEST_S, LONGEST_S]


def test_offences_are_forgotten_after_a_while_without_one() -> None:
    offences = Offences()
    offences.note(0.0)
    assert offences.note(FIRST_S + FORGOTTEN_S) == 2 * FIRST_S
    assert offences.note(offences.until + FORGOTTEN_S + 1) == FIRST_S


class Served:
    """A server of two disks whose clock is the test's."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.said: list[str] = []
        self.server = Server(report=self.said.append, clock=lambda: self.now)
        self.paths = {name: str(folder / name) for name in ("honest", "other")}
        for name, path in self.paths.items():
            disk = BlockDisk(DiskSettings(size=MIB, queues=2))
            self.server.add(Export(name, disk, listen(path), path))

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.server.soon(lambda: None)

    def connect(self, name: str) -> Frontend:
        return Frontend(self.paths[name], queues=2)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    with made.server:
        thread = threading.Thread(target=made.server.run)
        thread.start()
        try:
            yield made
        finally:
            made.server.stop()
            thread.join()


def fill(ring: Ring) -> None:
    """Have the next signal wait."""
    os.eventfd_read(ring.call)
    os.set_blocking(ring.call, True)
    os.eventfd_write(ring.call, (1 << 64) - 2)


def ask(front: Frontend, index: int) -> None:
    """A read, whose completion is waited for by looking alone."""
    ring, at = front.rings[index], DATA + 0x1000 * index
    front.memory[at : at + 16] = struct.pack("<IIQ", T_IN, 0, 0)
    front.put(ring, 0, [(at, 16, False), (at + 32, 512, True), (at + 16, 1, True)])
    front.add(ring, 0)


@contextmanager
def offending(served: Served) -> Iterator[Frontend]:
    """A front end whose first queue's interrupt has blocked."""
    front = served.connect("other")
    front.up()
    fill(front.rings[0])
    ask(front, 0)
    # The queue's worker answers this one after it was held up.
    honest = served.connect("honest")
    honest.up()
    while front.u16(front.rings[0].at + 0x2002) == 0:
        assert honest.write(0, b"h" * 512) == 0
    assert honest.write(0, b"h" * 512) == 0
    honest.close()
    yield front
    front.close()


def answers(front: Frontend) -> bool:
    front.send(VhostRequest.GET_FEATURES)
    return bool(select.select([front.socket], [], [], 0.1)[0])


def test_its_socket_takes_no_connection_until_it_has_waited(served: Served) -> None:
    for wait_s in (FIRST_S, 2 * FIRST_S):
        with offending(served) as front:
            # One beside it is the same tenant's.
            beside = served.connect("other")
            with pytest.raises(Closed):
                beside.ask(VhostRequest.GET_FEATURES)
            beside.close()
            with pytest.raises(Closed):
                front.stop()
        again = served.connect("other")
        assert not answers(again)
        assert served.said[-1] == (
            f"other: its driver held up others: no connection for {wait_s:g} s"
        )
        held = {one["name"]: one["held_off_s"] for one in status_of(served.server)["exports"]}
        assert held == {"honest": None, "other": wait_s}
        served.later(wait_s - 0.1)
        assert not select.select([again.socket], [], [], 0.1)[0]
        # Nobody else waits.
        honest = served.connect("honest")
        honest.up()
        assert honest.write(0, b"h" * 512) == 0
        honest.close()
        served.later(0.1)
        assert select.select([again.socket], [], [], 20)[0]
        again.close()


def test_one_that_only_goes_is_waited_for_as_well(served: Served) -> None:
    with offending(served):
        pass
    again = served.connect("other")
    assert not answers(again)
    served.later(FIRST_S)
    assert select.select([again.socket], [], [], 20)[0]
    again.close()


def test_its_other_queues_are_not_signalled_any_more(served: Served) -> None:
    """Each of them would hold its worker up by as much."""
    with offending(served) as front:
        ring = front.rings[1]
        os.eventfd_read(ring.call)
        ask(front, 1)
        honest = served.connect("honest")
        honest.up()
        while front.u16(ring.at + 0x2002) == 0:
            assert honest.write(0, b"h" * 512) == 0
        assert honest.write(0, b"h" * 512) == 0
        honest.close()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ring.call)


def test_a_server_ends_and_removes_what_waits(served: Served) -> None:
    with offending(served):
        pass
    again = served.connect("other")
    assert not answers(again)
    done = threading.Event()

    def remove() -> None:
        served.server.remove("other")
        done.set()

    served.server.soon(remove)
    assert done.wait(20)
    with pytest.raises((Closed, ConnectionResetError)):
        again.receive()
    again.close()
    assert served.connect("honest")
