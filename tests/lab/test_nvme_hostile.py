"""A thousand rounds against a slow disk and a failing one: resets, function resets, fatal statuses
and unplugs strike while commands are out. Every command ends once, with its own result, and no
block holds what was not written to it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.nvme_guest import to_vfio
from tests.lab.nvme_ledger import BAD_READ, BAD_WRITE, BLOCK, SPAN, Command, Ledger, content
from tests.lab.vfio_guest import BACKENDS, PCI, bind_vfio
from vfiotool.drivers.nvme import Controller
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.status import ABORTED_BY_HOST
from vfiotool.errors import VfiotoolError
from vfiotool.vfio import Device, DmaBuffer

MACHINE = "odd-nvme"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "a thousand rounds on slow and failing disks"
LIMIT_S = 3600.0

# Of each disk on each kernel, over all of VFIO's interfaces that it has.
ROUNDS = 1000 // len(BACKENDS)
DISKS = {"slow": "0000:06:00.0", "bad": "0000:07:00.0"}
DEPTH = 15
SLOT = 128
LARGEST = 16
# Rounds of a hundred; the rest are left alone.
STRIKES = {"reset": 20, "resubmit": 15, "function reset": 6, "fatal": 3, "unplug": 3}
# What a poll of a controller that died silently may take, and one of a controller that works.
DEAD_S, ALIVE_S = 1.5, 30.0


class Rig:
    """A disk on VFIO with its controller and a queue; made anew after an unplug."""

    def __init__(self, name: str, backend: str, source: random.Random) -> None:
        self.name, self.address, self.backend = name, DISKS[name], backend
        self.failing = name == "bad"
        self.source = source
        # What commands that are left alone take; within so long something strikes.
        self.usual_s = 0.02
        self.ledger = Ledger()
        self.open()
        self.ledger.fill(self.queue, self.disk, self.failing)

    def open(self) -> None:
        self.device = Device.open(to_vfio(self.address), backend=self.backend)  # type: ignore[arg-type]
        self.controller = Controller(self.device)
        self.disk = self.controller.namespace(1)
        self.queue = self.controller.create_queue(DEPTH + 1)
        self.memory: DmaBuffer = self.device.dma.alloc(DEPTH * LARGEST * BLOCK)

    def draw(self) -> list[Command]:
        """Commands that do not touch each other's blocks; the failing ones are often among them."""
        slots = self.source.sample(range(SPAN // SLOT), self.source.randrange(1, DEPTH + 1))
        found = []
        for n, slot in enumerate(slots):
            count = self.source.randrange(1, LARGEST + 1)
            first = slot * SLOT + self.source.randrange(SLOT - count + 1)
            for bad in (BAD_READ, BAD_WRITE):
                if bad // SLOT == slot and self.source.random() < 0.7:
                    first = bad
            opcode = self.source.choice((nvme_spec.READ, nvme_spec.WRITE))
            found.append(Command(opcode, first, count, n * LARGEST * BLOCK))
        return found

    # What strikes, in a thread of its own.

    def strike(self, kind: str) -> None:
        if kind in ("reset", "resubmit"):
            self.controller.reset(resubmit=kind == "resubmit")
        elif kind == "function reset":
            self.device.reset()
        elif kind == "fatal":
            self.device.set_bus_master(False)
        else:
            self.unplug()

    def unplug(self) -> None:
        """The kernel asks for the device back, and waits until it is closed."""
        asked = self.device.irqs.request()
        unbind = PCI / self.address / "driver" / "unbind"
        writer = threading.Thread(target=lambda: unbind.write_text(self.address))
        writer.start()
        assert asked.wait(30.0) >= 1
        self.device.close()
        writer.join(30)
        assert not writer.is_alive()

    def out(self) -> set[int]:
        """The tags of the commands that are out."""
        return {sent.tag for sent in self.queue.commands.out.values()}

    def recover(self, kind: str) -> None:
        """After a strike the controller works again."""
        if kind == "unplug":
            self.open()
        elif kind in ("function reset", "fatal"):
            self.controller.reset(resubmit=self.source.random() < 0.5)


class Round:
    """Commands that are out together, and what became of each."""

    def __init__(self, rig: Rig, version: int, kind: str) -> None:
        self.rig, self.version, self.kind = rig, version, kind
        self.commands = rig.draw()
        # After an unplug the rig has another buffer; this memory stays.
        self.view = rig.memory.view[:]
        self.told: dict[int, int] = {}
        self.sent: set[int] = set()
        # The one whose call raised: it was sent, or not.
        self.unsure: int | None = None
        self.problems: list[str] = []
        # Set when so many commands were sent: what strikes then finds them out, however slowly
        # threads change places here.
        self.begun, self.begun_at = threading.Event(), rig.source.randrange(len(self.commands))

    def send(self) -> None:
        rig, view = self.rig, self.view
        for tag, one in enumerate(self.commands):
            if tag == self.begun_at:
                self.begun.set()
            data = self._data(one) if one.opcode == nvme_spec.WRITE else bytes(one.size)
            view[one.offset : one.offset + one.size] = data
            self.unsure = tag
            self.sent.add(tag)
            out = rig.queue.send(
                one.opcode, rig.disk, one.lba, one.count, rig.memory, one.offset, tag=tag
            )
            if not out:
                raise AssertionError(f"the queue is full at {tag}")
            self.unsure = None

    def _data(self, one: Command) -> bytes:
        return b"".join(content(one.lba + n, self.version) for n in range(one.count))

    def take(self, timeout_s: float) -> None:
        begun = time.monotonic()
        left = len(self.sent) - len(self.told)
        for done in self.rig.queue.poll(left, timeout_s):
            if done.tag in self.told or done.tag not in self.sent:
                self.problems.append(f"command {done.tag} ended twice, or was never sent")
            self.told[done.tag] = done.status
        if time.monotonic() - begun > timeout_s + 5:
            self.problems.append(f"a poll of {timeout_s} s took {time.monotonic() - begun:.1f} s")

    def judge(self, whole: bool) -> None:
        """Each command's own result, and its blocks. `whole`: none may be missing."""
        maybe = self.sent - self.told.keys()
        if whole and maybe:
            self.problems.append(f"commands {sorted(maybe)} never ended")
        for tag in sorted(self.sent):
            one, status = self.commands[tag], self.told.get(tag)
            wanted = one.status(self.rig.failing)
            struck = bool(self.kind)
            fine = status in (None, wanted) or (struck and status == ABORTED_BY_HOST)
            if not fine and not (self.kind == "fatal" and status):
                self.problems.append(f"{one} ended with {status:#x}, not {wanted:#x}")
            if one.opcode == nvme_spec.WRITE:
                self.rig.ledger.wrote(one, self.version, surely=status == 0)
            elif status == 0:
                start = one.offset
                data = bytes(self.view[start : start + one.size])
                if wrong := self.rig.ledger.read(one, data):
                    self.problems.append(f"blocks {wrong} hold what nobody wrote there")


def run_round(rig: Rig, version: int, kind: str) -> Round:
    one = Round(rig, version, kind)
    raised: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    # Half of them at any moment, half of them while commands are out.
    moment = rig.source.random() * 2 * rig.usual_s

    def strike() -> None:
        if moment < rig.usual_s:
            time.sleep(moment)
        else:
            one.begun.wait(ALIVE_S)
        rig.strike(kind)

    striker = threading.Thread(target=guarded, args=(strike,))
    begun = time.monotonic()
    if kind:
        striker.start()
    dead = kind in ("fatal", "function reset", "unplug")
    try:
        one.send()
        one.take(DEAD_S if dead else ALIVE_S)
    except VfiotoolError as error:
        if not kind:
            one.problems.append(f"without a cause: {error}")
    if kind:
        striker.join()
    else:
        rig.usual_s += (time.monotonic() - begun - rig.usual_s) / 8
    if raised:
        one.problems.append(f"{kind} failed: {raised}")
        return one
    rig.recover(kind)
    if kind != "unplug":
        one.take(0.0)
        if one.unsure is not None and one.unsure not in one.told.keys() | rig.out():
            one.sent.discard(one.unsure)
        one.take(ALIVE_S)
    one.judge(whole=kind != "unplug")
    return one


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DISKS)
def test_every_command_ends_once_with_its_own_result(name: str, backend: str) -> None:
    source = random.Random(f"{name} {backend}")
    rig = Rig(name, backend, source)
    kinds = [kind for kind, share in STRIKES.items() for _ in range(share)]
    kinds += [""] * (100 - len(kinds))
    cut: dict[str, int] = dict.fromkeys([*STRIKES, ""], 0)
    failed = 0
    for version in range(1, ROUNDS + 1):
        kind = source.choice(kinds)
        one = run_round(rig, version, kind)
        assert one.problems == [], (version, kind, one.problems)
        cut[kind] += any(status == ABORTED_BY_HOST for status in one.told.values())
        failed += any(one.told.get(tag) in (0x280, 0x281) for tag in one.sent)
    # In the end every block is read, and what is closed leaves nothing pinned.
    whole = [Command(nvme_spec.READ, lba, LARGEST, 0) for lba in range(0, SPAN, LARGEST)]
    for one_read in whole:
        if one_read.status(rig.failing) == 0:
            data = rig.queue.read(rig.disk, one_read.lba, one_read.count)
            assert rig.ledger.read(one_read, data) == []
    assert rig.memory.pins == 0
    rig.device.close()
    print(f"{name} {backend}: rounds with aborted commands {cut}, with failing ones {failed}")
    # Resets struck while commands were out, and not only between the rounds.
    assert sum(cut.values()) >= ROUNDS // 100 and cut[""] == 0
    assert (failed > ROUNDS // 20) == rig.failing


def test_the_disks_are_what_the_rounds_take_them_for() -> None:
    for name, address in DISKS.items():
        bind_vfio(address)
        assert Path(PCI / address / "driver").resolve().name == "vfio-pci", name
