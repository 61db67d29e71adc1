"""kill -9 at every write: whatever was half done, `recover` ends it as before or as after.

The change runs in a forked child whose door kills it: at the entry of a write, while the write is
in the kernel's hands, or right after it; in the change itself, in its roll-back, and in `recover`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.changing import run_folder
from tests.fakekernel import end_state
from tests.lab.commands import modprobe
from vfiotool.change.apply import change, recover
from vfiotool.change.journal import Journal
from vfiotool.change.policy import parse_policy
from vfiotool.change.policy_facts import read_policy_facts
from vfiotool.change.policy_plan import plan_policy
from vfiotool.change.step import Step
from vfiotool.errors import VfiotoolError
from vfiotool.host import Host, OsTree

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

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
# Recovery itself, apart from what the devices take: 1 s on a machine of today. The lab's guests
# are emulated, and a shared processor makes them slower still.
RECOVER_S = 20.0


class KillingTree(OsTree):
    """Kills its process at one write; fails another one before, to start a roll-back."""

    def __init__(self, kill_at: int, moment: str, fail_at: int = 0) -> None:
        super().__init__()
        self.kill_at, self.moment, self.fail_at = kill_at, moment, fail_at
        self.count = 0

    def write(self, path: str, data: bytes, timeout_s: float) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(errno.EIO, "failed by the test", path)
        if self.count != self.kill_at:
            super().write(path, data, timeout_s)
            return
        if self.moment == "flight":
            child = self.child()
            if os.fork() == 0:
                # The request goes out from here, so that the killed process cannot wait for it;
                # and of that process's locks nothing may live on.
                first, last = sorted((child._requests, child._replies))
                try:
                    os.closerange(3, first)
                    os.closerange(first + 1, last)
                    os.closerange(last + 1, 1 << 16)
                    child._owner = os.getpid()
                    child.write(path, data, timeout_s)
                finally:
                    os._exit(0)
        elif self.moment == "after":
            super().write(path, data, timeout_s)
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


class CountingTree(OsTree):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, path: str, data: bytes, timeout_s: float) -> None:
        self.count += 1
        super().write(path, data, timeout_s)


@pytest.fixture(scope="module")
def ends() -> tuple[dict[object, object], dict[object, object], int]:
    """The states before and after, and the number of writes between them."""
    modprobe("vfio-pci")
    host = Host.local()
    before = end_state(host)
    tree = CountingTree()
    with run_folder() as folder:
        apply(Host(tree, live=True, name="this host"), folder)
        after = end_state(host)
        from vfiotool.change.apply import undo

        undo(host, Journal(host, folder))
    assert end_state(host) == before
    return before, after, tree.count


def settle(
    folder: str, ends: tuple[dict[object, object], dict[object, object], int]
) -> tuple[str, float]:
    """Recover what a killed process left; how it ended, and how long that took."""
    host = Host.local()
    journal = Journal(host, folder)
    begun = time.monotonic()
    results = recover(host, journal)
    seconds = time.monotonic() - begun
    state = end_state(host)
    assert state in ends[:2], f"{results}: neither before nor after"
    assert all(record.outcome is not None for record in journal.history())
    assert recover(host, journal) == ()
    if state == ends[1]:
        from vfiotool.change.apply import undo

        undo(host, journal)
    assert end_state(host) == ends[0]
    return "after" if state == ends[1] else "before", seconds


def test_a_kill_at_any_write_of_a_change(
    ends: tuple[dict[object, object], dict[object, object], int],
    record_property: Callable[[str, object], None],
) -> None:
    slowest = 0.0
    for at in range(1, ends[2] + 1):
        for moment in MOMENTS:
            with run_folder() as folder:
                tree = KillingTree(at, moment)
                assert in_child(lambda host, f=folder: apply(host, f), tree) == signal.SIGKILL
                _, seconds = settle(folder, ends)
                slowest = max(slowest, seconds)
    record_property("slowest_recovery_s", round(slowest, 3))
    assert slowest < RECOVER_S


def test_a_kill_at_any_write_of_a_roll_back(
    ends: tuple[dict[object, object], dict[object, object], int],
) -> None:
    last = ends[2]
    kills = 0
    for at in range(last + 1, 3 * last):
        with run_folder() as folder:
            tree = KillingTree(at, "after" if at % 2 else "entry", fail_at=last)
            if in_child(lambda host, f=folder: apply(host, f), tree) != signal.SIGKILL:
                break
            kills += 1
            assert settle(folder, ends)[0] == "before"
    assert kills >= last // 2


def test_a_kill_at_any_write_of_recover(
    ends: tuple[dict[object, object], dict[object, object], int],
) -> None:
    kills = 0
    for at in range(1, 3 * ends[2]):
        with run_folder() as folder:
            first = KillingTree(ends[2], "after")
            assert in_child(lambda host, f=folder: apply(host, f), first) == signal.SIGKILL
            second = KillingTree(at, "after" if at % 2 else "entry")
            code = in_child(lambda host, f=folder: recover(host, Journal(host, f)), second)
            settle(folder, ends)
            if code != signal.SIGKILL:
                break
            kills += 1
    assert kills >= ends[2] // 2
