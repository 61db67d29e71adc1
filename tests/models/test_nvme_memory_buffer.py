"""Submission queues in a Controller Memory Buffer, on the NVMe model over vfio-user.

What each test would see of a real controller: the data, the registers, and where the controller
fetched its commands from.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.placed import placed, right_in_threads
from tests.models.served import opened, serving
from vfiotool.cli.main import main
from vfiotool.drivers.nvme import Controller, IoQueue, MemoryBuffer, Namespace, SharedQueue
from vfiotool.drivers.nvme.load import Load
from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.models.nvme import NvmeModel, NvmeModelRegisters
from vfiotool.vfio import Area, Device, RegionInfo

BYTES = 64 << 10
_R = NvmeModelRegisters


@contextmanager
def driven(model: NvmeModel) -> Iterator[tuple[Device, Controller]]:
    with opened(model) as device, Controller(device) as controller:
        yield device, controller


@pytest.fixture
def model() -> Iterator[NvmeModel]:
    made = NvmeModel(memory_buffer_bytes=BYTES)
    yield made
    made.close()


def moves(queue: IoQueue, disk: Namespace, mark: int) -> None:
    for lba, count in ((0, 1), (3, 700), (2000, 8)):
        queue.write(disk, lba, placed(disk, lba, count, mark))
        assert queue.read(disk, lba, count) == placed(disk, lba, count, mark)
    queue.flush(disk)


def control(model: NvmeModel) -> int:
    return model.get(_R.memory_control)


def test_commands_are_fetched_from_the_buffer_and_the_data_is_right(model: NvmeModel) -> None:
    with driven(model) as (_, controller):
        buffer = controller.memory_buffer
        assert buffer is not None and buffer.problem is None
        assert (buffer.size_bytes, buffer.region, buffer.offset) == (BYTES, 2, 0)
        assert buffer.holds == ["submission-queues", "read-data", "write-data"]
        assert control(model) == 1  # nothing is decoded that nobody asked for
        disk = controller.namespace(1)
        inside = controller.create_queue(in_memory_buffer=True)
        outside = controller.create_queue()
        assert control(model) & 3 == 3
        moves(outside, disk, 1)
        assert model.buffer_reads == 0
        moves(inside, disk, 2)
        counted = inside.pair.counters()
        assert model.buffer_reads == counted.submitted and counted.strays == 0
        assert outside.read(disk, 3, 700) == placed(disk, 3, 700, 2)


def test_the_ring_goes_round_and_commands_are_whole(model: NvmeModel) -> None:
    with driven(model) as (device, controller):
        disk, queue = controller.namespace(1), controller.create_queue(4, in_memory_buffer=True)
        with device.dma.alloc(4096) as data:
            for turn in range(40):
                data.view[:512] = placed(disk, turn, 1, turn)
                while not queue.send(1, disk, turn, 1, data):
                    queue.poll(1)
                assert [done.status for done in queue.poll(1)] == [0]
        for turn in range(40):
            assert queue.read(disk, turn, 1) == placed(disk, turn, 1, turn)


def test_no_dma_buffer_gets_the_addresses_of_the_buffer(model: NvmeModel) -> None:
    with driven(model) as (device, controller):
        controller.create_queue(in_memory_buffer=True)
        base = control(model) & ~0xFFF
        for where in (base, base + BYTES - 4096):
            with pytest.raises(UsageError, match="in use"):
                device.dma.alloc(4096, iova=where)
        controller.close()
        assert control(model) & 2 == 0
        device.dma.alloc(4096, iova=base).close()


def test_queues_share_the_buffer_and_give_their_room_back(model: NvmeModel) -> None:
    with driven(model) as (_, controller):
        disk = controller.namespace(1)
        full = [controller.create_queue(256, in_memory_buffer=True) for _ in range(4)]
        with pytest.raises(KernelError, match="no room for 8192 bytes") as caught:
            controller.create_queue(in_memory_buffer=True)
        assert caught.value.errno_name == "ENOSPC"
        full.pop(1).close()
        full += [controller.create_queue(in_memory_buffer=True) for _ in range(2)]
        for mark, queue in enumerate(full):
            moves(queue, disk, mark)


def test_a_reset_brings_the_buffer_back(model: NvmeModel) -> None:
    with driven(model) as (device, controller):
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        moves(queue, disk, 1)
        controller.reset()
        moves(queue, disk, 2)
        # A reset of the function takes the registers and the memory's content.
        device.reset()
        assert control(model) == 0
        controller.reset()
        before = model.buffer_reads
        moves(queue, disk, 3)
        assert control(model) & 3 == 3 and model.buffer_reads > before


def test_what_was_out_is_sent_again_after_a_reset(model: NvmeModel) -> None:
    with driven(model) as (device, controller):
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        with device.dma.alloc(4096) as data:
            data.view[:512] = placed(disk, 9, 1, 5)
            model.mute_queues = True
            queue.send(1, disk, 9, 1, data, tag=77)
            model.mute_queues = False
            device.reset()
            controller.reset(resubmit=True)
            assert [(done.tag, done.status) for done in queue.poll(1)] == [(77, 0)]
        assert queue.read(disk, 9, 1) == placed(disk, 9, 1, 5)


def test_the_buffer_is_not_reached_while_the_device_is_not(model: NvmeModel) -> None:
    with driven(model) as (device, controller):
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        window = queue.pair.rings.window
        assert window is not None
        device.set_memory_decode(False)
        assert window.unreachable is not None
        with pytest.raises(UsageError, match="cannot be reached"):
            queue.read(disk, 0, 1)
        device.set_memory_decode(True)
        moves(queue, disk, 4)
        power = device.reach.capability(1)
        assert power is not None
        device.config.write16(power + 4, 3)  # PMCSR: D3hot
        with pytest.raises(UsageError, match="cannot be reached"):
            queue.pair.submit(0, 1)
        device.config.write16(power + 4, 0)
        controller.reset()
        moves(queue, disk, 4)
        # The window's own gate, whatever the doorbells' says.
        window._block(True)
        with pytest.raises(UsageError, match="cannot be reached"):
            queue.pair.submit(0, 1)
        window._block(False)
        with pytest.raises(UsageError, match="keeps an address of it"):
            window.close()
        moves(queue, disk, 5)
        window.close(even_pinned=True)
        with pytest.raises(UsageError, match="cannot be reached"):
            queue.pair.submit(0, 1)


def test_closing_the_device_under_load_ends_the_load(model: NvmeModel) -> None:
    told: list[VfiotoolError] = []
    with opened(model) as device:
        controller = Controller(device)
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        under_way = threading.Event()

        def load() -> None:
            try:
                while True:
                    queue.write(disk, 0, placed(disk, 0, 64, 6))
                    under_way.set()
            except VfiotoolError as error:
                told.append(error)

        worker = threading.Thread(target=load)
        worker.start()
        assert under_way.wait(10)
        device.close()
        worker.join(10)
        assert not worker.is_alive() and isinstance(told[0], UsageError)
        assert queue.pair.rings.submission.closed and not device.mappings


def test_a_load_and_many_threads_send_from_the_buffer(model: NvmeModel) -> None:
    with driven(model) as (device, controller):
        disk = controller.namespace(1)
        queue = controller.create_queue(64, in_memory_buffer=True)
        with device.dma.alloc(64 * 4096) as data:
            load = Load(
                nsid=1, first_lba=0, span=disk.blocks, blocks=8, iova=data.iova, stride=4096,
                size_bytes=4096, depth=32, limit=2000, read_percent=50, runtime_s=0,
            )  # fmt: skip
            report = queue.pair.run(load)
        assert report.reads + report.writes == 2000 and not report.failed
        shared = SharedQueue(queue)
        ended = right_in_threads(shared, device, disk, turns=20, limit_s=30)
        assert ended == [True] * 80
        shared.close()


def test_a_device_whose_process_has_gone_is_an_error(model: NvmeModel) -> None:
    with opened(model) as device:
        controller = Controller(device)
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        moves(queue, disk, 1)
        model.faults.gone = True
        with pytest.raises(VfiotoolError):
            queue.write(disk, 0, bytes(512), timeout_s=0.2)
        with contextlib.suppress(VfiotoolError):
            controller.close()
        assert queue.pair.rings.submission.closed


def test_a_child_process_touches_nothing(model: NvmeModel) -> None:
    with driven(model) as (_, controller):
        disk, queue = controller.namespace(1), controller.create_queue(in_memory_buffer=True)
        child = os.fork()
        if not child:
            refused = 1
            with contextlib.suppress(BaseException):
                try:
                    queue.pair.submit(0, 1)
                except UsageError:
                    refused = 0
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        moves(queue, disk, 2)


def test_identify_tells_the_buffer(model: NvmeModel, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(model) as server:
        assert main(["nvme", "identify", server.name]) == 0
        words = "controller memory buffer of 65536 bytes in BAR 2 for submission-queues"
        assert words in capsys.readouterr().out
        assert main(["nvme", "identify", server.name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory_buffer"] == {
            "size_bytes": BYTES,
            "region": 2,
            "offset": 0,
            "holds": ["submission-queues", "read-data", "write-data"],
            "problem": None,
        }


def test_a_controller_without_a_buffer_says_so() -> None:
    model = NvmeModel()
    with driven(model) as (_, controller):
        assert controller.memory_buffer is None
        with pytest.raises(Unsupported, match="no controller memory buffer"):
            controller.create_queue(in_memory_buffer=True)
        moves(controller.create_queue(), controller.namespace(1), 1)
    model.close()


def test_what_another_driver_left_on_is_turned_off(model: NvmeModel) -> None:
    with opened(model) as device:
        model.set(_R.memory_control, 0x7654_0000_0003)
        with Controller(device) as controller:
            assert control(model) == 1
            moves(controller.create_queue(), controller.namespace(1), 1)


def test_an_address_that_is_not_taken_is_followed_by_a_lower_one(model: NvmeModel) -> None:
    model.takes_address = lambda base: base < 1 << 32
    with driven(model) as (_, controller):
        queue = controller.create_queue(in_memory_buffer=True)
        assert control(model) >> 32 == 0 and control(model) & 3 == 3
        moves(queue, controller.namespace(1), 1)


def test_no_address_that_is_taken_leaves_the_controller_as_it_was(model: NvmeModel) -> None:
    model.takes_address = lambda _base: False
    with driven(model) as (device, controller):
        free = device.dma.iovas.free_ranges()
        for _ in range(2):
            with pytest.raises(Unsupported, match="none of the addresses"):
                controller.create_queue(in_memory_buffer=True)
        assert control(model) & 2 == 0 and device.dma.iovas.free_ranges() == free
        assert controller.memory_buffer is not None and controller.memory_buffer.problem
        moves(controller.create_queue(), controller.namespace(1), 1)


def test_a_buffer_that_is_elsewhere_is_found_out(model: NvmeModel) -> None:
    model.decodes = False
    with driven(model) as (device, controller):
        free = device.dma.iovas.free_ranges()
        with pytest.raises(Unsupported, match="not at the address that the controller took"):
            controller.create_queue(in_memory_buffer=True)
        assert control(model) & 2 == 0 and device.dma.iovas.free_ranges() == free
        moves(controller.create_queue(), controller.namespace(1), 1)


def test_no_answer_in_time_keeps_the_addresses_set_aside(
    model: NvmeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfiotool.drivers.nvme.controller.ADMIN_TIMEOUT_S", 0.1)
    with driven(model) as (device, controller):
        model.mute_queues = True
        with pytest.raises(KernelError) as caught:
            controller.create_queue(in_memory_buffer=True)
        assert caught.value.errno_name == "ETIMEDOUT"
        with pytest.raises(UsageError, match="in use"):
            device.dma.alloc(4096, iova=control(model) & ~0xFFF)
        model.mute_queues = False
        monkeypatch.undo()
        controller.reset()
        assert control(model) == 1
        moves(controller.create_queue(in_memory_buffer=True), controller.namespace(1), 1)
        controller.close()
        assert control(model) == 1


def test_a_buffer_for_queues_alone_is_used_all_the_same(model: NvmeModel) -> None:
    model.memory_size &= ~0x18
    with driven(model) as (_, controller):
        moves(controller.create_queue(in_memory_buffer=True), controller.namespace(1), 1)


def test_an_address_refused_after_a_reset_fails_the_reset(model: NvmeModel) -> None:
    with driven(model) as (_, controller):
        controller.create_queue(in_memory_buffer=True)
        model.takes_address = lambda _base: False
        with pytest.raises(KernelError, match="memory buffer's address"):
            controller.reset()
        model.takes_address = lambda _base: True
        controller.reset()


def test_a_buffer_without_submission_queues_is_refused(model: NvmeModel) -> None:
    model.memory_size &= ~1
    with driven(model) as (_, controller):
        with pytest.raises(Unsupported, match="does not take submission queues") as caught:
            controller.create_queue(in_memory_buffer=True)
        assert caught.value.hint == "it takes read-data, write-data"


def test_a_buffer_of_nvme_1_3_is_told_and_not_used(model: NvmeModel) -> None:
    """Its controller decodes the address of its own BAR, which we do not know."""
    told, model.memory_size = model.memory_size, 0
    model.version = 0x00010300
    with opened(model) as device:
        model.set(_R.version, model.version)
        model.tell_memory_size = lambda: told  # type: ignore[method-assign]
        model.bar(0)._on_read["memory_size"] = lambda: told
        model.bar(0)._on_read["memory_location"] = lambda: 2
        with Controller(device) as controller:
            buffer = controller.memory_buffer
            assert buffer is not None and buffer.size_bytes == BYTES
            with pytest.raises(Unsupported, match=r"NVMe 1\.2 and 1\.3"):
                controller.create_queue(in_memory_buffer=True)
            assert control(model) == 0


REGIONS = [
    RegionInfo(n, size, n << 40, True, True, areas, False, None, None, ())
    for n, size, areas in (
        (0, 0x4000, (Area(0x1000, 0x1000),)),
        (1, 0, ()),
        (2, 0x10000, (Area(0, 0x8000), Area(0xC000, 0x4000))),
        (3, 0, ()),
        (4, 0x2000, (Area(0, 0x2000),)),
    )
]
TAKEN = [(0, 0, 0x1050), (4, 0x1000, 0x1090)]


@pytest.mark.parametrize(
    ("location", "size", "words"),
    [
        (2, 4 << 12 | 7 << 8 | 1, "unit that there is not"),
        (2, 4 << 12 | 15 << 8 | 1, "unit that there is not"),
        (1, 4 << 12 | 1, "BAR 1, which there is not"),
        (3, 4 << 12 | 1, "BAR 3, which there is not"),
        (5, 4 << 12 | 1, "BAR 5, which there is not"),
        (6, 4 << 12 | 1, "BAR 6, which there is not"),
        (7, 4 << 12 | 1, "BAR 7, which there is not"),
        (2 | 0x10 << 12, 4 << 12 | 1, "begins at 0x10000 of BAR 2"),
        (2 | 0xFFFFF << 12, 4 << 12 | 6 << 8 | 1, "begins at"),
        (2 | 0x8 << 12, 4 << 12 | 1, "cannot be mapped"),
        (0 | 0x1 << 12, 1 << 12 | 1, "other registers of BAR 0"),
        (4, 2 << 12 | 1, "other registers of BAR 4"),
    ],
)
def test_registers_that_cannot_be_are_a_problem_in_words(
    location: int, size: int, words: str
) -> None:
    found = MemoryBuffer.parse(location, size, REGIONS, TAKEN)
    assert found is not None and found.problem is not None and words in found.problem


@given(
    location=st.integers(0, (1 << 32) - 1),
    size=st.integers(0, (1 << 32) - 1),
    small=st.booleans(),
)
def test_whatever_the_registers_tell_the_buffer_lies_in_memory_that_is_its_own(
    location: int, size: int, small: bool
) -> None:
    if small:
        location, size = location & 0x1F007, size & 0x1F11F
    found = MemoryBuffer.parse(location, size, REGIONS, TAKEN)
    if found is None or found.problem is not None:
        return
    region, end = REGIONS[found.region], found.offset + found.size_bytes
    assert found.size_bytes >= 4096 and not (found.offset | found.size_bytes) % 4096
    assert any(a.offset <= found.offset and end <= a.offset + a.size for a in region.areas)
    for bar, first, last in TAKEN:
        assert bar != found.region or end <= first or last <= found.offset


def test_a_buffer_larger_than_its_bar_ends_with_it() -> None:
    found = MemoryBuffer.parse(2 | 0xC << 12, 0xFFFFF << 12 | 1, REGIONS, TAKEN)
    assert found is not None and (found.problem, found.size_bytes) == (None, 0x4000)
    whole = MemoryBuffer.parse(4, 1 << 12 | 6 << 8 | 1, REGIONS, [])
    assert whole is not None and (whole.problem, whole.size_bytes) == (None, 0x2000)
    assert MemoryBuffer.parse(2, 1, REGIONS, TAKEN) is None


@pytest.mark.parametrize("size", [0xFFFFFFFF, 3 << 12 | 0xF00, 1 << 31 | 0x600 | 1])
@pytest.mark.parametrize("location", [0, 1, 3, 7, 0xFFFFFFFF, 0x10000 | 2])
def test_a_controller_with_absurd_registers_is_driven_all_the_same(
    model: NvmeModel, location: int, size: int
) -> None:
    model.memory_location, model.memory_size = location, size
    with driven(model) as (_, controller):
        assert controller.memory_buffer is not None
        if controller.memory_buffer.problem is not None:
            with pytest.raises(Unsupported, match="cannot be used"):
                controller.create_queue(in_memory_buffer=True)
        moves(controller.create_queue(), controller.namespace(1), 1)
