"""Random histories of changes, faults and crashes: the promises hold after every one of them."""

from __future__ import annotations

import shutil
import tempfile

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.changing import (
    BEHIND,
    BESIDE,
    EDU,
    NIC,
    NVME,
    TESTDEV,
    UUID,
    Make,
    binding,
    counting,
    creating,
    do,
    furnished,
    releasing,
    removing,
)
from tests.fakekernel import FAULTS, Fault
from vfiotool.change.apply import recover, undo
from vfiotool.change.export import export_policy
from vfiotool.change.journal import Journal
from vfiotool.change.policy import parse_policy
from vfiotool.change.policy_facts import read_policy_facts
from vfiotool.change.policy_plan import plan_policy
from vfiotool.errors import NotFound, Stuck, VfiotoolError

DEVICES = st.sampled_from([EDU, TESTDEV, NVME, BEHIND, BESIDE])


class Killed(BaseException):
    """The process dies at a write: nothing of it runs on, not even a roll-back."""


class Changes(RuleBasedStateMachine):
    """A host that is changed, undone, and crashed; `states` are what undo has to give back."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = furnished()
        self.host = self.kernel.host()
        self.folder = tempfile.mkdtemp(dir="/dev/shm")
        self.journal = Journal(self.host, f"{self.folder}/vfiotool")
        self.states = [self.kernel.state()]

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def change(self, make: Make) -> None:
        before = self.kernel.state()
        try:
            outcome = do(self.host, self.journal, make)
        except Stuck:
            assert self.kernel.faults, "stuck without a fault"
            self.kernel.clear_faults()
            (entry,) = recover(self.host, self.journal)
            assert entry.result in ("finished", "undone")
            if entry.result == "undone":
                assert self.kernel.state() == before
            else:
                self.states.append(self.kernel.state())
        except VfiotoolError:
            assert self.kernel.state() == before
        else:
            assert do(self.host, self.journal, make).steps == () or make is None
            if outcome.transaction is not None:
                self.states.append(self.kernel.state())
        self.kernel.clear_faults()

    @rule(device=DEVICES, driver=st.sampled_from([None, "none", "nvme", "nosuch"]))
    def bind(self, device: str, driver: str | None) -> None:
        self.change(binding(device, driver=driver))

    @rule(device=DEVICES)
    def release(self, device: str) -> None:
        self.change(releasing(device))

    @rule(count=st.integers(0, 7), autoprobe=st.sampled_from([None, False]))
    def set_vfs(self, count: int, autoprobe: bool | None) -> None:
        self.change(counting(NIC, count, autoprobe))

    @rule(index=st.integers(0, 6))
    def bind_vf(self, index: int) -> None:
        self.change(binding(self.kernel.vf_address(NIC, index)))

    @rule(digit=st.integers(0, 3), kind=st.sampled_from(["mtty-1", "mtty-2"]))
    def make_mdev(self, digit: int, kind: str) -> None:
        self.change(creating("mtty", kind, f"{UUID[:-1]}{digit}"))

    @rule(digit=st.integers(0, 3))
    def remove_mdev(self, digit: int) -> None:
        before = len(self.journal.history())
        try:
            do(self.host, self.journal, removing(f"{UUID[:-1]}{digit}"))
        except VfiotoolError:
            return
        if len(self.journal.history()) > before:
            self.states.append(self.kernel.state())

    @rule(
        kind=st.sampled_from(FAULTS),
        at=st.integers(1, 12),
        always=st.booleans(),
        device=DEVICES,
    )
    def bind_with_a_fault(self, kind: str, at: int, always: bool, device: str) -> None:
        self.kernel.faults = (Fault(kind, len(self.kernel.writes) + at, always),)
        self.change(binding(device))

    @rule(at=st.integers(1, 12), count=st.integers(0, 7))
    def be_killed(self, at: int, count: int) -> None:
        before = self.kernel.state()
        number = len(self.kernel.writes) + at

        def kill(now: int, path: str, data: str) -> None:
            if now >= number:
                raise Killed

        self.kernel.before_write = kill
        try:
            do(self.host, self.journal, counting(NIC, count))
        except (Killed, VfiotoolError):
            pass
        finally:
            self.kernel.before_write = None
        # A roll-back that the kill cut short ends here as a crash would: a new process looks.
        self.journal = Journal(self.host, f"{self.folder}/vfiotool")
        results = recover(self.host, self.journal)
        if self.kernel.state() != before:
            assert all(entry.result == "finished" for entry in results)
            self.states.append(self.kernel.state())

    @precondition(lambda self: len(self.states) > 1)
    @rule()
    def take_back(self) -> None:
        undo(self.host, self.journal)
        self.states.pop()
        assert self.kernel.state() == self.states[-1]

    @precondition(lambda self: len(self.states) == 1)
    @rule()
    def nothing_to_take_back(self) -> None:
        try:
            undo(self.host, self.journal)
        except NotFound:
            return
        raise AssertionError("undo found a change where none stands")

    @invariant()
    def the_export_is_in_sync(self) -> None:
        policy = parse_policy(export_policy(self.host))
        assert plan_policy(policy, read_policy_facts(self.host, policy)).steps == ()

    @invariant()
    def nothing_is_left_open(self) -> None:
        assert all(record.outcome is not None for record in self.journal.history())


Changes.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    # Shrinking a history takes minutes; the history found is short enough to be read.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
TestChanges = Changes.TestCase
