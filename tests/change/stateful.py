"""Random histories of changes: the promises hold after every one of them.

tests/test_stateful.py runs them on the fake kernel with faults and crashes on top,
tests/lab/test_stateful.py on a guest's own.
"""

from __future__ import annotations

import shutil
import tempfile

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.change.changing import (
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
    releasing,
    removing,
)
from tests.fakes.kernel import PCI, end_state
from vfiotool.change.journal import Journal
from vfiotool.change.undo import undo
from vfiotool.errors import NotFound, Stuck, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.policy.export import export_policy
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy

DEVICES = st.sampled_from([EDU, TESTDEV, NVME, BEHIND, BESIDE])


def vf_address(host: Host, pf: str, index: int) -> str:
    """Where a VF is, or would be (PCIe Base Specification 9.2.1.2)."""
    offset = host.read_int(f"{PCI}/devices/{pf}/sriov_offset") or 0
    stride = host.read_int(f"{PCI}/devices/{pf}/sriov_stride") or 0
    bus, slot = int(pf[5:7], 16), int(pf[8:10], 16)
    routing = (bus << 8 | slot << 3 | int(pf[11])) + offset + index * stride
    return f"{pf[:4]}:{routing >> 8:02x}:{routing >> 3 & 31:02x}.{routing & 7}"


class Changes(RuleBasedStateMachine):
    """A host that is changed and undone; `states` are what undo has to give back."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.folder = tempfile.mkdtemp(dir="/dev/shm")
        self.journal = Journal(self.host, f"{self.folder}/vfiotool")
        self.states = [self.state()]

    def state(self) -> dict[object, object]:
        return end_state(self.host)

    def has_vfs(self) -> bool:
        return self.host.exists(f"{PCI}/devices/{NIC}/sriov_numvfs")

    def has_mdevs(self) -> bool:
        return self.host.exists("/sys/class/mdev_bus/mtty")

    def stuck(self, before: dict[object, object]) -> None:
        """A change ended with Stuck."""
        raise AssertionError("stuck without a fault")

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def change(self, make: Make) -> None:
        before = self.state()
        try:
            outcome = do(self.host, self.journal, make)
        except Stuck:
            self.stuck(before)
        except VfiotoolError:
            assert self.state() == before
        else:
            assert do(self.host, self.journal, make).steps == ()
            if outcome.transaction is not None:
                self.states.append(self.state())

    @rule(device=DEVICES, driver=st.sampled_from([None, "none", "nvme", "nosuch"]))
    def bind(self, device: str, driver: str | None) -> None:
        self.change(binding(device, driver=driver))

    @rule(device=DEVICES)
    def release(self, device: str) -> None:
        self.change(releasing(device))

    @precondition(has_vfs)
    @rule(count=st.integers(0, 7), autoprobe=st.sampled_from([None, False]))
    def set_vfs(self, count: int, autoprobe: bool | None) -> None:
        self.change(counting(NIC, count, autoprobe))

    @precondition(has_vfs)
    @rule(index=st.integers(0, 6))
    def bind_vf(self, index: int) -> None:
        self.change(binding(vf_address(self.host, NIC, index)))

    @precondition(has_mdevs)
    @rule(digit=st.integers(0, 3), kind=st.sampled_from(["mtty-1", "mtty-2"]))
    def make_mdev(self, digit: int, kind: str) -> None:
        self.change(creating("mtty", kind, f"{UUID[:-1]}{digit}"))

    @precondition(has_mdevs)
    @rule(digit=st.integers(0, 3))
    def remove_mdev(self, digit: int) -> None:
        before = len(self.journal.history())
        try:
            do(self.host, self.journal, removing(f"{UUID[:-1]}{digit}"))
        except VfiotoolError:
            return
        if len(self.journal.history()) > before:
            self.states.append(self.state())

    @precondition(lambda self: len(self.states) > 1)
    @rule()
    def take_back(self) -> None:
        undo(self.host, self.journal)
        self.states.pop()
        assert self.state() == self.states[-1]

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
