"""Fifty processes and a thousand operations on a real kernel; and a neighbour who meddles."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.changing import UUID, binding, do, releasing, run_folder
from tests.contention import check, operations, run_workers
from tests.fakekernel import PCI
from tests.lab.commands import modprobe
from vfiotool.change.apply import recover
from vfiotool.change.journal import Journal
from vfiotool.change.state import Binding, read_binding
from vfiotool.errors import VfiotoolError
from vfiotool.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

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
        assert outcomes["committed"] > 100
        do(host, Journal(host, folder), releasing(EDU, TESTDEV))


def meddle(until: float, seed: int) -> None:
    """Unbind and probe a device at random, as another tool would, without any lock."""
    chance = random.Random(seed)
    while time.monotonic() < until:
        driver = chance.choice(["vfio-pci", "nvme"])
        path = chance.choice([f"{PCI}/drivers/{driver}/unbind", f"{PCI}/drivers_probe"])
        try:
            with open(path, "w") as file:
                file.write(DISK)
        except OSError:
            continue
        time.sleep(chance.random() * 0.02)


def test_every_interference_of_a_neighbour_is_reported() -> None:
    """A change that is said to be done is done; one that was disturbed says so."""
    host = Host.local()
    pid = os.fork()
    if pid == 0:
        try:
            meddle(time.monotonic() + 600, 1)
        finally:
            os._exit(0)
    reported = agreed = 0
    try:
        with run_folder() as folder:
            journal = Journal(host, folder)
            for number in range(40):
                make = binding(DISK) if number % 2 == 0 else releasing(DISK)
                os.kill(pid, signal.SIGCONT)
                try:
                    do(host, journal, make)
                    os.kill(pid, signal.SIGSTOP)
                    agreed += 1
                except VfiotoolError:
                    os.kill(pid, signal.SIGSTOP)
                    reported += 1
                    recover(host, journal)
            assert all(record.outcome is not None for record in journal.history())
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pid = 0
            # Once it is left alone, the device can be brought home again.
            do(host, journal, binding(DISK))
            do(host, journal, releasing(DISK))
            assert read_binding(host, "pci", DISK) == Binding("nvme", None)
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert reported + agreed == 40
    assert reported > 0
