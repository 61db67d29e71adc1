"""A hostile controller: completions late, twice, for others, of wrong queues and phases; CFS,
resets and unplugs at any moment. Every command ends once, with its own result; every wait ends.
"""

from __future__ import annotations

import asyncio
import random
import struct
import threading
import time
from typing import Any

import pytest

from tests.fakes.nvme import FakeNvme
from vfiotool.drivers.nvme import AsyncQueue, Controller, IoQueue, Namespace, SharedQueue, health
from vfiotool.drivers.nvme import controller as module
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.status import ABORTED_BY_HOST
from vfiotool.errors import KernelError, UsageError, VfiotoolError

rounds = pytest.mark.parametrize(
    "rounds", [300, pytest.param(100_000, marks=pytest.mark.proof)], ids=str
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PATIENCE_S", 0.02)
    monkeypatch.setattr(health, "_LOOK_S", 0.01)
    for step in ("_DRAIN_S", "_DELETE_S", "_SHUTDOWN_S", "_DISABLE_S"):
        monkeypatch.setattr(module, step, 0.1)


def content(lba: int, version: int) -> bytes:
    """A block that names its place: no two are alike."""
    return struct.pack("<QQ", lba, version) * 32


class Hostile(FakeNvme):
    """Completes as it likes: `source` decides."""

    def __init__(self, source: random.Random) -> None:
        super().__init__()
        self.source = source
        self.old: list[tuple[int, int]] = []
        self.lies = 0

    def _complete(
        self, number: int, queue: dict[str, Any], cid: int, status: int, result: int
    ) -> None:
        if number:
            draw = self.source.random()
            if draw < 0.05 and self.old:
                self._lie(number, queue, self.source.choice(self.old)[1])  # twice, and late
            elif draw < 0.08:
                self._lie(number, queue, self.source.randrange(65536) | 0x8000)  # nobody's
            elif draw < 0.10:
                self._lie(number, queue, cid, owner=number + 1)  # of another queue
            elif draw < 0.12:
                self._wrong_phase(queue, cid)
            self.old = [*self.old[-20:], (number, cid)]
        super()._complete(number, queue, cid, status, result)

    def _lie(self, number: int, queue: dict[str, Any], cid: int, owner: int = 0) -> None:
        busy = {self._cid_at(queue, n) for n in range(queue["entries"])}
        if cid in busy and not owner:
            return  # that would be the answer that is waited for
        self.lies += 1
        super()._complete(owner or number, {**queue, "cq_tail": queue["cq_tail"]}, cid, 0, 0)
        queue["cq_tail"] += 1
        if queue["cq_tail"] == queue["cq_entries"]:
            queue["cq_tail"], queue["phase"] = 0, queue["phase"] ^ 1

    def _cid_at(self, queue: dict[str, Any], index: int) -> int:
        (cid,) = struct.unpack("<H", self.at(queue["base"] + 64 * index + 2, 2))
        return int(cid)

    def _wrong_phase(self, queue: dict[str, Any], cid: int) -> None:
        place = self.at(queue["cq_base"] + 16 * queue["cq_tail"], 16)
        place[:16] = struct.pack("<IIHHHH", 1, 0, 0, 1, cid, 0x285 << 1 | queue["phase"] ^ 1)


@rounds
def test_lies_end_no_command_and_every_command_ends_once(rounds: int) -> None:
    source = random.Random(5)
    with Hostile(source) as fake:
        controller = Controller(fake)  # type: ignore[arg-type]
        disk, queue = controller.namespace(1), controller.create_queue(16)
        memory = fake.alloc(16 * 512)
        for lba in range(disk.blocks):
            fake.disk[lba * 512 : lba * 512 + 512] = content(lba, 0)
        for turn in range(rounds):
            count = source.randrange(1, 16)
            places = source.sample(range(disk.blocks), count)
            memory.view[:] = bytes(memory.size)
            for n, lba in enumerate(places):
                assert queue.send(nvme_spec.READ, disk, lba, 1, memory, 512 * n, tag=n)
            done = queue.poll(count, 20)
            assert sorted(one.tag for one in done) == list(range(count)), turn
            for n, lba in enumerate(places):
                assert bytes(memory.view[512 * n : 512 * n + 512]) == content(lba, 0), turn
            assert {one.status for one in done} == {0} and queue.pair.in_flight == 0
        counters = queue.pair.counters()
        assert counters.strays == fake.lies > 0 and counters.failed == 0
        assert not memory.pins


def die(fake: FakeNvme, source: random.Random) -> None:
    """Some of what is held is answered, in any order; then nothing more."""
    with fake.lock:
        source.shuffle(fake.held)
        keep = source.randrange(len(fake.held) + 1)
        rest, fake.held = fake.held[keep:], fake.held[:keep]
        fake.release()
        fake.held = rest
    kind = source.randrange(4)
    if kind == 0:
        fake.mute = fake.fatal = True
    elif kind == 1:
        fake.mute = fake.gone = True
    elif kind == 2:
        fake.reset()
    else:
        fake.mute = True


def revive(fake: FakeNvme) -> None:
    fake.mute = fake.gone = fake.fatal = fake.hold = False


@rounds
def test_deaths_at_any_moment_end_every_command_and_lose_no_written_block(rounds: int) -> None:
    source = random.Random(11)
    with FakeNvme() as fake:
        controller = Controller(fake)  # type: ignore[arg-type]
        disk, queue = controller.namespace(1), controller.create_queue(16)
        memory = fake.alloc(16 * 512)
        known: dict[int, set[int]] = {}
        struck = 0
        for turn in range(1, rounds // 3 + 1):
            places = source.sample(range(disk.blocks), 15)
            timer = None
            if source.random() < 0.7:
                fake.hold = True
                timer = threading.Timer(source.random() * 0.002, die, (fake, source))
                timer.start()
            told: dict[int, int] = {}
            sent = 0
            begun = time.monotonic()
            try:
                for n, lba in enumerate(places):
                    memory.view[512 * n : 512 * n + 512] = content(lba, turn)
                    queue.send(nvme_spec.WRITE, disk, lba, 1, memory, 512 * n, tag=n)
                    sent += 1
                told |= {one.tag: one.status for one in queue.poll(sent, 0.05 if fake.hold else 5)}
            except KernelError:
                pass
            assert time.monotonic() - begun < 10
            struck += len(told) < sent
            if timer is not None:
                timer.join()
            revive(fake)
            if len(told) < sent or controller.health.look() is not None:
                controller.reset(resubmit=source.random() < 0.5)
                for one in queue.poll(sent - len(told), 5):
                    assert one.tag not in told, "a command ended twice"
                    told[one.tag] = one.status
            assert sorted(told) == list(range(sent)), turn
            assert set(told.values()) <= {0, ABORTED_BY_HOST}
            for n, status in told.items():
                # What was aborted may have reached the disk or not.
                old = known.get(places[n], {0})
                known[places[n]] = {turn} if status == 0 else old | {turn}
            for lba in places[:sent]:
                found = bytes(fake.disk[lba * 512 : lba * 512 + 512])
                assert found in {content(lba, v) if v else bytes(512) for v in known[lba]}, turn
        assert not memory.pins and struck > rounds // 10
        controller.close()


@rounds
def test_threads_over_own_and_shared_queues_with_resets_and_closes(rounds: int) -> None:
    source = random.Random(3)
    for _ in range(max(1, rounds // 100)):
        with FakeNvme() as fake:
            for lba in range(fake.blocks):
                fake.disk[lba * 512 : lba * 512 + 512] = content(lba, 0)
            controller = Controller(fake)  # type: ignore[arg-type]
            disk = controller.namespace(1)
            shared = SharedQueue(controller.create_queue(16))
            own = [controller.create_queue(8) for _ in range(4)]
            wrong: list[object] = []
            ended: list[int] = []

            def work(
                number: int,
                fake: FakeNvme = fake,
                disk: Namespace = disk,
                shared: SharedQueue = shared,
                own: list[IoQueue] = own,
                wrong: list[object] = wrong,
                ended: list[int] = ended,
            ) -> None:
                mine = random.Random(number)
                memory = fake.alloc(4096)
                try:
                    while True:
                        lba = mine.randrange(disk.blocks - 8)
                        try:
                            if number < len(own):
                                got = own[number].read(disk, lba, 8)
                            else:
                                shared.read(disk, lba, 8, memory)
                                got = bytes(memory.view)
                        except KernelError:
                            time.sleep(1e-3)  # a reset: the next one is tried in a moment
                            continue
                        if got != b"".join(content(lba + n, 0) for n in range(8)):
                            wrong.append((number, lba))
                except UsageError:
                    pass  # closed: the end
                except BaseException as error:
                    wrong.append(error)
                ended.append(number)

            threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
            for thread in threads:
                thread.start()
            for _ in range(4):
                time.sleep(source.random() * 0.05)  # the load is what runs meanwhile
                try:
                    controller.reset()
                except VfiotoolError as error:
                    wrong.append(error)
            controller.close()
            for thread in threads:
                thread.join(30)
            assert wrong == [] and sorted(ended) == list(range(16))


def test_a_thousand_tasks_with_cancels_and_a_close() -> None:
    source = random.Random(9)
    with FakeNvme() as fake:
        for lba in range(fake.blocks):
            fake.disk[lba * 512 : lba * 512 + 512] = content(lba, 0)
        controller = Controller(fake)  # type: ignore[arg-type]
        disk = controller.namespace(1)

        async def one(shared: AsyncQueue, memory: Any, number: int) -> int:
            lba = number % disk.blocks
            await shared.read(disk, lba, 1, memory, 512 * number)
            got = bytes(memory.view[512 * number : 512 * number + 512])
            assert got == content(lba, 0)
            return number

        async def main(close: bool) -> list[Any]:
            queue = controller.create_queue(32)
            with fake.alloc(1000 * 512) as memory:
                try:
                    async with AsyncQueue(queue) as shared:
                        tasks = [asyncio.create_task(one(shared, memory, n)) for n in range(1000)]
                        for _ in range(100):
                            await asyncio.sleep(source.random() * 1e-4)
                            source.choice(tasks).cancel()
                        if close:
                            await asyncio.to_thread(queue.close)
                        return await asyncio.gather(*tasks, return_exceptions=True)
                finally:
                    queue.close()

        for close in (False, True):
            told = asyncio.run(asyncio.wait_for(main(close), 60))
            assert len(told) == 1000
            for number, found in enumerate(told):
                fine = found == number or isinstance(found, asyncio.CancelledError)
                assert fine or (close and isinstance(found, UsageError)), found
        controller.close()
        assert fake.buffers == {}
