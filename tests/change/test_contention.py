"""Fifty processes on one fake kernel: one history, nothing lost, nothing locked for ever; and a
neighbour who meddles between any two accesses."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from typing import Any

import pytest

from tests.change.changing import (
    EDU,
    NIC,
    NVME,
    TESTDEV,
    UUID,
    binding,
    furnished,
    releasing,
    run_folder,
)
from tests.change.contention import check, operations, run_workers
from tests.fakes.kernel import FakeKernel
from tests.fakes.neighbour import Meddling, WatchedKernel
from tests.guests.runs import PROOFS_WANTED
from vfiotool.change.steps.state import Binding
from vfiotool.host.host import Host
from vfiotool.host.tree import Tree

METHODS = (
    "read",
    "read_at",
    "read_locked",
    "writer_pid",
    "listdir",
    "readlink",
    "exists",
    "isdir",
    "write_attribute",
    "load_module",
    "ask_netlink",
    "send_netlink",
)
PROOFS = bool(os.environ.get(PROOFS_WANTED))
PROCESSES, EACH = 50, 20 if PROOFS else 10
# How many accesses lie between two that the neighbour comes before; each, over all his ways.
EVERY = 1 if PROOFS else 2


class Served:
    """A fake kernel for several processes: one request at a time."""

    def __init__(self) -> None:
        self.kernel: FakeKernel = furnished()
        self.lock = threading.Lock()

    def call(self, name: str, *arguments: Any) -> Any:
        with self.lock:
            return getattr(self.kernel, name)(*arguments)


class Manager(BaseManager):
    """Serves the kernel from a process of its own."""


Manager.register("Served", Served)


class RemoteTree:
    """A tree whose every access is a request to the serving process."""

    name = "served"
    root = None
    answers_netlink = True

    def __init__(self, served: Any) -> None:
        self.served = served

    def read_many(
        self, folder: str, files: tuple[str, ...], links: tuple[str, ...] = ()
    ) -> tuple[list[bytes | int], list[str | int]]:
        # One by one, each a request.
        return Tree.read_many(self, folder, files, links)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in (*METHODS, "vf_settings"):
            raise AttributeError(name)
        return lambda *arguments: self.served.call(name, *arguments)


@pytest.mark.slow
def test_fifty_processes_write_one_history() -> None:
    with Manager() as manager, run_folder() as folder:
        served = manager.Served()  # type: ignore[attr-defined]

        def connect() -> Host:
            return Host(RemoteTree(served), live=True, name="served")  # type: ignore[arg-type]

        uuids = [f"{UUID[:-1]}{digit}" for digit in range(3)]
        choices = operations([EDU, TESTDEV, NVME], NIC, uuids)
        codes = run_workers(connect, folder, PROCESSES, EACH, choices)
        assert codes == [0] * PROCESSES
        outcomes = check(connect(), folder)
        assert outcomes["committed"] > 100


def test_no_interference_of_a_neighbour_goes_unnoticed() -> None:
    kernel = furnished()
    tallies = []
    for make, goal, prepare in (
        (binding(NVME), Binding("vfio-pci", "vfio-pci"), None),
        (releasing(NVME), Binding("nvme", None), binding(NVME)),
    ):
        meddling = Meddling(
            lambda watch: Host(WatchedKernel(kernel, watch), live=True, name="watched"),  # type: ignore[arg-type]
            lambda path, text: kernel.write_attribute(path, text.encode(), 1.0),
            NVME,
        )
        meddling.everywhere(make, goal, prepare, every=EVERY)
        tallies.append(meddling.tally)
    for tally in tallies:
        assert tally["reported"] > 10
        assert tally["put right"] > 0
