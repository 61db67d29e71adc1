"""Queues that move between workers: which, and that a moving queue loses and repeats nothing."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.virtio.frontend import Frontend
from tests.virtio.test_live_update import Verified
from vfiotool.virtio.balance import next_move
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.server import Export, Server


def test_the_move_that_evens_most_is_chosen() -> None:
    assert next_move([[5000, 5000, 100], [10]]) == (0, 0, 1)
    assert next_move([[12000, 6000], [10]]) == (0, 1, 1)
    assert next_move([[10], [3000, 3000], [50]]) == (1, 0, 0)


def test_what_is_even_or_idle_or_one_queue_stays() -> None:
    for loads in ([[9000]], [[9000], [0]], [[5000], [4000, 100]], [[90, 90], []], [[], []], []):
        assert next_move(loads) is None


def test_moves_end() -> None:
    loads = [[1000.0 * n for n in range(1, 9)], [], []]
    moves = 0
    while (move := next_move(loads)) is not None:
        moves += 1
        assert moves < 20
        source, queue, target = move
        loads[target].append(loads[source].pop(queue))
    sums = [sum(queues) for queues in loads]
    assert max(sums) < 1.6 * min(sums)


def test_a_queue_is_moved_under_load_and_what_it_does_stays_right(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as raw:
        raw.truncate(4 << 20)
    moves = 0
    with Server(threads=3, report=print) as server:
        for name, settings in (
            ("file", DiskSettings(path=str(image))),
            ("ram", DiskSettings(size=4 << 20)),
        ):
            server.add(Export(name, BlockDisk(settings), listen(str(tmp_path / name))))
        thread = threading.Thread(target=server.run)
        thread.start()
        fronts = [Frontend(str(tmp_path / name)) for name in ("file", "ram")]
        loads = [Verified(front, number) for number, front in enumerate(fronts)]
        for front in fronts:
            front.up()
        for turn in range(60):
            for load in loads:
                load.work(15)
            done = threading.Event()

            def move(turn: int = turn, done: threading.Event = done) -> None:
                nonlocal moves
                for number, queue in enumerate(server._running()):
                    moves += queue.move(server.workers[(turn + number) % 3])
                done.set()

            server.soon(move)
            while not done.is_set():
                for load in loads:
                    load.work(1)
        for load in loads:
            load.drain()
        # A queue that waits for its disk stays for this time; the one in memory never does.
        assert moves >= 60
        assert sum(worker.queues for worker in server.workers) == 2
        assert sum(1 for worker in server.workers if worker.figures().requests) == 3
        for front in fronts:
            front.close()
        server.stop()
        thread.join()


def test_two_busy_queues_of_one_worker_are_parted(tmp_path: Path) -> None:
    with Server(threads=2, report=print) as server:
        for name in ("a", "b"):
            disk = BlockDisk(DiskSettings(size=4 << 20))
            server.add(Export(name, disk, listen(str(tmp_path / name))))
        thread = threading.Thread(target=server.run)
        thread.start()
        loads = [Verified(Frontend(str(tmp_path / name)), 1) for name in ("a", "b")]
        parted = threading.Event()

        def gather() -> None:
            for queue in server._running():
                queue.move(server.workers[0])
            server.balance(1.0)

        def part() -> None:
            if server.balance(0.001):
                parted.set()

        for load in loads:
            load.front.up()
        server.soon(gather)
        while not parted.is_set():
            for load in loads:
                load.work(200)
            server.soon(part)
        assert [worker.queues for worker in server.workers] == [1, 1]
        for load in loads:
            load.drain()
            load.front.close()
        server.stop()
        thread.join()
