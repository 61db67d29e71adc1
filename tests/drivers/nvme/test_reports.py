"""What others met in their NVMe drivers and tools, replayed here: each test names the report."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import Controller, Namespace, admin, tables
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.status import ABORTED_BY_HOST
from vfiotool.errors import KernelError, UsageError


@pytest.fixture
def fake() -> Iterator[Any]:
    with FakeNvme() as device:
        yield device


def namespace_page(**fields: int) -> bytearray:
    page = bytearray(4096)
    page[0:8] = struct.pack("<Q", 4096)
    for name, value in fields.items():
        page[{"nlbaf": 25, "flbas": 26, "nulbaf": 81}[name]] = value
    for index in range(64):
        page[128 + 4 * index : 132 + 4 * index] = struct.pack("<HBB", index, 9 + index % 4, 0)
    return page


def test_a_small_queue_wraps_where_the_controller_ends_it(fake: Any) -> None:
    """edk2 issue 8144: the tail ran past the size that the controller had allowed, and it hung."""
    fake.entries = 5
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue()
    assert queue.depth == 4 and queue.pair.rings.sq_entries == 5
    for lba in range(64):
        fake.disk[lba * 512 : lba * 512 + 512] = bytes([lba]) * 512
    for lba in range(64):
        assert queue.read(disk, lba, 1) == bytes([lba]) * 512


def test_identify_controller_names_no_namespace(fake: Any) -> None:
    """xnvme issue 465, collectd pull request 3974: disks count an Identify Controller with a
    namespace as an error."""
    seen: list[tuple[int, int]] = []
    really = fake._identify

    def identify(cns: int, nsid: int, prp1: int) -> int:
        seen.append((cns, nsid))
        return int(really(cns, nsid, prp1))

    fake._identify = identify
    controller = Controller(fake)
    controller.namespace(1)
    assert (nvme_spec.CNS_CONTROLLER, 0) in seen
    assert {nsid for cns, nsid in seen if cns == nvme_spec.CNS_CONTROLLER} == {0}


def test_a_format_index_above_15_is_put_together_from_both_its_parts() -> None:
    """nvme-cli issue 1623, pull request 1307: FLBAS has the upper two bits at 6:5, with the bit of
    extended blocks between."""
    for index in (0, 3, 15, 16, 18, 47, 63):
        flags = index & 0xF | (index >> 4) << 5
        raw = bytes(namespace_page(nlbaf=63, flbas=flags | 1 << 4))
        disk = Namespace.parse(1, raw)
        assert (disk.metadata_bytes, disk.block_bytes) == (index, 512 << index % 4)
        assert disk.extended == bool(index)
        assert tables.id_ns(raw)["in_use"] == index


def test_every_format_is_listed_to_the_last_one() -> None:
    """nvme-cli pull requests 1951 (NLBAF counts from zero: the last one was not looked at) and 4021
    (the formats of unique capabilities, NULBAF, were missing)."""
    assert len(tables.id_ns(bytes(namespace_page(nlbaf=0)))["lbafs"]) == 1
    told = tables.id_ns(bytes(namespace_page(nlbaf=1, nulbaf=1)))["lbafs"]
    assert [one["ms"] for one in told] == [0, 1, 2]
    assert len(tables.id_ns(bytes(namespace_page(nlbaf=63, nulbaf=200)))["lbafs"]) == 64


def test_a_format_without_a_number_keeps_the_one_in_use(fake: Any) -> None:
    """nvme-cli issues 650 and 458: a format was sent that nobody had asked for, and a disk could
    not be brought back from it."""
    controller = Controller(fake)
    really = fake._identify

    def identify(cns: int, nsid: int, prp1: int) -> int:
        status = int(really(cns, nsid, prp1))
        if cns == nvme_spec.CNS_NAMESPACE:
            fake.at(prp1 + 26, 1)[:] = bytes([3 | 1 << 5])
        return status

    fake._identify = identify
    for wanted, sent in ((None, 19), (0, 0), (2, 2), (33, 33)):
        fake.commands_seen.clear()
        admin.format_namespace(controller, 1, lbaf=wanted)
        (dword,) = struct.unpack_from("<I", fake.commands_seen[-1], 40)
        assert (dword & 0xF | (dword >> 12 & 3) << 4) == sent


def test_an_abort_that_aborted_nothing_says_so(fake: Any) -> None:
    """SPDK issue 2194: bit 0 of the answer was cleared, an abort in vain was told as done."""
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    memory = fake.alloc(4096)
    fake.hold = True
    queue.send(nvme_spec.READ, disk, 0, 1, memory, tag=5)
    fake.wait(lambda: len(fake.held) == 1)
    ours, fake.held = fake.held, []  # the controller does not find it
    assert not admin.abort(controller, queue, 5)
    fake.held = ours
    fake.release()
    (done,) = queue.poll(1, 5)
    assert (done.tag, done.status) == (5, 0)


def test_what_a_reset_aborts_ends_after_the_controller_is_disabled(fake: Any) -> None:
    """SPDK issue 2360: writes were told as aborted, and sent elsewhere, while the controller could
    still carry them out over newer data."""
    controller = Controller(fake)
    disk, queue = controller.namespace(1), controller.create_queue(16)
    memory = fake.alloc(4096)
    fake.hold = True
    for n in range(4):
        queue.send(nvme_spec.WRITE, disk, n, 1, memory, tag=n)
    fake.wait(lambda: len(fake.held) == 4)
    before = len(fake.configurations)
    ended: list[list[int]] = []
    for sent in queue.commands.out.values():
        sent.ended = lambda done: ended.append([done.status, *fake.configurations[before:]])
    controller.reset()
    for status, *configurations in ended:
        assert status == ABORTED_BY_HOST
        assert configurations and not configurations[0] & 1, "told before CC.EN was 0"
    assert len(ended) == 4
    # And its late completions, were they to come, are nobody's.
    fake.release()
    assert queue.poll(0) == [] and queue.pair.counters().strays == 0


@pytest.mark.parametrize("moment", range(1, 12))
def test_a_disk_that_goes_while_it_is_probed_is_an_error(fake: Any, moment: int) -> None:
    """SPDK issues 3770 and 527: a removal during the probe was a SIGBUS. Here registers read all
    ones from some access on."""
    reads = 0
    really = fake.read32

    def read32(offset: int) -> int:
        nonlocal reads
        reads += 1
        if reads >= moment:
            fake.gone = fake.mute = True
        return int(really(offset))

    fake.read32 = read32
    with pytest.raises((KernelError, UsageError)):
        Controller(fake).identify(nvme_spec.CNS_CONTROLLER)
        raise KernelError("it came up, and went after that")
    for hook in fake.hooks:
        hook()
    assert fake.buffers == {} or fake.bus_master[-1:] == [False]


def test_an_event_that_comes_while_requests_are_sent_again_is_told_once(fake: Any) -> None:
    """pynvme issue 82: a crash when an event's completion met its request being sent anew."""
    controller = Controller(fake)
    told: list[tuple[int, int]] = []

    def again(status: int, result: int) -> None:
        told.append((status, result))
        if not status:
            controller.request_event(again)

    controller.request_event(again)
    stop = threading.Event()

    def asks() -> None:
        while not stop.is_set():
            controller.identify(nvme_spec.CNS_CONTROLLER)

    thread = threading.Thread(target=asks)
    thread.start()
    try:
        for number in range(100):
            fake.wait(lambda number=number: fake.event(number << 8))
            fake.wait(lambda number=number: len(told) > number)
    finally:
        stop.set()
        thread.join(20)
    assert told[:100] == [(0, number << 8) for number in range(100)]


def test_zone_commands_name_their_namespace(fake: Any) -> None:
    """xnvme pull request 370: a zone reset through the library went to no namespace."""
    from vfiotool.drivers.nvme import blocks

    fake.nsids, fake.command_sets, fake.sets_of = [1, 2], 0x40 | 1, {1: 0, 2: 2}
    controller = Controller(fake)
    disk, queue = controller.namespace(2), controller.create_queue()
    seen: list[tuple[int, int, int]] = []
    really = fake._io

    def io(opcode: int, entry: bytes) -> tuple[int, int]:
        seen.append((opcode, *struct.unpack_from("<I", entry, 4), entry[52]))
        return really(opcode, entry) if opcode != nvme_spec.ZONE_SEND else (0, 0)

    fake._io = io
    blocks.zone_action(queue, disk, "reset", 128)
    assert seen == [(nvme_spec.ZONE_SEND, 2, 4)]


@pytest.mark.parametrize(
    "ask",
    [
        lambda one: admin.get_feature(one, 0x107),
        lambda one: admin.get_feature(one, 7, select=8),
        lambda one: admin.set_feature(one, 1 << 31 | 7, 0),
        lambda one: admin.set_feature(one, 6, -1),
        lambda one: admin.log_page(one, 0x102, 512),
        lambda one: admin.log_page(one, 2, 512, specific=128),
        lambda one: admin.firmware_commit(one, 8, 0),
        lambda one: admin.format_namespace(one, 1, lbaf=64),
        lambda one: admin.format_namespace(one, 1, erase=8),
        lambda one: admin.sanitize(one, 8 | 2),
        lambda one: admin.sanitize(one, 3, passes=17),
    ],
)
def test_a_number_that_its_field_cannot_hold_asks_for_nothing_else(fake: Any, ask: Any) -> None:
    """Feature 107h would be the default of feature 7, slot 8 action 1 of slot 0, format 64 format
    0: nothing is sent."""
    controller = Controller(fake)
    before = len(fake.admin_seen)
    with pytest.raises(UsageError):
        ask(controller)
    assert len(fake.admin_seen) == before
    controller.close()
