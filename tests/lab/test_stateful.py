"""Random histories of changes on a guest's own kernel; each is undone to its first state."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

from tests.change.stateful import Changes
from tests.lab.commands import modprobe
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"


class GuestChanges(Changes):
    """Changes of this guest."""

    def __init__(self) -> None:
        modprobe("vfio-pci", "igbvf")
        super().__init__(Host.local())

    def teardown(self) -> None:
        while len(self.states) > 1:
            self.take_back()
        super().teardown()


GuestChanges.TestCase.settings = settings(
    max_examples=5,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
TestChanges = GuestChanges.TestCase
