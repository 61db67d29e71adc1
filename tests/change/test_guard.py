"""What each kind of step would take, as the guard sees it: by what stands now."""

from __future__ import annotations

import pytest

from tests.change.changing import (
    BEHIND,
    EDU,
    NIC,
    NVME,
    UUID,
    binding,
    counting,
    creating,
    do,
    furnished,
    run_folder,
)
from tests.fakes.kernel import FakeKernel
from vfiotool.change.guard import find_blockers, refuse_uses
from vfiotool.change.journal import Journal
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver, LoadModule
from vfiotool.change.steps.eswitch import SetEswitchMode
from vfiotool.change.steps.mdev import SetMdev, SetMdevAttribute
from vfiotool.change.steps.registry import step_kinds
from vfiotool.change.steps.sriov import SetAutoprobe, SetMsixCount, SetVfCount, SetVgpuType
from vfiotool.change.steps.state import ANY, PARKED, Binding
from vfiotool.change.steps.vdpa import SetVdpaAutoprobe
from vfiotool.change.steps.vf_network import SetVfProperty
from vfiotool.errors import Refused
from vfiotool.host.paths import ESWITCH, OPEN_NODES
from vfiotool.netlink.route import VfSettings

VFS = ("0000:02:10.0", "0000:02:10.2")
VFIO = Binding("vfio-pci", "vfio-pci")
NVME_DRIVER = Binding("nvme", None)


@pytest.fixture
def kernel() -> FakeKernel:
    """Two VFs, an mdev, and a mode of the card's switch."""
    kernel = furnished()
    with run_folder() as folder:
        journal = Journal(kernel.host(), folder)
        do(kernel.host(), journal, counting(NIC, 2))
        do(kernel.host(), journal, creating("mtty", "mtty-1", UUID))
    kernel._put(f"{ESWITCH}/{NIC}", b"legacy\n")
    base = f"/sys/devices/pci0000:00/{VFS[0]}"
    kernel._put(f"{base}/sriov_vf_msix_count", b"")
    kernel._put(f"{base}/nvidia/current_vgpu_type", b"0\n")
    kernel._put(f"/sys/devices/virtual/mtty/mtty/{UUID}/level", b"1\n")
    return kernel


def use(kernel: FakeKernel, *devices: str) -> None:
    """A program has a node of each of these devices open."""
    host, lines = kernel.host(), ""
    for device in devices:
        folder = "/sys/bus/pci/devices" if ":" in device else "/sys/bus/mdev/devices"
        lines += f"4242\tqemu\t/dev/of-{device}\t{host.realpath(f'{folder}/{device}')}\n"
    kernel._put(OPEN_NODES, f"{lines}.\n".encode())


def vlan(number: int) -> VfSettings:
    return VfSettings(0, vlan=number)


TAKING: dict[str, tuple[Step, str]] = {
    "bind": (BindDriver(NVME, NVME_DRIVER, VFIO), NVME),
    "park": (BindDriver(NVME, NVME_DRIVER, Binding(None, PARKED)), NVME),
    "bind what has no driver": (BindDriver(EDU, Binding(None, None), VFIO), EDU),
    "fewer VFs": (SetVfCount(NIC, 2, 0), VFS[1]),
    "other VFs": (SetVfCount(NIC, 2, 5), VFS[0]),
    "another mode of the switch": (SetEswitchMode(NIC, "legacy", "switchdev"), VFS[1]),
    "a VF's VLAN": (SetVfProperty(NIC, 0, vlan(0), vlan(9)), VFS[0]),
    "a VF's vectors": (SetMsixCount(VFS[0], None, 8), VFS[0]),
    "a vGPU's type": (SetVgpuType(VFS[0], 0, 5), VFS[0]),
    "remove an mdev": (SetMdev(UUID, "mtty", "mtty-1", exists=False), UUID),
    "an mdev's attribute": (SetMdevAttribute(UUID, "level", "1", "2"), UUID),
}


@pytest.mark.parametrize("name", TAKING)
def test_a_step_that_takes_a_device_names_its_user(kernel: FakeKernel, name: str) -> None:
    step, device = TAKING[name]
    assert find_blockers(kernel.host(), [step]) == ()
    use(kernel, device)
    found = find_blockers(kernel.host(), [step])
    assert {(blocker.kind, blocker.device) for blocker in found} == {("open-file", device)}


LEAVING: dict[str, Step] = {
    "a device that is where it shall be": BindDriver(NVME, VFIO, NVME_DRIVER),
    "an override alone": BindDriver(NVME, NVME_DRIVER, Binding("nvme", "nvme")),
    "back to the kernel's choice, which it has": BindDriver(NVME, VFIO, Binding(ANY, None)),
    "as many VFs as there are": SetVfCount(NIC, 0, 2),
    "the mode that the switch has": SetEswitchMode(NIC, "switchdev", "legacy"),
    "autoprobe": SetAutoprobe(NIC, True, False),
    "an mdev that is there": SetMdev(UUID, "mtty", "mtty-1", exists=True),
    "a module": LoadModule("vfio-pci", "vfio-pci"),
    "a setting that is so": SetMdevAttribute(UUID, "level", "2", "1"),
    "what undoing has to know": SetVfProperty(NIC, 0, vlan(0), vlan(9), keep=True),
    "the vDPA bus's autoprobe": SetVdpaAutoprobe(True, False),
    "a device that is gone": BindDriver("0000:77:00.0", NVME_DRIVER, VFIO),
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_step_that_takes_nothing_asks_about_nobody(kernel: FakeKernel, name: str) -> None:
    use(kernel, NVME, *VFS, UUID)
    assert find_blockers(kernel.host(), [LEAVING[name]]) == ()


def test_the_driver_that_a_device_has_now_decides(kernel: FakeKernel) -> None:
    """Undoing a bind takes nothing from the host, unless the host has the device again by now."""
    undoing = BindDriver(BEHIND, VFIO, Binding(None, None))
    use(kernel, BEHIND)
    assert find_blockers(kernel.host(), [undoing]) == ()
    kernel._attach(BEHIND, "nvme")
    assert len(find_blockers(kernel.host(), [undoing])) == 1


def test_vfs_that_an_earlier_step_removes_are_no_use(kernel: FakeKernel) -> None:
    host = kernel.host()
    with run_folder() as folder:
        journal = Journal(host, folder)
        alone = BindDriver(NIC, Binding("igb", None), VFIO)
        assert {entry.kind for entry in find_blockers(host, [alone])} == {"vfs-enabled"}
        assert find_blockers(host, [SetVfCount(NIC, 2, 0), alone]) == ()
        assert binding(EDU)(host, journal)


def test_every_kind_of_step_is_asked_about(kernel: FakeKernel) -> None:
    asked = {type(step) for step, _ in TAKING.values()} | {type(s) for s in LEAVING.values()}
    # These need a kernel with vDPA: tests/devices/test_vdpa.py.
    assert {kind.__name__ for kind in step_kinds().values()} - {k.__name__ for k in asked} == {
        "SetVdpa",
        "SetVdpaMac",
    }


def test_what_a_refusal_proposes_can_be_typed(kernel: FakeKernel) -> None:
    """A name that somebody else chose is no part of a command."""
    name = "/dev/a $(touch x)"
    device = kernel.host().realpath(f"/sys/bus/pci/devices/{NVME}")
    kernel._put(OPEN_NODES, f"7\tcat\t{name}\t{device}\n.\n".encode())
    with pytest.raises(Refused) as raised:
        refuse_uses(kernel.host(), [BindDriver(NVME, NVME_DRIVER, VFIO)])
    assert f"--allow 'open-file:{name}'" in (raised.value.hint or "")
