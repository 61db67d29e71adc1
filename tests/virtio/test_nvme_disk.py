"""Disks of an NVMe controller over vhost-user: our driver's queues, the model behind them."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.models.served import open_files, serving
from tests.virtio.frontend import (
    DATA,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_ZEROES,
    Closed,
    Frontend,
)
from vfiotool.errors import KernelError, Refused, UsageError
from vfiotool.models.nvme import NvmeModel
from vfiotool.virtio import nvme
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.message import VhostRequest
from vfiotool.virtio.server import Export, Server

MIB = 1 << 20
BLOCKS = 16 * MIB // 512


@pytest.fixture
def model() -> NvmeModel:
    return NvmeModel(BLOCKS)


@pytest.fixture
def name(model: NvmeModel) -> Iterator[str]:
    with serving(model) as server:
        yield server.name


@contextmanager
def served(tmp_path: Path, *disks: DiskSettings, threads: int = 1) -> Iterator[list[Frontend]]:
    """Front ends that are connected and run, one for each disk."""
    said: list[str] = []
    with ExitStack() as stack:
        server = stack.enter_context(Server(report=said.append, threads=threads))
        for number, disk in enumerate(disks):
            path = str(tmp_path / f"{number}.sock")
            server.add(Export(f"disk{number}", BlockDisk(disk), listen(path)))
        thread = threading.Thread(target=server.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.stop)
        fronts = []
        for number, disk in enumerate(disks):
            front = Frontend(str(tmp_path / f"{number}.sock"), queues=disk.queues)
            stack.callback(front.close)
            front.up()
            fronts.append(front)
        yield fronts


def ports(name: str) -> nvme.PortFigures:
    (port, _, _), *_ = nvme._hosts[name]._ports.values()
    return port.figures()


def test_what_is_written_is_on_the_disk_without_a_copy(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    disk = DiskSettings(nvme=name, serial="a-serial", queues=2)
    with served(tmp_path, disk) as (front,):
        data = random.Random(1).randbytes(64 << 10)
        assert front.write(100, data, index=0) == 0
        assert bytes(model.disk[100 * 512 : 100 * 512 + len(data)]) == data
        assert front.read(100, len(data), index=1) == data
        assert front.request(T_FLUSH)[0] == 0
        assert front.request(T_GET_ID, room=20) == (0, b"a-serial".ljust(20, b"\0"))
        assert front.request(77)[0] == 2
        found = ports(name)
        assert found.commands >= 3 and found.bounced == 0 and found.in_flight == 0


def test_data_in_odd_pieces_comes_through_a_buffer_and_is_the_same(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    """Pieces that no PRP list tells: odd lengths, odd places, a page in the middle."""
    lots = random.Random(2)
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        for turn in range(40):
            cuts = sorted(lots.sample(range(1, 8192), lots.randint(1, 6)))
            lengths = [b - a for a, b in zip([0, *cuts], [*cuts, 8192], strict=True)]
            places, at = [], DATA + 0x1000
            for length in lengths:
                at += lots.choice([0, 1, 4, 512, 4096])
                places.append((at, length))
                at += length
            data = lots.randbytes(8192)
            for kind, written in ((T_OUT, False), (T_IN, True)):
                front.memory[DATA : DATA + 16] = struct.pack("<IIQ", kind, 0, 16 * turn)
                position = 0
                for place, length in places:
                    piece = bytes(length) if written else data[position : position + length]
                    front.memory[place : place + length] = piece
                    position += length
                chain = [(DATA, 16, False), *((a, n, written) for a, n in places)]
                front.put(front.rings[0], 0, [*chain, (DATA + 16, 1, True)])
                front.add(front.rings[0], 0)
                front.wait(front.rings[0])
                assert front.memory[DATA + 16] == 0
            assert b"".join(front.memory[a : a + n] for a, n in places) == data
            assert bytes(model.disk[8192 * turn : 8192 * turn + 8192]) == data
        assert ports(name).bounced > 0


def test_a_long_request_of_many_pages_becomes_commands_one_after_the_other(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    """Pages in an order of their own, three mebibytes: more than one command takes."""
    count = 1 + 3 * MIB // 65536
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        places = [0x20_0000 + 65536 * n for n in range(count - 1)]
        random.Random(3).shuffle(places)
        data = random.Random(4).randbytes(3 * MIB)
        for number, place in enumerate(places):
            front.memory[place : place + 65536] = data[65536 * number : 65536 * (number + 1)]
        front.memory[DATA : DATA + 16] = struct.pack("<IIQ", T_OUT, 0, 0)
        chain = [(DATA, 16, False), *((place, 65536, False) for place in places)]
        front.put(front.rings[0], 0, [*chain, (DATA + 16, 1, True)])
        front.add(front.rings[0], 0)
        front.wait(front.rings[0])
        assert front.memory[DATA + 16] == 0
        assert bytes(model.disk[: 3 * MIB]) == data
        assert ports(name).bounced == 0


def test_ranges_are_zeroed_and_given_back(tmp_path: Path, model: NvmeModel, name: str) -> None:
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        assert front.write(0, b"x" * 65536) == 0
        assert front.request(T_ZEROES, data=struct.pack("<QII", 8, 16, 0))[0] == 0
        assert bytes(model.disk[:65536]) == b"x" * 4096 + bytes(8192) + b"x" * 53248
        assert front.request(T_DISCARD, data=struct.pack("<QII", 64, 8, 0))[0] == 0
        assert bytes(model.disk[:4096]) == b"x" * 4096
        assert front.request(T_ZEROES, data=struct.pack("<QII", BLOCKS - 8, 16, 0))[0] == 1


def test_two_machines_have_ranges_and_nothing_is_written_beside_them(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    model.disk[:] = b"\xa5" * len(model.disk)
    ranges = [(4 * MIB, 2 * MIB), (8 * MIB, 2 * MIB)]
    disks = [DiskSettings(nvme=f"{name}/1", offset=at, size=size) for at, size in ranges]
    with served(tmp_path, *disks, threads=2) as fronts:
        for number, front in enumerate(fronts):
            for sector in (0, 4096 - 16):
                assert front.write(sector, bytes([number]) * 8192) == 0
            assert front.request(T_IN, 4096, room=512)[0] == 1
            assert front.request(T_OUT, 4095, data=bytes(1024))[0] == 1
            assert front.request(T_OUT, (1 << 55) - 8, data=bytes(4096))[0] == 1
            assert front.request(T_ZEROES, data=struct.pack("<QII", 4090, 8, 0))[0] == 1
    for number, (at, size) in enumerate(ranges):
        assert bytes(model.disk[at : at + 8192]) == bytes([number]) * 8192
        assert bytes(model.disk[at + size - 8192 : at + size]) == bytes([number]) * 8192
    outside = (0, 4 * MIB), (6 * MIB, 8 * MIB), (10 * MIB, 16 * MIB)
    assert all(set(model.disk[start:end]) == {0xA5} for start, end in outside)


def test_ranges_that_overlap_and_odd_ones_are_refused(name: str) -> None:
    one = BlockDisk(DiskSettings(nvme=name, offset=MIB, size=MIB))
    try:
        for offset, size in ((0, None), (2 * MIB - 512, 512), (MIB, MIB)):
            with pytest.raises(Refused, match="another export"):
                BlockDisk(DiskSettings(nvme=f"{name}/1", offset=offset, size=size))
        beside = BlockDisk(DiskSettings(nvme=name, offset=2 * MIB, size=MIB))
        beside.close()
    finally:
        one.close()
    with pytest.raises(UsageError, match="holds"):
        BlockDisk(DiskSettings(nvme=name, offset=15 * MIB, size=2 * MIB))
    with pytest.raises((UsageError, KernelError)):
        BlockDisk(DiskSettings(nvme=f"{name}/7"))
    readers = [BlockDisk(DiskSettings(nvme=name, read_only=True)) for _ in range(2)]
    for reader in readers:
        reader.close()
    assert not nvme._hosts


def test_blocks_of_4096_bytes_are_told_and_kept_to(tmp_path: Path) -> None:
    model = NvmeModel(4096, 12)
    with (
        serving(model) as server,
        served(tmp_path, DiskSettings(nvme=server.name)) as (front,),
    ):
        config = front.ask(VhostRequest.GET_CONFIG, struct.pack("<III", 0, 60, 0) + bytes(60))
        assert struct.unpack_from("<I", config, 12 + 20)[0] == 4096
        data = random.Random(5).randbytes(8192)
        assert front.write(8, data) == 0
        assert bytes(model.disk[4096:12288]) == data
        assert front.request(T_OUT, 1, data=bytes(512))[0] == 1
        assert front.request(T_IN, 1, room=4096)[0] == 1


def test_a_machine_that_vanishes_with_requests_out_leaves_nothing(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    disk = DiskSettings(nvme=name)
    with served(tmp_path, disk) as (front,):
        before = open_files()
        for _ in range(5):
            other = Frontend(str(tmp_path / "0.sock"))
            other.negotiate()
            other.share()
            other.close()
        front.socket.close()
        again = Frontend(str(tmp_path / "0.sock"))
        again.up()
        assert again.read(0, 4096) == bytes(4096)
        host = nvme._hosts[name]
        assert len(host._mapped) == 1 and not host._retired
        again.close()
        assert open_files() <= before + 2


def test_memory_that_changes_under_load(tmp_path: Path, model: NvmeModel, name: str) -> None:
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        data = random.Random(6).randbytes(4096)
        for turn in range(50):
            front.share()
            assert front.write(8 * turn, data) == 0
        assert bytes(model.disk[: 50 * 4096]) == data * 50
        assert len(nvme._hosts[name]._mapped) == 1


def test_memory_without_room_ends_the_connection_and_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        dma = nvme._hosts[name].device.dma

        def full(*_: object, **__: object) -> None:
            raise KernelError("no room", errno_name="ENOSPC")

        monkeypatch.setattr(dma.space, "map", full)
        assert front.acknowledged(VhostRequest.SET_MEM_TABLE, front.table(), [front.fd]) == 1
        monkeypatch.undo()
        assert front.write(0, b"y" * 512) == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "SILENCE_S", 0.5)
    monkeypatch.setattr(nvme, "LOOK_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_controller_that_goes_silent_is_reset_and_its_requests_are_done(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        model.mute_queues = True
        host = nvme._hosts[name]
        reset = host.controller.reset

        def heard() -> None:
            model.mute_queues = False
            reset()

        host.controller.reset = heard  # type: ignore[method-assign]
        assert front.write(0, b"z" * 4096) == 0
        assert bytes(model.disk[:4096]) == b"z" * 4096
        assert host.resets == 1 and front.read(0, 4096) == b"z" * 4096


@pytest.mark.usefixtures("impatient")
def test_a_controller_that_dies_answers_with_errors_and_ends_in_order(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        model.mute_queues = True
        model.ready = False
        assert front.request(T_OUT, 0, data=bytes(512))[0] == 1
        assert front.request(T_IN, 0, room=512)[0] == 1
        assert nvme._hosts[name].failure is not None
        model.ready, model.mute_queues = True, False


def test_an_error_of_the_disk_is_an_error_of_that_request(
    tmp_path: Path, model: NvmeModel, name: str
) -> None:
    with served(tmp_path, DiskSettings(nvme=name)) as (front,):
        model.fail[(1, 2)] = 0x281
        assert front.request(T_IN, 0, room=512)[0] == 1
        assert front.read(0, 512) == bytes(512)


def test_many_requests_at_once_find_their_way(tmp_path: Path, model: NvmeModel, name: str) -> None:
    with served(tmp_path, DiskSettings(nvme=name, queues=2), threads=2) as (front,):
        for number, ring in enumerate(front.rings):
            for slot in range(20):
                at = DATA + 0x20_0000 * number + 0x2000 * slot
                sector = 8 * (20 * number + slot)
                front.memory[at : at + 16] = struct.pack("<IIQ", T_OUT, 0, sector)
                front.memory[at + 4096 : at + 8192] = bytes([sector // 8]) * 4096
                chain = [(at, 16, False), (at + 4096, 4096, False), (at + 16, 1, True)]
                front.put(ring, 3 * slot, chain)
                front.add(ring, 3 * slot, kick=False)
            os.eventfd_write(ring.kick, 1)
        for ring in front.rings:
            assert len(front.wait(ring, 20)) == 20
    assert bytes(model.disk[: 40 * 4096]) == b"".join(bytes([n]) * 4096 for n in range(40))


def test_a_closed_front_end_is_one(tmp_path: Path, name: str) -> None:
    with served(tmp_path, DiskSettings(nvme=name)) as (front,), pytest.raises(Closed):
        front.send(VhostRequest.SET_VRING_NUM, b"")
        front.receive()
