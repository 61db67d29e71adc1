"""A disk over vhost-user, driven by a front end of our own: requests, recovery, bad manners."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.virtio.frontend import (
    DATA,
    GUEST,
    SIZE,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_ZEROES,
    TIMEOUT_S,
    USER,
    Closed,
    Frontend,
)
from vfiotool.errors import Refused, UsageError
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.message import VhostRequest
from vfiotool.virtio.server import Export, Server

MIB = 1 << 20


@contextmanager
def serving(
    path: Path, settings: DiskSettings, **options: int
) -> Iterator[tuple[Server, list[str]]]:
    """A server in a thread of this process, with what it reports."""
    said: list[str] = []
    with Server(report=said.append, **options) as server:
        server.add(Export("disk", BlockDisk(settings), listen(str(path))))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server, said
        finally:
            server.stop()
            thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "image.raw"
    with made.open("wb") as file:
        file.truncate(16 * MIB)
    return made


@pytest.fixture(params=["ram", "file"])
def settings(request: pytest.FixtureRequest, image: Path) -> DiskSettings:
    if request.param == "ram":
        return DiskSettings(size=16 * MIB, serial="a-serial", queues=2)
    return DiskSettings(path=str(image), serial="a-serial", queues=2)


@contextmanager
def connected(path: Path, **options: int) -> Iterator[Frontend]:
    front = Frontend(str(path), **options)
    try:
        yield front
    finally:
        front.close()


@pytest.mark.parametrize("poll_us", [0, 50])
def test_what_is_written_is_read_over_each_queue(
    path: Path, settings: DiskSettings, poll_us: int
) -> None:
    with serving(path, settings, poll_us=poll_us), connected(path, queues=2) as front:
        front.up()
        data = random.Random(1).randbytes(64 * 1024)
        assert front.write(100, data, index=0) == 0
        assert front.read(100, len(data), index=1) == data
        assert front.read(0, 512) == bytes(512)
        assert front.request(T_FLUSH)[0] == 0
        assert front.request(T_GET_ID, room=20) == (0, b"a-serial".ljust(20, b"\0"))
        assert front.request(77)[0] == 2


@pytest.mark.parametrize("sectors", [1, 7, 8, 9, 17])
def test_pieces_of_any_length_and_place_are_written_as_they_are(
    path: Path, settings: DiskSettings, sectors: int
) -> None:
    """Long ones may go past the caches, and what is behind a whole number of their lines."""
    with serving(path, settings), connected(path) as front:
        front.up()
        data = random.Random(sectors).randbytes(sectors * 512)
        around = b"\x5a" * 32 * 512
        for sector in (3, 8, 11):
            assert front.write(0, around) == 0
            assert front.write(sector, data) == 0
            end = sector * 512 + len(data)
            assert front.read(0, len(around)) == around[: sector * 512] + data + around[end:]


def test_requests_beyond_the_disk_and_odd_lengths_are_errors(
    path: Path, settings: DiskSettings
) -> None:
    with serving(path, settings), connected(path) as front:
        front.up()
        last = 16 * MIB // 512 - 1
        assert front.write(last, bytes(512)) == 0
        assert front.write(last, bytes(1024)) == 1
        assert front.write(last + 1, bytes(512)) == 1
        assert front.write((1 << 64) - 1, bytes(1024)) == 1
        assert front.write(0, bytes(100)) == 1
        assert front.request(T_IN, 0, room=511)[0] == 1
        assert front.write(0, bytes(512)) == 0


def test_zeros_and_discards_clear_what_they_name_and_no_more(
    path: Path, settings: DiskSettings
) -> None:
    with serving(path, settings), connected(path) as front:
        front.up()
        for kind, flags in ((T_ZEROES, 0), (T_ZEROES, 1), (T_DISCARD, 0)):
            assert front.write(0, b"\x5a" * 24 * 512) == 0
            assert front.request(kind, data=struct.pack("<QII", 8, 8, flags))[0] == 0
            found = front.read(0, 24 * 512)
            assert found == b"\x5a" * 4096 + bytes(4096) + b"\x5a" * 4096
        assert front.request(T_DISCARD, data=struct.pack("<QII", 0, 8, 1))[0] == 2
        assert front.request(T_ZEROES, data=struct.pack("<QII", 1 << 62, 8, 0))[0] == 1
        assert front.request(T_ZEROES, data=bytes(17))[0] == 1


def test_any_framing_is_one_stream_of_bytes(path: Path, settings: DiskSettings) -> None:
    """Headers in pieces, data beside them, the status in the data's last segment."""
    with serving(path, settings), connected(path) as front:
        front.up()
        ring, data = front.rings[0], random.Random(2).randbytes(1024)
        front.memory[DATA : DATA + 16 + 1024] = struct.pack("<IIQ", T_OUT, 0, 7) + data
        front.put(
            ring,
            0,
            [
                (DATA, 5, False),
                (DATA + 5, 20, False),
                (DATA + 25, 1015, False),
                (DATA + 5000, 1, True),
            ],
        )
        front.add(ring, 0)
        assert front.wait(ring) == [(0, 1)] and front.memory[DATA + 5000] == 0
        front.memory[DATA : DATA + 16] = struct.pack("<IIQ", T_IN, 0, 7)
        front.put(ring, 8, [(DATA, 16, False), (DATA + 100, 3, True), (DATA + 103, 1022, True)])
        front.add(ring, 8)
        assert front.wait(ring) == [(8, 1025)]
        assert front.memory[DATA + 100 : DATA + 1124] == data
        assert front.memory[DATA + 1124] == 0


def test_many_requests_at_once_each_end_once(path: Path, settings: DiskSettings) -> None:
    with serving(path, settings, poll_us=20), connected(path) as front:
        front.up()
        ring = front.rings[0]
        for turn in range(40):
            for number in range(SIZE // 4):
                at = DATA + number * 1024
                front.memory[at : at + 16] = struct.pack("<IIQ", T_OUT, 0, number)
                front.memory[at + 16 : at + 528] = struct.pack("<II", turn, number) * 64
                front.put(ring, 4 * number, [(at, 528, False), (at + 600, 1, True)])
                front.add(ring, 4 * number, kick=number % 3 == 0)
            os.eventfd_write(ring.kick, 1)
            heads = [head for head, _ in front.wait(ring, SIZE // 4)]
            assert sorted(heads) == [4 * number for number in range(SIZE // 4)]
        assert front.read(3, 512) == struct.pack("<II", 39, 3) * 64


def test_kicks_that_block_hold_no_worker(path: Path, settings: DiskSettings) -> None:
    """The eventfd's mode is shared with the driver; two queues with one kick find it ready once."""
    with serving(path, settings), connected(path, queues=2) as bad, connected(path) as front:
        os.close(bad.rings[1].kick)
        bad.rings[1].kick = os.dup(bad.rings[0].kick)
        bad.up()
        for _ in range(10):
            os.set_blocking(bad.rings[0].kick, True)
            os.eventfd_write(bad.rings[0].kick, 1)
            # Setting a call is answered by the worker; one that waits in a read answers nothing.
            index = struct.pack("<Q", 0)
            assert bad.acknowledged(VhostRequest.SET_VRING_CALL, index, [bad.rings[0].call]) == 0
        assert bad.stop(0) == 0 and bad.stop(1) == 0
        front.up()
        assert front.write(0, bytes(512)) == 0


def test_the_configuration_names_the_disk(path: Path, settings: DiskSettings) -> None:
    with serving(path, settings), connected(path) as front:
        front.negotiate()
        head = struct.pack("<III", 0, 60, 0)
        config = front.ask(VhostRequest.GET_CONFIG, head + bytes(60))[12:]
        assert struct.unpack_from("<Q", config)[0] == 16 * MIB // 512
        assert struct.unpack_from("<H", config, 34)[0] == 2
        front.send(VhostRequest.GET_CONFIG, struct.pack("<III", 250, 60, 0) + bytes(60))
        with pytest.raises(Closed):
            front.receive()


def test_a_grown_image_is_told_to_the_driver(path: Path, image: Path) -> None:
    ours, theirs = socket.socketpair()
    with (
        serving(path, DiskSettings(path=str(image))) as (server, _),
        connected(path) as front,
        ours,
        theirs,
    ):
        front.up()
        assert front.acknowledged(VhostRequest.SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
        os.truncate(image, 32 * MIB)
        assert front.write(20 * MIB // 512, bytes(512)) == 1
        assert server.resize("disk")
        ours.settimeout(10)
        assert struct.unpack("<III", ours.recv(12))[0] == 2
        assert front.write(20 * MIB // 512, bytes(512)) == 0


def test_what_is_written_is_logged_for_a_migration(path: Path, settings: DiskSettings) -> None:
    with serving(path, settings), connected(path) as front:
        front.up()
        front.write(0, b"d" * 8192)
        log = os.memfd_create("log", os.MFD_CLOEXEC)
        pages = (GUEST + front.size) // 4096
        os.ftruncate(log, pages // 8)
        front.send(VhostRequest.SET_LOG_BASE, struct.pack("<QQ", pages // 8, 0), [log])
        front.receive()
        assert front.read(0, 512) == b"d" * 512
        assert not any(os.pread(log, pages // 8, 0))
        logging = struct.pack("<Q", front.features | 1 << 26)
        assert front.acknowledged(VhostRequest.SET_FEATURES, logging) == 0
        at = USER + front.rings[0].at
        logged = struct.pack("<IIQQQQ", 0, 1, at, at + 0x2000, at + 0x1000, GUEST + 0x2000)
        assert front.acknowledged(VhostRequest.SET_VRING_ADDR, logged) == 0
        assert front.read(0, 8192) == b"d" * 8192
        bits = os.pread(log, pages // 8, 0)
        dirty = {page for page in range(pages) if bits[page // 8] >> page % 8 & 1}
        first = (GUEST + DATA) // 4096
        assert dirty == {first, first + 1, first + 2, (GUEST + 0x2000) // 4096}
        # A log that is too small for the memory is not written beyond its end.
        front.send(VhostRequest.SET_LOG_BASE, struct.pack("<QQ", 1, 0), [log])
        front.receive()
        assert front.read(0, 512) == b"d" * 512
        os.close(log)


def test_a_second_machine_takes_over_when_the_first_has_stopped(
    path: Path, settings: DiskSettings
) -> None:
    with serving(path, settings), connected(path) as first, connected(path) as second:
        first.up()
        first.write(0, b"1" * 512)
        second.negotiate()
        second.share()
        with pytest.raises(Closed):
            second.start()
        with connected(path) as third:
            third.negotiate()
            third.share()
            assert first.read(0, 512) == b"1" * 512
            first.stop()
            third.start()
            assert third.read(0, 512) == b"1" * 512


def test_a_read_only_disk_stays_as_it_is(path: Path, image: Path) -> None:
    with serving(path, DiskSettings(path=str(image), read_only=True)), connected(path) as front:
        front.up()
        assert front.features & 1 << 5
        assert front.write(0, b"x" * 512) == 1
        assert front.request(T_ZEROES, data=struct.pack("<QII", 0, 8, 0))[0] in (1, 2)
        assert front.read(0, 512) == bytes(512)
    assert image.read_bytes() == bytes(16 * MIB)


def test_a_part_of_an_image_is_served_and_nothing_round_it(path: Path, image: Path) -> None:
    image.write_bytes(b"\x11" * 16 * MIB)
    part = DiskSettings(path=str(image), offset=MIB, size=MIB)
    with serving(path, part), connected(path) as front:
        front.up()
        assert front.write(0, b"\x22" * 512) == 0
        assert front.write(MIB // 512 - 1, b"\x33" * 512) == 0
        assert front.write(MIB // 512, b"\x44" * 512) == 1
    found = image.read_bytes()
    assert found[MIB : MIB + 512] == b"\x22" * 512
    assert set(found[:MIB] + found[2 * MIB :]) == {0x11}


def test_stopping_and_starting_goes_on_where_it_was(path: Path, settings: DiskSettings) -> None:
    """Firmware runs queue 0 for itself before the kernel starts all of them."""
    with serving(path, settings), connected(path, queues=2) as front:
        front.negotiate()
        front.share()
        front.start(0)
        assert front.write(0, b"a" * 512) == 0
        base = front.stop(0)
        assert base == 1
        front.start(0, base)
        front.start(1)
        assert front.read(0, 512, index=1) == b"a" * 512
        assert front.write(1, b"b" * 512) == 0
        # Another start from nothing, as after a reset of the device.
        assert front.stop(0) == 2
        front.memory[0:0x4000] = bytes(0x4000)
        front.rings[0].added = front.rings[0].seen = 0
        front.start(0, 0)
        assert front.read(1, 512) == b"b" * 512


def test_memory_is_swapped_and_plugged_under_running_queues(
    path: Path, settings: DiskSettings
) -> None:
    with serving(path, settings), connected(path) as front:
        front.up()
        assert front.write(0, b"m" * 512) == 0
        other = os.memfd_create("more", os.MFD_CLOEXEC)
        os.ftruncate(other, MIB)
        slot = struct.pack("<QQQQQ", 0, 0x9000_0000, MIB, USER + (1 << 40), 0)
        for _ in range(50):
            assert front.acknowledged(VhostRequest.ADD_MEM_REG, slot, [other]) == 0
            assert front.read(0, 512) == b"m" * 512
            assert front.acknowledged(VhostRequest.REM_MEM_REG, slot) == 0
            front.share()
            assert front.read(0, 512) == b"m" * 512
        # What overlaps is refused, and what was there goes on.
        wrong = struct.pack("<QQQQQ", 0, 0x4000_0000, MIB, USER + (1 << 40), 0)
        assert front.acknowledged(VhostRequest.ADD_MEM_REG, wrong, [other]) == 1
        assert front.read(0, 512) == b"m" * 512
        os.close(other)


def test_memory_that_shrinks_breaks_its_own_queue_only(path: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.sock"
    said: list[str] = []
    with Server(report=said.append) as server:
        for number, where in enumerate((path, second)):
            disk = BlockDisk(DiskSettings(size=MIB))
            server.add(Export(f"disk{number}", disk, listen(str(where))))
        thread = threading.Thread(target=server.run)
        thread.start()
        with connected(path) as front, connected(second) as other:
            front.up()
            other.up()
            front.put(front.rings[0], 0, [(4 * MIB, 16, False), (4 * MIB + 16, 1, True)])
            os.ftruncate(front.fd, 2 * MIB)
            front.add(front.rings[0], 0)
            assert other.write(0, b"z" * 512) == 0
            assert other.read(0, 512) == b"z" * 512
            deadline = time.monotonic() + 20
            while not server.exports["disk0"].connections[0].frontend.broken():
                assert time.monotonic() < deadline
        server.stop()
        thread.join()


SERVER = """
import sys
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.server import Export, Server
with Server() as server:
    server.add(Export("disk", BlockDisk(DiskSettings(path=sys.argv[2])), listen(sys.argv[1])))
    print("ready", flush=True)
    server.run()
"""


def spawn(path: Path, image: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVER, str(path), str(image)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_server_that_is_killed_is_taken_over_without_loss(path: Path, image: Path) -> None:
    """The in-flight log tells the next process what was not done; every write ends once or twice,
    and what was acknowledged is there."""
    rng = random.Random(3)
    process = spawn(path, image)
    front = Frontend(str(path))
    front.negotiate()
    asked = struct.pack("<QQHH4x", 0, 0, 1, SIZE)
    front.send(VhostRequest.GET_INFLIGHT_FD, asked)
    _, area, (log,) = front.receive()
    front.share()
    assert front.acknowledged(VhostRequest.SET_INFLIGHT_FD, area, [log]) == 0
    front.start()
    ring, sent, kills = front.rings[0], 0, 0
    outstanding: dict[int, int] = {}
    free = [4 * number for number in range(SIZE // 4)]
    acknowledged: dict[int, int] = {}
    try:
        while kills < 10 or outstanding:
            while free and kills < 10:
                head = free.pop()
                at, sector = DATA + head * 1024, rng.randrange(1000)
                if sector in outstanding.values():
                    free.append(head)
                    break
                front.memory[at : at + 16] = struct.pack("<IIQ", T_OUT, 0, sector)
                front.memory[at + 16 : at + 528] = struct.pack("<II", sector, sent) * 64
                front.memory[at + 600] = 0xFF
                front.put(ring, head, [(at, 528, False), (at + 600, 1, True)])
                outstanding[head] = sector
                front.add(ring, head)
                sent += 1
            if rng.random() < 0.05 and kills < 10:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                process = spawn(path, image)
                front.socket.close()
                front.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                front.socket.settimeout(20)
                front.socket.connect(str(path))
                front.negotiate()
                front.share()
                assert front.acknowledged(VhostRequest.SET_INFLIGHT_FD, area, [log]) == 0
                front.start(base=front.u16(ring.at + 0x2002))
            if outstanding:
                for head, _ in front.wait(ring):
                    at = DATA + head * 1024
                    assert front.memory[at + 600] == 0
                    acknowledged[outstanding.pop(head)] = struct.unpack_from(
                        "<I", front.memory, at + 20
                    )[0]
                    free.append(head)
    finally:
        process.terminate()
        process.wait()
        front.close()
        os.close(log)
    assert len(acknowledged) > 50
    stored = image.read_bytes()
    for sector, number in acknowledged.items():
        assert stored[512 * sector : 512 * sector + 512] == struct.pack("<II", sector, number) * 64


def test_an_image_is_served_once(path: Path, image: Path) -> None:
    disk = BlockDisk(DiskSettings(path=str(image)))
    with pytest.raises(Refused, match="in use"):
        BlockDisk(DiskSettings(path=str(image)))
    with pytest.raises(Refused, match="in use"):
        BlockDisk(DiskSettings(path=str(image), read_only=True))
    disk.close()
    readers = [BlockDisk(DiskSettings(path=str(image), read_only=True)) for _ in range(2)]
    with pytest.raises(Refused):
        BlockDisk(DiskSettings(path=str(image)))
    for reader in readers:
        reader.close()
    BlockDisk(DiskSettings(path=str(image))).close()


def test_a_batch_that_takes_long_is_answered_in_parts(path: Path) -> None:
    """The first write to a huge page clears all of it."""
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not pages.exists() or "[never]" in pages.read_text():
        pytest.skip("no huge pages, whose first use takes long")
    count, apart = 21, 2 * MIB
    with serving(path, DiskSettings(size=count * apart)), connected(path) as front:
        front.negotiate(without=1 << 29)  # each part is signalled then
        front.share()
        front.start()
        ring = front.rings[0]
        for number in range(count):
            at, sector = DATA + 1024 * number, number * apart // 512
            front.memory[at : at + 16] = struct.pack("<IIQ", T_OUT, 0, sector)
            front.put(ring, 3 * number, [(at, 528, False), (at + 600, 1, True)])
            front.add(ring, 3 * number, kick=number == count - 1)
        while front.u16(ring.at + 0x2002) < count:
            assert select.select([ring.call], [], [], TIMEOUT_S)[0]
        front.stop()
        assert os.eventfd_read(ring.call) > 2  # the first is of the start


def test_a_machine_moves_between_two_servers_that_lock_its_image_while_it_runs(
    path: Path, image: Path
) -> None:
    settings, other = DiskSettings(path=str(image), lock="running"), path.with_name("other")
    with (
        serving(path, settings),
        serving(other, settings),
        connected(path) as first,
        connected(other) as second,
    ):
        first.up()
        first.write(0, b"1" * 512)
        second.negotiate()
        second.share()
        with pytest.raises(AssertionError):  # the answer is an error
            second.start()
        with pytest.raises(Refused, match="in use"):
            BlockDisk(DiskSettings(path=str(image)))
        first.stop()
        with connected(other) as third:
            third.up()
            assert third.read(0, 512) == b"1" * 512
            with pytest.raises(Closed):
                first.start()
    BlockDisk(DiskSettings(path=str(image))).close()


def test_what_is_no_disk_is_named(tmp_path: Path, image: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "odd").write_bytes(bytes(1000))
    for settings, words in (
        (DiskSettings(path=str(tmp_path / "absent")), "absent"),
        (DiskSettings(path=str(tmp_path / "fifo")), "neither"),
        (DiskSettings(path=str(tmp_path)), "directory"),
        (DiskSettings(path=str(tmp_path / "odd")), "not a multiple"),
        (DiskSettings(path=str(image), size=32 * MIB), "holds"),
        (DiskSettings(path=str(image), offset=100), "--offset"),
        (DiskSettings(size=100), "--size"),
        (DiskSettings(), "size"),
        (DiskSettings(size=MIB, block_size=1000), "--block-size"),
        (DiskSettings(size=MIB, physical_block_size=3000), "--physical-block-size 3000"),
        (DiskSettings(size=MIB, block_size=4096, physical_block_size=512), "--physical-block-size"),
        (DiskSettings(size=MIB, queues=0), "--queues"),
        (DiskSettings(size=MIB, serial="x" * 21), "--serial"),
    ):
        with pytest.raises(Exception, match=words):
            BlockDisk(settings)


@pytest.mark.parametrize(
    ("block", "physical", "offset", "told"),
    [
        (512, 0, 0, (512, 0, 0, 0, 0)),
        (512, 4096, 0, (512, 3, 0, 8, 0)),
        (512, 4096, 1536, (512, 3, 5, 8, 0)),
        (4096, 65536, 0, (4096, 4, 0, 16, 0)),
        (4096, 4096, 0, (4096, 0, 0, 0, 0)),
    ],
)
def test_logical_and_physical_blocks_are_told(
    image: Path, block: int, physical: int, offset: int, told: tuple[int, ...]
) -> None:
    """Block size, exponent of a physical block, first aligned block, least and best write."""
    disk = BlockDisk(
        DiskSettings(
            path=str(image),
            size=MIB,
            offset=offset,
            block_size=block,
            physical_block_size=physical,
        )
    )
    try:
        assert struct.unpack_from("<IBBHI", disk.config(), 20) == told
    finally:
        disk.close()


def test_a_socket_in_use_is_refused_and_a_stale_one_replaced(path: Path, tmp_path: Path) -> None:
    first = listen(str(path))
    with pytest.raises(Refused):
        listen(str(path))
    first.close()
    listen(str(path)).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a socket"):
        listen(str(tmp_path / "file"))
    with pytest.raises(UsageError, match="107"):
        listen(str(tmp_path / ("x" * 120)))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_hostile_messages_cost_nobody_else_anything(path: Path, tmp_path: Path) -> None:
    """Random and half-right messages over many connections; an honest front end beside them is
    served throughout, and no descriptor stays."""
    second = tmp_path / "honest.sock"
    rng = random.Random(4)
    with Server(report=lambda text: None) as server:
        for name, where in (("hostile", path), ("honest", second)):
            disk = BlockDisk(DiskSettings(size=MIB, queues=2))
            server.add(Export(name, disk, listen(str(where))))
        thread = threading.Thread(target=server.run)
        thread.start()
        with connected(second) as honest:
            honest.up()
            honest.write(0, b"h" * 512)
            before = descriptors()
            for turn in range(300):
                front = Frontend(str(path), queues=2)
                with suppress(Closed, TimeoutError):
                    attack(front, rng)
                front.close()
                if turn % 10 == 0:
                    assert honest.read(0, 512) == b"h" * 512
            # The last connection's end is seen by the server when it comes to it.
            with connected(path) as front:
                front.up()
                assert front.write(0, bytes(512)) == 0
            deadline = time.monotonic() + 20
            while descriptors() > before:
                assert time.monotonic() < deadline, "descriptors were left open"
        server.stop()
        thread.join()


def attack(front: Frontend, rng: random.Random) -> None:
    """A session that goes wrong somewhere."""
    front.socket.settimeout(0.05)
    if rng.random() < 0.7:
        front.negotiate()
    if rng.random() < 0.7:
        front.share()
    if rng.random() < 0.5:
        front.start(rng.randrange(2))
    for _ in range(rng.randrange(1, 12)):
        request = rng.choice([*VhostRequest, rng.randrange(60)])
        size = rng.choice([0, 8, 24, 40, rng.randrange(64)])
        words = [
            rng.choice([0, 1, 2, 0xFF, 1 << 8, 1 << 32, (1 << 64) - 1, rng.getrandbits(64)])
            for _ in range(8)
        ]
        payload = struct.pack("<8Q", *words)[:size]
        if rng.random() < 0.2:
            payload = struct.pack("<IIQQQQ", 1, 0, *words[:4])
        fds = [front.fd] * rng.choice([0, 0, 1, 1, 2, 8])
        flags = rng.choice([1, 1, 9, 9, 0, 5, rng.getrandbits(32)])
        front.send(request, payload, fds, flags)
        if rng.random() < 0.3:
            front.memory[0:0x4000] = rng.randbytes(0x4000)
            os.eventfd_write(front.rings[0].kick, 1)
    if rng.random() < 0.1:
        os.ftruncate(front.fd, rng.choice([0, 4096, MIB]))
