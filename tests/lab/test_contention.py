"""Fifty processes and a thousand operations on a real kernel; and a neighbour who meddles, at
random and between any two accesses."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.change.changing import UUID, binding, do, releasing, run_folder
from tests.change.contention import check, operations, run_workers
from tests.fakes.kernel import PCI
from tests.fakes.neighbour import Meddling, WatchedTree
from tests.lab.commands import modprobe, restore
from vfiotool.change import apply as apply_module
from vfiotool.change.apply import Outcome
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.steps.bind import BindDriver
from vfiotool.change.steps.state import Binding, read_binding
from vfiotool.errors import VfiotoolError
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"
LIMIT_S = 5400.0

EDU, TESTDEV, NVME, DISK = "0000:00:01.0", "0000:00:02.0", "0000:01:00.0", "0000:03:00.0"
PROCESSES, EACH = 50, 20


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    modprobe("vfio-pci")


def test_fifty_processes_write_one_history() -> None:
    host = Host.local()
    uuids = []
    if host.exists("/sys/class/mdev_bus/mtty"):
        uuids = [f"{UUID[:-1]}{digit}" for digit in range(3)]
    # Disks take seconds to come back; the devices without a driver show the same races sooner.
    choices = operations([EDU, TESTDEV], None, uuids)
    with run_folder() as folder:
        codes = run_workers(Host.local, folder, PROCESSES, EACH, choices)
        assert codes == [0] * PROCESSES
        outcomes = check(host, folder)
        # How many get through is the machine's speed; that they came at each other is the point.
        assert outcomes["committed"] > PROCESSES // 2
        do(host, Journal(host, folder), releasing(EDU, TESTDEV))
    restore(host)


class Stamps:
    """When the neighbour's writes began and landed, in memory that both processes share."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 16)

    def put(self, began: float, landed: float) -> None:
        struct.pack_into("=dd", self._shared, 0, began, landed)

    def get(self) -> tuple[float, float]:
        began, landed = struct.unpack_from("=dd", self._shared)
        return began, landed

    def since(self, when: float) -> bool:
        """Whether a write has landed since, or was on its way when the neighbour was stopped."""
        began, landed = self.get()
        return landed >= when or began > landed


def meddle(until: float, seed: int, stamps: Stamps) -> None:
    """Unbind and probe a device at random, as another tool would, without any lock."""
    chance = random.Random(seed)
    landed = 0.0
    while time.monotonic() < until:
        driver = chance.choice(["vfio-pci", "nvme"])
        path = chance.choice([f"{PCI}/drivers/{driver}/unbind", f"{PCI}/drivers_probe"])
        stamps.put(time.monotonic(), landed)
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(DISK)
        landed = time.monotonic()
        stamps.put(landed, landed)
        time.sleep(chance.random() * 0.02)


def test_every_interference_of_a_neighbour_is_reported(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """What is said to be done was done when it was last looked at; what was disturbed says so."""
    host = Host.local()
    stamps = Stamps()
    looked = 0.0
    verify = apply_module.verify_all

    def verify_all(*arguments: Any) -> None:
        nonlocal looked
        looked = time.monotonic()
        verify(*arguments)

    monkeypatch.setattr(apply_module, "verify_all", verify_all)
    pid = os.fork()
    if pid == 0:
        try:
            meddle(time.monotonic() + 600, 1, stamps)
        finally:
            os._exit(0)
    ends: Counter[str] = Counter()
    try:
        with run_folder() as folder:
            journal = Journal(host, folder)
            for number in range(40):
                make = binding(DISK) if number % 2 == 0 else releasing(DISK)
                os.kill(pid, signal.SIGCONT)
                try:
                    outcome = do(host, journal, make)
                    os.kill(pid, signal.SIGSTOP)
                    os.waitpid(pid, os.WUNTRACED)
                    ends[judge(host, outcome, stamps, looked)] += 1
                except VfiotoolError:
                    os.kill(pid, signal.SIGSTOP)
                    os.waitpid(pid, os.WUNTRACED)
                    ends["reported"] += 1
                    recover(host, journal)
            assert all(record.outcome is not None for record in journal.history())
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pid = 0
            # Once it is left alone, the device can be brought home again; without a driver, as the
            # neighbour may have left it, it would rightly be given back to none.
            restore(host)
            do(host, journal, binding(DISK))
            do(host, journal, releasing(DISK))
            assert read_binding(host, "pci", DISK) == Binding("nvme", None)
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    record_property("ends", dict(ends))
    assert ends.total() == 40
    assert ends["reported"] > 0


def judge(host: Host, outcome: Outcome, stamps: Stamps, looked: float) -> str:
    """Check a change that says that it is done, with the neighbour stopped."""
    if all(step.holds(host) for step in outcome.steps if isinstance(step, BindDriver)):
        return "done"
    assert stamps.since(looked), f"{outcome.steps} are said to be done, and are not"
    return "done, and disturbed after the last look"


def test_no_interference_of_a_neighbour_goes_unnoticed(
    record_property: Callable[[str, object], None],
) -> None:
    """Between any two accesses of a change. A device that nothing but vfio-pci takes is quick."""

    def write(path: str, text: str) -> None:
        with open(path, "w") as file:
            file.write(text)

    free, taken = Binding(None, None), Binding("vfio-pci", "vfio-pci")
    for name, make, goal, prepare in (
        ("bind", binding(TESTDEV), taken, None),
        ("release", releasing(TESTDEV), free, binding(TESTDEV)),
    ):
        meddling = Meddling(
            lambda watch: Host(WatchedTree(watch), live=True, name="this host"),
            write,
            TESTDEV,
            driver=None,
        )
        meddling.everywhere(make, goal, prepare, every=3)
        record_property(name, dict(meddling.tally))
        assert meddling.tally["reported"] > 5
