"""kill -9 at every write: whatever was half done, `recover` ends it as before or as after.

The change runs in a forked child whose write path kills it: at the entry of a write, while the
write is in the kernel's hands, or right after it; in the change itself, in its roll-back, and in
`recover`.

A recovery's own time is what it takes beside the kernel's share: writes, and modules that load.
Nine in ten have 1 s on a machine of today; the guest is emulated, so that is multiplied with how
much slower than its host it is in the same moment (tests/guests/yardstick.py).
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import pytest

from tests.change.changing import run_folder
from tests.fakes.kernel import end_state
from tests.guests.yardstick import slowness
from tests.lab.commands import modprobe
from vfiotool.change import recover as recover_module
from vfiotool.change.apply import change
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.steps.base import Step
from vfiotool.change.undo import undo
from vfiotool.errors import VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.tree import OsTree
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"
LIMIT_S = 5400.0

POLICY = """
version = 1
[[sriov]]
match = { address = "0000:01:00.0" }
vfs = 2
vf = [ { index = 0, driver = "vfio-pci" } ]
[[device]]
match = { address = "0000:03:00.0" }
[[device]]
match = { address = "0000:05:01.0" }
group = "whole"
"""
MOMENTS = ("entry", "flight", "after")
OWN_LIMIT_S = 1.0

Ends = tuple[dict[object, object], dict[object, object], int]


class KillingTree(OsTree):
    """Kills its process at one write; fails another one before, to start a roll-back."""

    def __init__(self, kill_at: int, moment: str, fail_at: int = 0) -> None:
        super().__init__()
        self.kill_at, self.moment, self.fail_at = kill_at, moment, fail_at
        self.count = 0

    def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(errno.EIO, "failed by the test", path)
        if self.count != self.kill_at:
            super().write_attribute(path, data, timeout_s)
            return
        if self.moment == "flight":
            child = self.child()
            reader, writer = os.pipe()
            if os.fork() == 0:
                # The request goes out from here, so that the killed process cannot wait for it;
                # and of that process's locks nothing may live on.
                first, last = sorted((child._requests, child._replies))
                try:
                    os.closerange(3, first)
                    os.closerange(first + 1, last)
                    os.closerange(last + 1, 1 << 16)
                    child._owner = os.getpid()
                    child.write_attribute(path, data, timeout_s)
                finally:
                    os._exit(0)
            os.close(writer)
            # Ends once the other process has closed what it got from this one.
            os.read(reader, 1)
        elif self.moment == "after":
            super().write_attribute(path, data, timeout_s)
        os.kill(os.getpid(), signal.SIGKILL)


def apply(host: Host, folder: str) -> None:
    journal = Journal(host, folder)
    policy = parse_policy(POLICY)

    def plan() -> tuple[Step, ...]:
        return plan_policy(policy, read_policy_facts(host, policy, journal)).steps

    change(host, journal, "apply", plan)


def in_child(act: Callable[[Host], object], tree: OsTree) -> int:
    """Run `act` in a forked child; the signal that ended it, 0 if none did."""
    pid = os.fork()
    if pid == 0:
        try:
            act(Host(tree, live=True, name="this host"))
        except VfiotoolError:
            os._exit(3)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1] & 0x7F


class MeasuringTree(OsTree):
    """Counts the writes, and the time that the kernel keeps its caller waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.device_s = 0.0

    @contextmanager
    def device_time(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.device_s += time.monotonic() - begun

    def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
        self.count += 1
        self.child()
        with self.device_time():
            super().write_attribute(path, data, timeout_s)

    def load_module(self, name: str, timeout_s: float) -> None:
        with self.device_time():
            super().load_module(name, timeout_s)


@dataclass(frozen=True)
class Settled:
    """How a killed change ended, and what its recovery took by itself and of the kernel's time."""

    end: str
    own_s: float
    device_s: float
    slowness: float

    @property
    def native_s(self) -> float:
        return self.own_s / self.slowness


class Recoveries:
    """All recoveries of a sweep, for its bound and its figures."""

    def __init__(self) -> None:
        self.all: list[Settled] = []

    def check(self, record_property: Callable[[str, object], None]) -> None:
        ranked = sorted(self.all, key=lambda one: one.native_s)
        slowest, most = ranked[-1], ranked[len(ranked) * 9 // 10]
        record_property("kills", len(self.all))
        record_property("ends", dict(Counter(one.end for one in self.all)))
        record_property("slowest_own_s", round(slowest.own_s, 3))
        record_property("slowness_then", round(slowest.slowness, 1))
        record_property("slowest_own_at_native_speed_s", round(slowest.native_s, 3))
        record_property("nine_in_ten_at_native_speed_s", round(most.native_s, 3))
        record_property("median_own_s", round(median(one.own_s for one in self.all), 3))
        record_property("longest_device_s", round(max(one.device_s for one in self.all), 3))
        # One may have met a moment in which the machine did something else.
        assert most.native_s < OWN_LIMIT_S


@pytest.fixture(scope="module")
def ends() -> Ends:
    """The states before and after, and the number of writes between them."""
    modprobe("vfio-pci")
    host = Host.local()
    before = end_state(host)
    tree = MeasuringTree()
    with run_folder() as folder:
        apply(Host(tree, live=True, name="this host"), folder)
        after = end_state(host)
        undo(host, Journal(host, folder))
    assert end_state(host) == before
    return before, after, tree.count


def settle(folder: str, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> Settled:
    """Recover what a killed process left."""
    tree = MeasuringTree()
    host = Host(tree, live=True, name="this host")
    journal = Journal(host, folder)
    wait_for_writer = recover_module._await_writer

    def measured_wait(*arguments: object) -> None:
        with tree.device_time():
            wait_for_writer(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(recover_module, "_await_writer", measured_wait)
        begun = time.monotonic()
        results = recover(host, journal)
        seconds = time.monotonic() - begun
    slow = slowness()
    state = end_state(host)
    assert state in ends[:2], f"{results}: neither before nor after"
    assert all(record.outcome is not None for record in journal.history())
    assert recover(host, journal) == ()
    if state == ends[1]:
        undo(host, journal)
    assert end_state(host) == ends[0]
    end = "after" if state == ends[1] else "before"
    return Settled(end, seconds - tree.device_s, tree.device_s, slow)


def test_a_kill_at_any_write_of_a_change(
    ends: Ends,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    recoveries = Recoveries()
    for at in range(1, ends[2] + 1):
        for moment in MOMENTS:
            with run_folder() as folder:
                tree = KillingTree(at, moment)
                assert in_child(lambda host, f=folder: apply(host, f), tree) == signal.SIGKILL
                recoveries.all.append(settle(folder, ends, monkeypatch))
    recoveries.check(record_property)


def test_a_kill_at_any_write_of_a_roll_back(
    ends: Ends,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    recoveries = Recoveries()
    last = ends[2]
    for at in range(last + 1, 3 * last):
        with run_folder() as folder:
            tree = KillingTree(at, MOMENTS[at % 3], fail_at=last)
            if in_child(lambda host, f=folder: apply(host, f), tree) != signal.SIGKILL:
                break
            recoveries.all.append(settle(folder, ends, monkeypatch))
            assert recoveries.all[-1].end == "before"
    assert len(recoveries.all) >= last // 2
    recoveries.check(record_property)


def test_a_kill_at_any_write_of_recover(
    ends: Ends,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    recoveries = Recoveries()
    for at in range(1, 3 * ends[2]):
        with run_folder() as folder:
            first = KillingTree(ends[2], "after")
            assert in_child(lambda host, f=folder: apply(host, f), first) == signal.SIGKILL
            second = KillingTree(at, MOMENTS[at % 3])
            code = in_child(lambda host, f=folder: recover(host, Journal(host, f)), second)
            recoveries.all.append(settle(folder, ends, monkeypatch))
            if code != signal.SIGKILL:
                break
    # The last one was not killed any more.
    assert len(recoveries.all) > ends[2] // 2
    recoveries.check(record_property)
