"""Logs, features, events, abort, namespaces; trim, copy, compare; data in pieces; tables."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import Batch, Controller, IoQueue, Namespace, admin, blocks, tables
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.pointers import Segment, pages_of, prp
from vfiotool.errors import KernelError, Unsupported, UsageError


@pytest.fixture
def fake() -> Iterator[Any]:
    with FakeNvme() as device:
        yield device


@pytest.fixture
def controller(fake: Any) -> Controller:
    return Controller(fake)


@pytest.fixture
def disk(controller: Controller) -> Namespace:
    return controller.namespace(1)


@pytest.fixture
def queue(controller: Controller) -> IoQueue:
    return controller.create_queue(16)


def test_queues_have_priorities_where_arbitration_is_weighted(fake: Any) -> None:
    with pytest.raises(Unsupported, match="no weighted round robin"):
        Controller(fake, weighted=True)
    fake.arbitration = 1
    controller = Controller(fake, weighted=True)
    assert fake.registers[0x14] >> 11 & 7 == 1, "CC.AMS"
    queues = [controller.create_queue(16, priority=name) for name in ("low", "urgent", "high")]
    queues.append(controller.create_queue(16))

    def priorities() -> list[int]:
        sent = [entry for entry in fake.commands_seen if entry[0] == nvme_spec.CREATE_SQ]
        return [struct.unpack_from("<I", entry, 44)[0] >> 1 & 3 for entry in sent[-4:]]

    assert priorities() == [3, 0, 1, 0]
    fake.commands_seen.clear()
    controller.reset()
    assert priorities() == [3, 0, 1, 0] and fake.registers[0x14] >> 11 & 7 == 1
    disk = controller.namespace(1)
    assert all(queue.read(disk, 0, 1) == bytes(512) for queue in queues)
    with pytest.raises(UsageError, match="no queue of priority 'first'"):
        controller.create_queue(16, priority="first")
    controller.close()
    plain = Controller(fake)
    assert fake.registers[0x14] >> 11 & 7 == 0
    with pytest.raises(UsageError, match="no queue of priority 'low'"):
        plain.create_queue(16, priority="low")


def test_a_log_is_read_in_pieces(fake: Any, controller: Controller) -> None:
    fake.logs[0x42] = data = os.urandom(10000)
    assert admin.log_page(controller, 0x42, 10000) == data
    assert admin.log_page(controller, 0x42, 4) == data[:4]
    with pytest.raises(KernelError, match=r"log page 0x43 failed: invalid log page"):
        admin.log_page(controller, 0x43, 512)
    with pytest.raises(UsageError, match="whole dwords"):
        admin.log_page(controller, 0x42, 3)


def test_features_are_set_and_read(controller: Controller) -> None:
    admin.set_feature(controller, admin.Feature.VOLATILE_WRITE_CACHE, 1)
    assert admin.get_feature(controller, admin.Feature.VOLATILE_WRITE_CACHE)[0] == 1
    with pytest.raises(KernelError, match="get feature 0x99 failed: invalid field"):
        admin.get_feature(controller, 0x99)


def test_events_are_told_and_asked_for_again(fake: Any, controller: Controller) -> None:
    fake.logs[2] = bytes(512)
    with admin.Events(controller) as events:
        assert events.wait(0.01) == []
        for number in range(3):
            assert controller.identify(1)[24:28] == b"Fake"
            fake.wait(lambda: bool(fake.events))
            assert fake.event(0x02_00_01 | number << 8)
            (event,) = events.wait(5)
            assert (event.kind, event.information, event.page) == (1, number, 2)
        fake.wait(lambda: len(fake.events) == 1)
        controller.reset()
        assert events.wait(0.01) == []
        fake.wait(lambda: len(fake.events) == 1)
        assert fake.event(0x02_00_00) and len(events.wait(5)) == 1


def test_an_event_whose_log_page_could_not_be_read_is_told_later(
    fake: Any, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.logs[2] = bytes(512)
    log_page = admin.log_page

    def interrupted(*arguments: Any) -> bytes:
        monkeypatch.setattr(admin, "log_page", log_page)
        raise KeyboardInterrupt

    with admin.Events(controller) as events:
        assert events.wait(0.01) == []
        fake.wait(lambda: bool(fake.events))
        assert fake.event(0x02_00_01)
        monkeypatch.setattr(admin, "log_page", interrupted)
        with pytest.raises(KeyboardInterrupt):
            events.wait(5)
        assert [one.kind for one in events.wait(5)] == [1]


def test_a_namespace_of_another_command_set_is_told_as_that(fake: Any) -> None:
    fake.command_sets, fake.sets_of = 0x41, {1: 0, 2: 1, 3: 2}
    fake.nsids = [1, 2, 3]
    controller = Controller(fake)
    assert fake.configurations[-1] >> 4 & 7 == 6
    assert [controller.namespace(nsid).command_set for nsid in (1, 3)] == [0, 2]
    with pytest.raises(Unsupported, match="namespace 2 is of the key-value command set"):
        controller.namespace(2)


def test_a_command_is_aborted_by_its_tag(
    fake: Any, controller: Controller, disk: Namespace, queue: IoQueue
) -> None:
    fake.hold = True
    memory = fake.alloc(4096)
    for tag in (4, 5, 6):
        queue.send(nvme_spec.READ, disk, 0, 1, memory, tag=tag)
    fake.wait(lambda: len(fake.held) == 3)
    assert admin.abort(controller, queue, 5)
    assert [(one.tag, one.status) for one in queue.poll(1)] == [(5, 0x07)]
    with pytest.raises(UsageError, match="no command with tag 5"):
        admin.abort(controller, queue, 5)
    fake.release()
    assert sorted(one.tag for one in queue.poll(2)) == [4, 6]


def test_admin_commands_have_their_fields(fake: Any, controller: Controller) -> None:
    fake.commands_seen.clear()
    admin.format_namespace(controller, 3, lbaf=0x12, erase=1, protection=2, extended=True)
    admin.sanitize(controller, 3, passes=2, pattern=0xDEADBEEF)
    assert admin.create_namespace(controller, 1000, lbaf=3) == 7
    admin.attach(controller, 3, [9])
    admin.attach(controller, 3, detach=True)
    admin.delete_namespace(controller, 3)
    admin.firmware_download(controller, bytes(5000))
    admin.firmware_commit(controller, 2, 1)

    def fields(entry: bytes) -> tuple[int, ...]:
        opcode, nsid = entry[0], struct.unpack_from("<I", entry, 4)[0]
        return (opcode, nsid, *struct.unpack_from("<II", entry, 40))

    assert [fields(entry) for entry in fake.commands_seen] == [
        (0x80, 3, 2 | 1 << 4 | 2 << 5 | 1 << 9 | 1 << 12, 0),
        (0x84, 0, 3 | 2 << 4, 0xDEADBEEF),
        (0x0D, 0, 0, 0),
        (0x15, 3, 0, 0),
        (0x15, 3, 1, 0),
        (0x0D, 3, 1, 0),
        (0x11, 0, 1023, 0),
        (0x11, 0, 225, 1024),
        (0x10, 0, 2 | 1 << 3, 0),
    ]


def test_commands_on_blocks_do_what_they_say(fake: Any, disk: Namespace, queue: IoQueue) -> None:
    fake.disk[:] = data = bytearray(os.urandom(len(fake.disk)))
    blocks.write_zeroes(queue, disk, 10, 5)
    data[10 * 512 : 15 * 512] = bytes(5 * 512)
    blocks.trim(queue, disk, [(20, 1), (30, 3)])
    data[20 * 512 : 21 * 512], data[30 * 512 : 33 * 512] = bytes(512), bytes(3 * 512)
    blocks.copy(queue, disk, 100, [(40, 2), (50, 3)])
    data[100 * 512 : 105 * 512] = data[40 * 512 : 42 * 512] + data[50 * 512 : 53 * 512]
    blocks.verify(queue, disk, 0, 100)
    assert fake.disk == data
    blocks.compare(queue, disk, 100, bytes(data[100 * 512 : 105 * 512]))
    with pytest.raises(KernelError, match="compare failure"):
        blocks.compare(queue, disk, 100, bytes(512))
    for call in (
        lambda: blocks.write_zeroes(queue, disk, disk.blocks, 1),
        lambda: blocks.verify(queue, disk, 0, 65537),
        lambda: blocks.trim(queue, disk, []),
        lambda: blocks.copy(queue, disk, disk.blocks - 1, [(0, 2)]),
        lambda: blocks.compare(queue, disk, 0, b"x"),
        lambda: blocks.report_zones(queue, disk),
    ):
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize("seed", range(30))
def test_data_in_pieces_goes_there_and_back(
    fake: Any, disk: Namespace, queue: IoQueue, seed: int
) -> None:
    source = random.Random(seed)
    fake.disk[:] = source.randbytes(len(fake.disk))
    count = source.randrange(1, 250)
    cuts = sorted(source.sample(range(1, count * 128), min(source.randrange(5), count * 128 - 1)))
    sizes = [4 * (b - a) for a, b in zip([0, *cuts], [*cuts, count * 128], strict=True)]
    segments = []
    for size in sizes:
        offset = 4 * source.randrange(2000)
        segments.append(Segment(fake.alloc(offset + size + 64), offset, size))
    for segment in segments:
        segment.buffer.view[:] = b"\xa5" * segment.buffer.size
    lba = source.randrange(disk.blocks - count)
    control = nvme_spec.FORCE_UNIT_ACCESS
    blocks.transfer(queue, nvme_spec.READ, disk, lba, count, segments, control=control)
    got = b"".join(bytes(s.buffer.view[s.offset : s.offset + s.size]) for s in segments)
    assert got == fake.disk[lba * 512 : (lba + count) * 512]
    for segment in segments:
        view, end = segment.buffer.view, segment.offset + segment.size
        assert set(bytes(view[: segment.offset]) + bytes(view[end:])) <= {0xA5}
        assert segment.buffer.pins == 0
    blocks.transfer(queue, nvme_spec.WRITE, disk, 0, count, segments)
    assert fake.disk[: count * 512] == got


def test_a_batch_holds_its_buffer_while_commands_are_out(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    memory = fake.alloc(8 * 4096)
    batch = Batch(
        queue.pair, nvme_spec.READ, 1, blocks=1, size_bytes=512, buffer=memory, stride=4096
    )
    for n in range(8):
        batch.slots[n], batch.lbas[n] = n, disk.blocks if n == 7 else n
    assert batch.submit(8) == 8 and memory.pins == 1
    with pytest.raises(KernelError, match="out of range"):
        batch.poll(8, 10)
    # All had ended: the places come with the next poll, the buffer is free.
    assert memory.pins == 0
    assert batch.poll(8, 0) == 8 and sorted(batch.slots[:8]) == list(range(8))
    assert batch.submit(3) == 3 and batch.poll(3, 10) == 3
    memory.close()


def test_prps_that_cannot_tell_it_are_refused_or_a_scatter_list(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    one, other = fake.alloc(4096), fake.alloc(4096)
    apart = [Segment(one, 0, 512), Segment(other, 0, 512)]
    assert pages_of(apart, 4096) is None
    assert pages_of([Segment(one, 512, 3584), Segment(other, 0, 512)], 4096) is not None
    with pytest.raises(UsageError, match="only the first may begin within a page"):
        blocks.transfer(queue, nvme_spec.READ, disk, 0, 2, apart, scatter=False)
    with pytest.raises(UsageError, match="2 blocks are 1024 bytes"):
        blocks.transfer(queue, nvme_spec.READ, disk, 0, 2, apart[:1])
    with pytest.raises(UsageError, match="no buffer for it is wanted"):
        blocks.transfer(queue, nvme_spec.READ, disk, 0, 2, apart, metadata=Segment(one, 0, 16))


def test_prp_lists_are_chained(fake: Any) -> None:
    table = fake.alloc(3 * 4096)
    entries = [0x1000 * n for n in range(1, 1201)]
    first, second = prp(entries, table, 4096)
    assert first == 0x1000 and second == table.iova
    found, page = [], 0
    while len(found) < 1199:
        here = struct.unpack_from("<512Q", table.view, 4096 * page)
        left = 1199 - len(found)
        found += here[: left if left <= 512 else 511]
        page += 1
        if left > 512:
            assert here[511] == table.iova + 4096 * page
    assert found == entries[1:]
    with pytest.raises(UsageError, match="do not fit"):
        prp([0x1000] * 2000, table, 4096)


def test_metadata_and_protection_are_in_the_command(
    fake: Any, controller: Controller, queue: IoQueue
) -> None:
    fake.metadata = 8
    raw = bytearray(4096)
    struct.pack_into("<Q", raw, 0, 4096)
    raw[29] = 1 | 1 << 3
    struct.pack_into("<HB", raw, 128, 8, 9)
    disk = Namespace.parse(1, bytes(raw))
    assert (disk.metadata_bytes, disk.protection, disk.protection_first) == (8, 1, True)
    memory, extra = fake.alloc(4096), fake.alloc(4096)
    seen: list[bytes] = []
    fake._io = lambda opcode, entry: (seen.append(entry), (0, 0))[1]
    segment, metadata = Segment(memory, 0, 1024), Segment(extra, 64, 16)
    check = nvme_spec.PRCHK_GUARD | nvme_spec.PRCHK_REF
    blocks.transfer(queue, nvme_spec.READ, disk, 5, 2, [segment], metadata=metadata, control=check)
    (pointer,) = struct.unpack_from("<Q", seen[0], 16)
    control, reference = struct.unpack_from("<HxxxxI", seen[0], 50)
    assert (pointer, control, reference) == (extra.iova + 64, check, 5)
    with pytest.raises(UsageError, match="give a buffer for it"):
        blocks.transfer(queue, nvme_spec.READ, disk, 5, 2, [segment])
    # The controller inserts and strips it: no buffer then.
    blocks.transfer(queue, nvme_spec.WRITE, disk, 5, 2, [segment], control=nvme_spec.PRACT)
    extended = Namespace(1, 4096, 512, 8, True)
    longer = Segment(memory, 0, 2 * 520)
    blocks.transfer(queue, nvme_spec.READ, extended, 5, 2, [longer])
    assert len(seen) == 3


def test_tables_have_the_fields_where_the_specification_has_them() -> None:
    raw = bytearray(4096)
    struct.pack_into("<HH", raw, 0, 0x1B36, 0x1AF4)
    raw[4:24], raw[64:72] = b"serial".ljust(20), b"1.0\x1b".ljust(8)
    raw[77], raw[263] = 7, 1
    struct.pack_into("<I", raw, 516, 256)
    raw[280:296] = (1 << 100).to_bytes(16, "little")
    struct.pack_into("<HxBII", raw, 2048 + 32, 900, 2, 16, 4)
    found = tables.id_ctrl(bytes(raw))
    assert (found["vid"], found["ssvid"], found["sn"], found["fr"]) == (
        0x1B36, 0x1AF4, "serial", "1.0?",
    )  # fmt: skip
    assert (found["mdts"], found["nn"], found["tnvmcap"]) == (7, 256, 1 << 100)
    assert [state["max_power"] for state in found["psds"]] == [0, 900]
    assert found["psds"][1]["non-operational_state"] == 1

    raw = bytearray(4096)
    struct.pack_into("<QQQBBB", raw, 0, 1000, 900, 800, 1, 1, 1)
    struct.pack_into("<HBBHBB", raw, 128, 0, 9, 1, 8, 12, 2)
    found = tables.id_ns(bytes(raw))
    assert (found["nsze"], found["ncap"], found["nuse"], found["in_use"]) == (1000, 900, 800, 1)
    assert found["lbafs"] == [{"ms": 0, "ds": 9, "rp": 1}, {"ms": 8, "ds": 12, "rp": 2}]

    descriptors = b"\x03\x10\0\0" + bytes(range(16)) + b"\x04\x01\0\0\x02" + bytes(100)
    assert tables.ns_descriptors(descriptors) == {
        "uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f",
        "csi": 2,
    }
    log = struct.pack("<QHHHH", 5, 1, 7, 0x4005 << 1 | 1, 3).ljust(64, b"\0") + bytes(64)
    (entry,) = tables.error_log(log)
    assert (entry["error_count"], entry["cmdid"], entry["status_field"]) == (5, 7, 0x4005)
    assert tables.fw_log(b"\x01" + bytes(7) + b"1.0     ".ljust(504, b"\0")) == {
        "afi": 1,
        "frs1": "1.0",
    }
    effects = bytearray(4096)
    struct.pack_into("<I", effects, 4 * 6, 1)
    struct.pack_into("<I", effects, 1024 + 4, 3)
    assert tables.effects_log(bytes(effects)) == {"admin": {"0x06": 1}, "io": {"0x01": 3}}


def test_tables_survive_any_bytes() -> None:
    for seed in range(100):
        raw = random.Random(seed).randbytes(4096) if seed else b"\xff" * 4096
        for read in (tables.id_ctrl, tables.id_ns, tables.ns_descriptors, tables.smart_log):
            read(raw)
        tables.error_log(raw)
        tables.effects_log(raw)
        tables.fw_log(raw)
