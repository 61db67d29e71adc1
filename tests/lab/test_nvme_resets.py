"""Threads under load on a slow and on a failing disk while the controller is reset, the function is
reset, and in the end the controller is closed under them: every call ends, with its own data or an
error, and no block holds what its thread did not write.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field

import pytest

from tests.lab.nvme_guest import to_vfio
from tests.lab.nvme_ledger import BAD_READ, BAD_WRITE, BLOCK, Command, Ledger, content
from tests.lab.test_nvme_hostile import DISKS
from tests.lab.vfio_guest import BACKENDS
from vfiotool.drivers.nvme import Controller, IoQueue, Namespace, SharedQueue
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio import Device, DmaBuffer

MACHINE = "odd-nvme"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "hundreds of resets under load"
LIMIT_S = 3600.0

# Of each disk on each kernel 240 resets, over all of VFIO's interfaces that it has.
LIVES, RESETS = 4 // len(BACKENDS), 60
SHARING, OWN = 5, 3
# Each thread has blocks of its own; those of the first two hold the blocks that fail.
AREA = 1024
FIRST = (BAD_READ - 8, BAD_WRITE - 8)
LARGEST = 16
# No call may take longer: the slow disk has some tens of commands before it, and resets.
CALL_S = 20.0


@dataclass
class Worker:
    """A thread that writes and reads its own blocks, for as long as the controller lives."""

    number: int
    failing: bool
    ledger: Ledger = field(default_factory=Ledger)
    version: int = 0
    done: int = 0
    struck: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def first(self) -> int:
        return FIRST[self.number] if self.number < 2 else 8192 + AREA * self.number

    def run(self, queue: IoQueue | SharedQueue, disk: Namespace, memory: DmaBuffer) -> None:
        source = random.Random(self.number)
        try:
            while not self.problems:
                self.one(queue, disk, memory, source)
        except UsageError:
            pass  # the controller was closed
        except BaseException as error:
            self.problems.append(repr(error))

    def one(
        self,
        queue: IoQueue | SharedQueue,
        disk: Namespace,
        memory: DmaBuffer,
        source: random.Random,
    ) -> None:
        """A command, to its end; what fails is what must fail, or what a reset took."""
        count = source.randrange(1, LARGEST + 1)
        lba = self.first + source.randrange(AREA - count)
        if self.failing and self.number < 2 and source.random() < 0.2:
            lba = self.first + 8
        opcode = source.choice((nvme_spec.READ, nvme_spec.WRITE))
        command = Command(opcode, lba, count, 0)
        write = opcode == nvme_spec.WRITE
        self.version += 1
        begun = time.monotonic()
        try:
            got = self.move(queue, disk, memory, command)
        except KernelError as error:
            self.failed(command, error)
            self.await_end(memory)
            if write:
                self.ledger.wrote(command, self.version, surely=False)
        except UsageError as error:
            if write:
                self.ledger.wrote(command, self.version, surely=False)
            if "closed" in error.message:
                raise
            # While the function is reset its doorbells cannot be reached.
            self.struck += 1
            self.await_end(memory)
        else:
            self.done += 1
            if command.status(self.failing):
                self.problems.append(f"{command} did not fail")
            if write:
                self.ledger.wrote(command, self.version, surely=True)
            elif wrong := self.ledger.read(command, got):
                self.problems.append(f"blocks {wrong} hold what nobody wrote there")
        if (took := time.monotonic() - begun) > CALL_S + 5:
            self.problems.append(f"{command} took {took:.1f} s")

    def move(
        self, queue: IoQueue | SharedQueue, disk: Namespace, memory: DmaBuffer, one: Command
    ) -> bytes:
        data = b"".join(content(one.lba + n, self.version) for n in range(one.count))
        if isinstance(queue, IoQueue):
            if one.opcode == nvme_spec.READ:
                return queue.read(disk, one.lba, one.count, timeout_s=CALL_S)
            queue.write(disk, one.lba, data, timeout_s=CALL_S)
            return b""
        place = slice(one.offset, one.offset + one.size)
        memory.view[place] = data if one.opcode == nvme_spec.WRITE else bytes(one.size)
        work = queue.read if one.opcode == nvme_spec.READ else queue.write
        work(disk, one.lba, one.count, memory, one.offset, timeout_s=CALL_S)
        return bytes(memory.view[place])

    def await_end(self, memory: DmaBuffer) -> None:
        """Until the command that was given up has ended too: it may still take what is written to
        its buffer, or write there."""
        end = time.monotonic() + CALL_S
        time.sleep(1e-3)  # a reset is under way; the next one is tried in a moment
        while memory.pins and not memory.closed:
            if time.monotonic() > end:
                self.problems.append("a command that was given up did not end")
                return
            time.sleep(1e-3)

    def failed(self, command: Command, error: KernelError) -> None:
        media = "unrecovered" in error.message or "write fault" in error.message
        if media and command.status(self.failing):
            self.refused += 1
        elif media or "did not end" in error.message:
            self.problems.append(f"{command}: {error.message}")
        else:
            self.struck += 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DISKS)
def test_threads_under_load_survive_resets_and_the_end(name: str, backend: str) -> None:
    source = random.Random(f"{name} {backend}")
    failing = name == "bad"
    workers = [Worker(number, failing) for number in range(SHARING + OWN)]
    for worker in workers:
        worker.ledger.may = {
            lba: {-1} for lba in range(worker.first, worker.first + AREA + LARGEST)
        }
    with Device.open(to_vfio(DISKS[name]), backend=backend) as device:  # type: ignore[arg-type]
        clear(device, workers, failing)
        for _ in range(LIVES):
            one_life(device, workers, source)
            assert [worker.problems for worker in workers if worker.problems] == []
        read_all(device, workers, failing)
    told = [(worker.done, worker.struck, worker.refused) for worker in workers]
    print(f"{name} {backend}: done, struck by a reset, failed by the disk: {told}")
    assert all(worker.done > 10 for worker in workers)
    assert sum(worker.struck for worker in workers) > LIVES
    assert bool(sum(worker.refused for worker in workers)) == failing


def clear(device: Device, workers: list[Worker], failing: bool) -> None:
    """What a run before left is overwritten, but where no write can be."""
    with Controller(device) as controller:
        disk, queue = controller.namespace(1), controller.create_queue()
        for worker in workers:
            end = worker.first + AREA + LARGEST
            for lba in range(worker.first, end):
                if not (failing and lba == BAD_WRITE):
                    worker.ledger.may[lba] = {0}
            start, stop = worker.first, end
            parts = [(start, BAD_WRITE), (BAD_WRITE + 1, stop)]
            if not (failing and start <= BAD_WRITE < stop):
                parts = [(start, stop)]
            for first, last in parts:
                queue.write(disk, first, b"".join(content(lba, 0) for lba in range(first, last)))


def one_life(device: Device, workers: list[Worker], source: random.Random) -> None:
    controller = Controller(device)
    disk = controller.namespace(1)
    shared = SharedQueue(controller.create_queue(16))
    threads, memories = [], []
    for worker in workers:
        queue = shared if worker.number < SHARING else controller.create_queue(8)
        memories.append(device.dma.alloc(LARGEST * BLOCK))
        threads.append(threading.Thread(target=worker.run, args=(queue, disk, memories[-1])))
    for thread in threads:
        thread.start()
    for _ in range(RESETS):
        time.sleep(source.random() * 0.1)  # the load is what runs meanwhile
        if source.random() < 0.2:
            device.reset()
            time.sleep(source.random() * 0.02)
        controller.reset()
    time.sleep(source.random() * 0.1)
    begun = time.monotonic()
    controller.close()
    for thread in threads:
        thread.join(CALL_S)
    assert not any(thread.is_alive() for thread in threads)
    assert time.monotonic() - begun < CALL_S
    for memory in memories:
        memory.close()


def read_all(device: Device, workers: list[Worker], failing: bool) -> None:
    with Controller(device) as controller:
        disk, queue = controller.namespace(1), controller.create_queue()
        for worker in workers:
            for lba in range(worker.first, worker.first + AREA, LARGEST):
                command = Command(nvme_spec.READ, lba, LARGEST, 0)
                if command.status(failing) == 0:
                    assert worker.ledger.read(command, queue.read(disk, lba, LARGEST)) == []
