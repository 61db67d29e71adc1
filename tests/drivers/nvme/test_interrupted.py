"""Ctrl-C and fork at any moment: what is in flight stays in hand, and nothing ends twice."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.fakes.nvme import FakeNvme
from tests.fakes.placed import content, numbered
from tests.fakes.strikes import struck
from vfiotool.drivers.nvme import Controller, SharedQueue
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import UsageError

rounds = pytest.mark.parametrize(
    "rounds", [300, pytest.param(100_000, marks=pytest.mark.proof)], ids=str
)


@pytest.fixture
def fake() -> Iterator[FakeNvme]:
    with numbered() as device:
        yield device


@rounds
def test_ctrl_c_at_any_moment_ends_no_command_twice_and_loses_no_buffer(
    fake: FakeNvme, rounds: int
) -> None:
    source = random.Random(21)
    controller = Controller(fake)  # type: ignore[arg-type]
    disk = controller.namespace(1)
    own, other = controller.create_queue(16), controller.create_queue(16)
    memory = fake.alloc(16 * 512)
    places: dict[int, tuple[int, int]] = {}
    told: set[int] = set()
    struck_times = 0
    tag = 0
    for _ in range(rounds):
        got, first = b"", 0
        try:
            with struck(1e-6 + source.random() * 2e-3):
                for n in range(source.randrange(1, 8)):
                    tag += 1
                    places[tag] = (source.randrange(disk.blocks), n)
                    lba, at = places[tag]
                    if not own.send(nvme_spec.READ, disk, lba, 1, memory, 512 * at, tag=tag):
                        break
                if source.random() < 0.5:
                    own.poll(1, 1)
                first = source.randrange(disk.blocks - 8)
                got = other.read(disk, first, 8)
        except KeyboardInterrupt:
            struck_times += 1
        else:
            assert got == b"".join(content(first + n) for n in range(8))
        for one in own.poll(16, 5):
            assert one.tag in places and one.tag not in told and one.status == 0
            told.add(one.tag)
        assert own.pair.in_flight == 0
        # The queues are nobody's now, and each call gets its own data.
        for queue in (own, other):
            assert queue.read(disk, 3, 2) == content(3) + content(4)
        assert own.commands.out == {} == other.commands.out
    assert struck_times > rounds // 10 and memory.pins == 0
    # A completion that a call had in hand when it was interrupted goes with it, no more than that.
    assert own.pair.counters().completed == own.pair.submitted
    controller.close()
    memory.close()
    assert fake.buffers == {}


@pytest.mark.parametrize("forks", [30, pytest.param(3000, marks=pytest.mark.proof)], ids=str)
def test_a_child_of_a_process_with_busy_threads_is_refused_and_never_hangs(
    fake: FakeNvme, forks: int
) -> None:
    """The child's locks may be held by threads that are not there."""
    controller = Controller(fake)  # type: ignore[arg-type]
    disk = controller.namespace(1)
    shared, own = SharedQueue(controller.create_queue(16)), controller.create_queue(16)
    memory = fake.alloc(16 * 512)
    stop = threading.Event()
    wrong: list[object] = []

    def work(number: int) -> None:
        source = random.Random(number)
        while not stop.is_set():
            lba = source.randrange(disk.blocks)
            if number == 0:
                controller.identify(nvme_spec.CNS_CONTROLLER)
            elif number == 1:
                if own.read(disk, lba, 1) != content(lba):
                    wrong.append(lba)
            else:
                shared.read(disk, lba, 1, memory, 512 * number)
                if bytes(memory.view[512 * number : 512 * number + 512]) != content(lba):
                    wrong.append(lba)

    refused: list[Callable[[], object]] = [
        lambda: shared.read(disk, 0, 1, memory),
        lambda: shared.flush(disk),
        lambda: controller.identify(nvme_spec.CNS_CONTROLLER),
        controller.look,
        controller.create_queue,
        controller.reset,
        lambda: own.read(disk, 0, 1),
        own.poll,
        own.close,
    ]
    nothing: list[Callable[[], object]] = [shared.close, own.pair.stop, controller.close]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(forks):
            child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)
                os._exit(_tell(refused, nothing))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert wrong == []
    controller.close()


def _tell(refused: list[Callable[[], object]], nothing: list[Callable[[], object]]) -> int:
    """In a child: 0, or the number of the call that did what it should not."""
    for number, call in enumerate([*refused, *nothing], start=1):
        try:
            call()
        except UsageError:
            if number > len(refused):
                return number
        except BaseException:
            return number
        else:
            if number <= len(refused):
                return number
    return 0


def test_a_child_at_any_moment_is_refused_and_the_parent_goes_on(fake: FakeNvme) -> None:
    source = random.Random(22)
    controller = Controller(fake)  # type: ignore[arg-type]
    disk, queue = controller.namespace(1), controller.create_queue(16)
    shared = SharedQueue(controller.create_queue(16))
    memory = fake.alloc(16 * 512)
    for turn in range(20):
        count = source.randrange(1, 16)
        for n in range(count):
            assert queue.send(nvme_spec.READ, disk, turn + n, 1, memory, 512 * n, tag=n)
        child = os.fork()
        if not child:
            refused = 0
            for call in (lambda: queue.poll(1, 1), lambda: shared.read(disk, 0, 1, memory)):
                try:
                    call()  # type: ignore[no-untyped-call]
                except UsageError:
                    refused += 1
            os._exit(0 if refused == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert sorted(one.tag for one in queue.poll(count, 5)) == list(range(count))
        for n in range(count):
            assert bytes(memory.view[512 * n : 512 * n + 512]) == content(turn + n)
        assert shared.read(disk, 7, 1, memory).status == 0
    controller.close()
