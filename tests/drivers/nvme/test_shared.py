"""A SharedQueue hands the looking on: nobody waits for a time-out of our own."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from tests.fakes.nvme import FakeNvme
from tests.fakes.placed import content, numbered
from vfiotool.drivers.nvme import Controller, SharedQueue, shared
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import UsageError

LONG_S = 60.0


@pytest.fixture
def fake() -> Iterator[FakeNvme]:
    with numbered() as device:
        yield device


def reads(fake: FakeNvme, queue: SharedQueue, disk: object, seed: int, wrong: list[object]) -> None:
    """Reads with a few out at a time, and then leaves."""
    source = random.Random(seed)
    memory = fake.alloc(4096)
    try:
        for _ in range(15):
            out: list[tuple[int, int]] = []
            for place in range(source.randrange(1, 8)):
                lba = source.randrange(fake.blocks)
                begun = queue.begin(nvme_spec.READ, disk, lba, 1, memory, 512 * place)  # type: ignore[arg-type]
                out.append((begun, lba))
            for place, (begun, lba) in enumerate(out):
                queue.end(begun)
                if bytes(memory.view[512 * place : 512 * place + 512]) != content(lba):
                    wrong.append(lba)
        memory.close()
    except BaseException as error:
        wrong.append(error)


@pytest.mark.parametrize("spin_ns", [0, 20_000])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_threads_that_leave_one_after_another_keep_nobody_waiting(
    fake: FakeNvme, monkeypatch: pytest.MonkeyPatch, seed: int, spin_ns: int
) -> None:
    monkeypatch.setattr(shared, "_FOLLOWER_S", 10 * LONG_S)
    monkeypatch.setattr(shared, "_SPIN_NS", spin_ns)
    controller = Controller(fake)  # type: ignore[arg-type]
    disk, wrong = controller.namespace(1), []  # type: ignore[var-annotated]
    with SharedQueue(controller.create_queue(16)) as queue:
        threads = [
            threading.Thread(target=reads, args=(fake, queue, disk, 10 * seed + n, wrong))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        assert not any(thread.is_alive() for thread in threads) and wrong == []
        counters = queue.queue.pair.counters()
        assert counters.in_flight == 0 and counters.completed == counters.submitted
        assert queue.queue.commands.out == {} == queue.queue.commands.results
    controller.close()


def test_who_was_chosen_to_look_and_need_not_wait_any_more_chooses_another(
    fake: FakeNvme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_FOLLOWER_S", 10 * LONG_S)
    controller = Controller(fake)  # type: ignore[arg-type]
    disk, memory = controller.namespace(1), fake.alloc(4096)
    with SharedQueue(controller.create_queue(16)) as queue:
        ours = queue._shared
        turn, ended = ours._turn, []  # type: ignore[var-annotated]
        fake.hold = True

        def read(number: int) -> None:
            queue.read(disk, number, 1, memory, 512 * number)
            ended.append(number)

        def start(number: int) -> threading.Thread:
            thread = threading.Thread(target=read, args=(number,))
            thread.start()
            fake.wait(lambda: len(fake.held) == number + 1 and turn.waiting == number)
            fake.wait(lambda: ours._leading)  # the first, once its short wait is over
            return thread

        def answer_first() -> None:
            held, fake.held = fake.held, fake.held[:1]
            fake.release()
            fake.held = held[1:]

        wake_one, left = turn.wake_one, []  # type: ignore[var-annotated]

        def leave() -> None:
            wake_one()
            left.append(turn.waiting)
            if len(left) == 1:
                # The second was chosen, and before it has the lock its command has ended.
                answer_first()
                fake.wait(lambda: ours._take() > 0)

        threads = [start(number) for number in range(3)]
        monkeypatch.setattr(turn, "wake_one", leave)
        answer_first()
        fake.wait(lambda: sorted(ended) == [0, 1])
        fake.wait(lambda: ours._leading)
        answer_first()
        for thread in threads:
            thread.join(LONG_S)
        assert sorted(ended) == [0, 1, 2] and left[:2] == [1, 0]
    memory.close()
    controller.close()


def test_a_time_out_that_is_none_is_refused_whether_or_not_there_is_a_wait(fake: FakeNvme) -> None:
    controller = Controller(fake)  # type: ignore[arg-type]
    disk, memory = controller.namespace(1), fake.alloc(4096)
    with SharedQueue(controller.create_queue(16)) as queue:
        with pytest.raises(UsageError, match="nan is not a number of seconds"):
            queue.begin(nvme_spec.READ, disk, 0, 1, memory, timeout_s=float("nan"))
        begun = queue.begin(nvme_spec.READ, disk, 0, 1, memory)
        with pytest.raises(UsageError, match="nan is not a number of seconds"):
            queue.end(begun, float("nan"))
        assert queue.end(begun, None).status == 0
    memory.close()
    controller.close()


def test_a_command_that_is_not_out_is_not_waited_for(fake: FakeNvme) -> None:
    controller = Controller(fake)  # type: ignore[arg-type]
    disk, memory = controller.namespace(1), fake.alloc(4096)
    own = controller.create_queue(16)
    with SharedQueue(own) as queue:
        begun = queue.begin(nvme_spec.READ, disk, 0, 1, memory)
        assert queue.end(begun, None).status == 0
        for number in (begun, 0, -1, "x", None):
            with pytest.raises(UsageError, match=f"no command {number} is out on queue 1"):
                queue.end(number, None)  # type: ignore[arg-type]
        fake.hold = True
        begun, told = queue.begin(nvme_spec.READ, disk, 0, 1, memory), []

        def end() -> None:
            try:
                told.append(queue.end(begun, None).status)
            except UsageError as error:
                told.append(error.message)

        threads = [threading.Thread(target=end) for _ in range(3)]
        for thread in threads:
            thread.start()
        fake.wait(lambda: len(fake.held) == 1)
        fake.release()
        for thread in threads:
            thread.join(LONG_S)
        late = f"no command {begun} is out on queue 1 of fake"
        assert sorted(told, key=str) == [0, late, late]
        own.close()
        with pytest.raises(UsageError, match="the queue pair is closed"):
            queue.end(begun, None)
    with pytest.raises(UsageError, match="the SharedQueue of queue 1 of fake is closed"):
        queue.end(begun, None)
    memory.close()
    controller.close()


@pytest.mark.parametrize("opcode", [nvme_spec.WRITE, nvme_spec.READ, 0x05])
def test_data_without_a_place_is_not_sent(fake: FakeNvme, opcode: int) -> None:
    """As it stands in a command, no block at all is the first one, and no buffer address 0."""
    controller = Controller(fake)  # type: ignore[arg-type]
    disk, memory = controller.namespace(1), fake.alloc(4096)
    own = controller.create_queue(16)
    before, sent = bytes(fake.disk), own.pair.submitted
    with pytest.raises(UsageError, match="moves data"):
        own.send(opcode, disk, 1, 1)
    with pytest.raises(UsageError, match="moves data"):
        own.send(opcode, disk, 1, 0, memory)
    with SharedQueue(own) as queue:
        with pytest.raises(UsageError, match="moves data"):
            queue.begin(opcode, disk, 1, 0, memory)
        with pytest.raises(UsageError, match="moves data"):
            queue.write(disk, 1, 0, memory)
        assert queue.flush(disk).status == 0
    assert bytes(fake.disk) == before and own.pair.submitted == sent + 1
    memory.close()
    controller.close()
