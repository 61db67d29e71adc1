"""Whose completion is whose: admin commands and events, threads, flush, Ctrl-C, buffers."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.nvme import FakeNvme
from tests.fakes.strikes import struck
from vfiotool.drivers.nvme import Controller, IoQueue, Namespace, SharedQueue
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import KernelError, UsageError


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
    return controller.create_queue()


def test_an_event_ends_no_other_admin_command(fake: Any, controller: Controller) -> None:
    with pytest.raises(KernelError, match="did not end"):
        controller.admin(nvme_spec.command(nvme_spec.ASYNC_EVENT), timeout_s=0.05)
    assert controller.identify(1)[24:28] == b"Fake"
    fake.features[7] = 0x3F003F
    assert fake.event(0x20001)
    get = nvme_spec.command(nvme_spec.GET_FEATURES, dwords=(7,))
    assert [controller.admin(get).result for _ in range(2)] == [0x3F003F] * 2
    assert [one.result for one in controller.aside] == [0x20001]
    with pytest.raises(KernelError, match="invalid command opcode"):
        controller.admin(nvme_spec.command(0xC1))


def test_a_late_admin_answer_is_put_aside(fake: Any, controller: Controller) -> None:
    fake.mute = True
    with pytest.raises(KernelError, match=r"did not end in 0\.05 s"):
        controller.admin(nvme_spec.command(nvme_spec.GET_FEATURES, dwords=(9,)), timeout_s=0.05)
    fake.features[9], fake.features[10] = 1111, 2222
    fake.mute = False
    other = controller.admin(nvme_spec.command(nvme_spec.GET_FEATURES, dwords=(10,)))
    assert other.result == 2222
    assert [one.result for one in controller.aside] == [1111]


def test_a_page_that_a_late_answer_may_write_is_kept(
    fake: Any, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfiotool.drivers.nvme import controller as module

    before = set(fake.buffers)
    monkeypatch.setattr(module, "ADMIN_TIMEOUT_S", 0.05)
    fake.mute = True
    with pytest.raises(KernelError):
        controller.identify(1)
    (kept,) = set(fake.buffers) - before
    fake.mute = False
    fake.wait(lambda: bytes(fake.at(kept + 24, 4)) == b"Fake")
    controller.close()
    assert fake.buffers == {}


def test_admin_commands_of_many_threads_get_their_own_answers(
    fake: Any, controller: Controller
) -> None:
    wrong: list[object] = []
    fake.features.update({number: 7919 * number for number in range(16, 32)})

    def work(number: int) -> None:
        get = nvme_spec.command(nvme_spec.GET_FEATURES, dwords=(number,))
        for _ in range(30):
            if (found := controller.admin(get).result) != 7919 * number:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_second_thread_is_refused_in_words_and_never_gets_anothers_data(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    fake.disk[: 1 << 19] = b"A" * (1 << 19)
    fake.disk[1 << 19 : 1 << 20] = b"B" * (1 << 19)
    seen: set[str] = set()

    def work(lba: int, letter: bytes) -> None:
        for _ in range(40):
            try:
                got = queue.read(disk, lba, 300)
                seen.add("right" if got == letter * 300 * 512 else "WRONG")
            except UsageError as error:
                seen.add(error.message)

    threads = [threading.Thread(target=work, args=one) for one in ((0, b"A"), (1024, b"B"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= {"right", "another thread is using queue 1 of fake"} and "right" in seen
    assert len(queue.read(disk, 0, 8)) == 4096


def test_a_thread_that_only_sends_is_refused_while_another_waits(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    fake.hold = True
    memory = fake.alloc(4096)
    queue.send(nvme_spec.READ, disk, 0, 1, memory)
    waiter = threading.Thread(target=lambda: queue.poll(1, 20))
    waiter.start()
    fake.wait(lambda: bool(queue.commands._holder) and bool(fake.held))
    begun = time.monotonic()
    for call in (
        lambda: queue.send(nvme_spec.READ, disk, 0, 1, memory),
        lambda: queue.poll(),
        lambda: queue.read(disk, 0, 1),
        lambda: queue.flush(disk),
        lambda: SharedQueue(queue),
    ):
        with pytest.raises(UsageError, match="another thread is using"):
            call()
    assert time.monotonic() - begun < 5
    fake.release()
    waiter.join()


@pytest.mark.parametrize(("entries", "sent"), [(16, 15), (4, 3), (16, 10)])
def test_flush_is_sent_and_takes_nobodys_completion(
    fake: Any, controller: Controller, disk: Namespace, entries: int, sent: int
) -> None:
    queue = controller.create_queue(entries)
    memory = fake.alloc(4096)
    fake.hold = True
    for n in range(sent):
        assert queue.send(nvme_spec.WRITE, disk, n, 1, memory, tag=100 + n)
    flusher = threading.Thread(target=queue.flush, args=(disk,))
    flusher.start()
    fake.wait(lambda: len(fake.held) == sent)
    assert flusher.is_alive()
    # The flush goes out after what was in flight, and ends by its own completion.
    fake.release(random.Random(entries).shuffle)
    fake.wait(lambda: len(fake.held) == 1)
    assert flusher.is_alive() and queue.pair.counters().submitted == sent + 1
    fake.hold = False
    fake.release()
    flusher.join()
    assert sorted(done.tag for done in queue.poll(sent)) == list(range(100, 100 + sent))


def test_reads_and_what_was_sent_before_do_not_mix(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    fake.disk[:4096] = data = os.urandom(4096)
    memory = fake.alloc(4096)
    for tag in (5, 5, 6):
        queue.send(nvme_spec.READ, disk, 8, 1, memory, tag=tag)
    assert queue.read(disk, 0, 8) == data
    assert sorted(done.tag for done in queue.poll(3)) == [5, 5, 6]


def test_a_buffer_in_use_cannot_be_closed(fake: Any, disk: Namespace, queue: IoQueue) -> None:
    fake.hold = True
    memory = fake.alloc(4096)
    queue.send(nvme_spec.READ, disk, 0, 1, memory, tag=7)
    fake.wait(lambda: len(fake.held) == 1)
    with pytest.raises(UsageError, match="in use"):
        memory.close()
    fake.release()
    assert [done.tag for done in queue.poll(1)] == [7]
    memory.close()
    with pytest.raises(UsageError, match="closed"):
        queue.send(nvme_spec.READ, disk, 0, 1, memory)


def test_rings_and_window_are_kept_until_the_queue_is_closed(fake: Any, queue: IoQueue) -> None:
    for buffer in queue.pair.rings.buffers:
        with pytest.raises(UsageError, match="in use"):
            buffer.close()
    pins = fake.pins
    queue.close()
    assert fake.pins == pins - 1
    assert all(buffer.closed for buffer in queue.pair.rings.buffers)


def test_a_poll_ends_when_memory_decode_is_turned_off(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    fake.hold = True
    said: list[str] = []
    queue.send(nvme_spec.READ, disk, 0, 1, fake.alloc(4096))

    def wait() -> None:
        try:
            queue.poll(1, 60)
        except UsageError as error:
            said.append(error.message)

    waiter = threading.Thread(target=wait)
    waiter.start()
    fake.wait(lambda: fake.gate[1] > 0)
    fake.block(True)
    waiter.join(10)
    assert len(said) == 1 and "decode is off" in said[0]
    with pytest.raises(UsageError, match="decode is off"):
        queue.read(disk, 0, 1)
    fake.block(False)
    fake.release()
    assert len(queue.poll(1)) == 1


def test_ctrl_c_loses_nothing_that_was_taken(fake: Any, disk: Namespace, queue: IoQueue) -> None:
    memory = fake.alloc(4096)
    source = random.Random(1)
    interrupts = 0
    for n in range(60):
        count = source.randrange(2, 20)
        for tag in range(count):
            assert queue.send(nvme_spec.READ, disk, tag, 1, memory, tag=tag)
        got: list[int] = []
        while len(got) < count:
            taken = []
            try:
                with struck(source.random() * 0.001 + 1e-6, below="vfiotool/drivers/nvme/"):
                    taken = queue.poll(count - len(got))
            except KeyboardInterrupt:
                interrupts += 1
            got += [done.tag for done in taken]
            assert interrupts < 10_000, f"lost: {count - len(got)} of {count}"
        assert sorted(got) == list(range(count)), n
        assert queue.pair.in_flight == 0 and not memory.pins
    assert interrupts > 5


def test_ctrl_c_while_a_poll_lets_go_of_the_queue_loses_nothing(
    fake: Any, disk: Namespace, queue: IoQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fake.alloc(4096)
    for tag in range(3):
        assert queue.send(nvme_spec.READ, disk, tag, 1, memory, tag=tag)
    left_by = queue.commands.left_by

    def interrupted(thread: int) -> None:
        left_by(thread)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(queue.commands, "left_by", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.poll(3)
    assert sorted(done.tag for done in queue.poll(3)) == [0, 1, 2]


def test_a_read_that_ctrl_c_ends_leaves_its_places_to_the_device(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    fake.disk[:] = data = os.urandom(len(fake.disk))
    fake.hold = True
    with pytest.raises(KeyboardInterrupt), struck(0.05):
        queue.read(disk, 0, 2000)
    late = len(fake.held)
    fake.hold = False
    # All eight places still belong to the device: the next read waits for one of them.
    threading.Timer(0.05, fake.release).start()
    assert queue.read(disk, 2000, 2000) == data[2000 * 512 : 4000 * 512]
    assert late == len(queue.aside) == 8
    assert queue.read(disk, 0, 2000) == data[: 2000 * 512]


def test_a_queue_of_its_own_for_each_vector(fake: Any, controller: Controller) -> None:
    controller.enable_interrupts(3)
    first = controller.create_queue(16, vector=2)
    with pytest.raises(UsageError, match="vector 2 signals queue 1 already"):
        controller.create_queue(16, vector=2)
    controller.create_queue(16, vector=1)
    first.close()
    again = controller.create_queue(16, vector=2)
    assert len(again.read(controller.namespace(1), 0, 8)) == 4096
    controller.enable_interrupts(5)
    assert len(controller.interrupts) == 5
    controller.close()
    assert [one.closed for one in fake.sets] == [True]


@pytest.mark.parametrize("interrupts", [False, True])
def test_threads_share_a_queue(
    fake: Any, controller: Controller, disk: Namespace, interrupts: bool
) -> None:
    if interrupts:
        controller.enable_interrupts(2)
    queue = controller.create_queue(8, vector=1 if interrupts else None)
    wrong: list[object] = []

    def work(shared: SharedQueue, number: int) -> None:
        source = random.Random(number)
        with fake.alloc(4096) as memory:
            for _ in range(40):
                data = source.randbytes(512 * source.randrange(1, 8))
                lba = number * 128 + source.randrange(100)
                memory.view[: len(data)] = data
                shared.write(disk, lba, len(data) // 512, memory)
                memory.view[:] = bytes(4096)
                shared.read(disk, lba, len(data) // 512, memory)
                if bytes(memory.view[: len(data)]) != data:
                    wrong.append((number, lba))
            shared.flush(disk)

    with SharedQueue(queue) as shared:
        threads = [threading.Thread(target=work, args=(shared, n)) for n in range(16)]
        for thread in threads:
            thread.start()
        with pytest.raises(UsageError, match="another thread is using"):
            queue.read(disk, 0, 1)
        for thread in threads:
            thread.join()
    assert wrong == []
    with pytest.raises(UsageError, match="SharedQueue of queue 1 of fake is closed"):
        shared.flush(disk)
    assert len(queue.read(disk, 0, 1)) == 512


def test_halves_of_a_shared_call(fake: Any, disk: Namespace, queue: IoQueue) -> None:
    fake.disk[: 32 * 512] = data = os.urandom(32 * 512)
    with SharedQueue(queue) as shared, fake.alloc(32 * 512) as memory:
        numbers = [shared.begin(nvme_spec.READ, disk, n, 1, memory, 512 * n) for n in range(32)]
        for number in reversed(numbers):
            assert shared.end(number).status == 0
        assert bytes(memory.view) == data


def test_closing_a_shared_queue_tells_those_who_wait_and_gives_the_queue_back(
    fake: Any, disk: Namespace, queue: IoQueue
) -> None:
    shared = SharedQueue(queue)
    fake.hold = True
    told: list[str] = []
    memory = fake.alloc(4096)

    def wait() -> None:
        try:
            shared.read(disk, 0, 1, memory)
        except UsageError as error:
            told.append(error.message)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    fake.wait(lambda: len(fake.held) == 4)
    shared.close()
    shared.close()
    for thread in threads:
        thread.join(10)
    assert told == ["the SharedQueue of queue 1 of fake is closed"] * 4
    with pytest.raises(UsageError, match="in use"):
        memory.close()
    fake.hold = False
    fake.release()
    assert len(queue.read(disk, 0, 8)) == 4096
    memory.close()


@pytest.mark.parametrize(
    ("opcode", "control", "told"),
    [
        (256, 0, "opcode 0x100 is not a number from 0 to 0xff"),
        (-4, 0, "opcode -0x4 is not a number from 0 to 0xff"),
        (1 << 70, 0, "opcode 0x4"),
        (0, 1 << 16, "control 0x10000 is not a number from 0 to 0xffff"),
        (0, -1, "control -0x1 is not a number"),
        (0, 1.5, r"control 1\.5 is not a number"),
    ],
)
def test_a_number_that_its_field_cannot_hold_is_named_with_its_range(
    disk: Namespace, queue: IoQueue, opcode: int, control: Any, told: str
) -> None:
    """Seen: OverflowError and TypeError, as C raised them, without the argument's name."""
    with pytest.raises(UsageError, match=told):
        queue.send(opcode, disk, control=control)
    with pytest.raises(UsageError, match=told), SharedQueue(queue) as shared:
        shared.begin(opcode, disk, control=control)
    with pytest.raises(UsageError, match=told):
        queue.pair.submit(opcode, 1, control=control)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"opcode": 256}, "opcode 0x100"),
        ({"opcode": 6, "nsid": 1 << 32}, "nsid 0x100000000"),
        ({"opcode": 6, "dwords": (0, -1)}, "dword 11 -0x1"),
        ({"opcode": 6, "prp1": 0.5}, "prp1 0.5"),
    ],
)
def test_a_raw_command_names_the_field_that_cannot_hold_its_number(
    fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        nvme_spec.command(**fields)
