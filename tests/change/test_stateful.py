"""Random histories of changes, faults and crashes on the fake kernel."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.change.changing import NIC, Make, binding, counting, do, furnished
from tests.change.stateful import DEVICES, Changes
from tests.fakes.kernel import FAULTS, Fault
from tests.guests.runs import PROOFS_WANTED
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.errors import VfiotoolError


class Killed(BaseException):
    """The process dies at a write: nothing of it runs on, not even a roll-back."""


class FaultyChanges(Changes):
    """Changes of a fake host, some of which fail, hang or die half-way."""

    def __init__(self) -> None:
        self.kernel = furnished()
        super().__init__(self.kernel.host())

    def state(self) -> dict[object, object]:
        return self.kernel.state()

    def change(self, make: Make) -> None:
        super().change(make)
        self.kernel.clear_faults()

    def stuck(self, before: dict[object, object]) -> None:
        assert self.kernel.faults, "stuck without a fault"
        self.kernel.clear_faults()
        (entry,) = recover(self.host, self.journal)
        assert entry.result in ("finished", "undone")
        if entry.result == "undone":
            assert self.state() == before
        else:
            self.states.append(self.state())

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
        before = self.state()
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
        if self.state() != before:
            assert all(entry.result == "finished" for entry in results)
            self.states.append(self.state())


FaultyChanges.TestCase.settings = settings(
    max_examples=1000 if os.environ.get(PROOFS_WANTED) else 30,
    stateful_step_count=20,
    deadline=None,
    # Shrinking a history takes minutes; the history found is short enough to be read.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
TestChanges = FaultyChanges.TestCase
