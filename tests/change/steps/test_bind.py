"""Binding and releasing on the fake kernel: what a user gets, and what stays after a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.change.changing import (
    BEHIND,
    BESIDE,
    BRIDGE,
    EDU,
    NIC,
    NVME,
    STUBBORN,
    TESTDEV,
    binding,
    counting,
    do,
    furnished,
    releasing,
    run_folder,
)
from tests.fakes.kernel import FakeKernel, Fault
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.undo import undo
from vfiotool.errors import KernelError, NotFound, Refused, Stuck, Unsupported, UsageError


@pytest.fixture
def kernel() -> FakeKernel:
    return furnished()


@pytest.fixture
def journal(kernel: FakeKernel) -> Iterator[Journal]:
    with run_folder() as folder:
        yield Journal(kernel.host(), folder)


def test_bind_gives_the_device_to_vfio_pci_and_keeps_the_override(
    kernel: FakeKernel, journal: Journal
) -> None:
    do(kernel.host(), journal, binding(NVME))
    assert kernel.driver_of(NVME) == "vfio-pci"
    assert kernel.override_of(NVME) == "vfio-pci"


def test_the_override_is_set_before_the_old_driver_lets_go(
    kernel: FakeKernel, journal: Journal
) -> None:
    do(kernel.host(), journal, binding(NVME))
    names = [path.rpartition("/")[2] for path, _ in kernel.writes]
    assert names == ["driver_override", "unbind", "drivers_probe"]


def test_bind_of_a_bound_device_writes_nothing(kernel: FakeKernel, journal: Journal) -> None:
    do(kernel.host(), journal, binding(EDU))
    kernel.writes.clear()
    assert do(kernel.host(), journal, binding(EDU)).steps == ()
    assert kernel.writes == []


def test_release_gives_the_earlier_driver_back_and_clears_the_override(
    kernel: FakeKernel, journal: Journal
) -> None:
    before = kernel.state()
    do(kernel.host(), journal, binding(NVME, EDU))
    do(kernel.host(), journal, releasing(NVME, EDU))
    assert kernel.state() == before
    assert kernel.driver_of(EDU) is None


def test_release_remembers_the_first_driver_over_several_changes(
    kernel: FakeKernel, journal: Journal
) -> None:
    before = kernel.state()
    do(kernel.host(), journal, binding(NVME))
    do(kernel.host(), journal, binding(NVME, driver="none"))
    do(kernel.host(), journal, binding(NVME))
    do(kernel.host(), journal, releasing(NVME))
    assert kernel.state() == before


def test_release_without_a_record_lets_the_kernel_choose(kernel: FakeKernel) -> None:
    before = kernel.state()
    with run_folder() as first:
        do(kernel.host(), Journal(kernel.host(), first), binding(NVME))
    with run_folder() as second:
        do(kernel.host(), Journal(kernel.host(), second), releasing(NVME))
    assert kernel.state() == before


def test_none_parks_a_device_where_no_probe_takes_it(kernel: FakeKernel, journal: Journal) -> None:
    do(kernel.host(), journal, binding(NVME, driver="none"))
    assert kernel.driver_of(NVME) is None
    kernel.write_attribute("/sys/bus/pci/drivers_probe", NVME.encode(), 1)
    assert kernel.driver_of(NVME) is None


def test_a_whole_group_goes_along_and_the_bridge_stays(
    kernel: FakeKernel, journal: Journal
) -> None:
    before = kernel.state()
    do(kernel.host(), journal, binding(BEHIND, whole_group=True))
    assert [kernel.driver_of(name) for name in (BRIDGE, BEHIND, BESIDE)] == [
        None,
        "vfio-pci",
        "vfio-pci",
    ]
    do(kernel.host(), journal, releasing(BEHIND, BESIDE))
    assert kernel.state() == before


def test_bind_restores_the_old_driver_when_the_probe_refuses(
    kernel: FakeKernel, journal: Journal
) -> None:
    before = kernel.state()
    with pytest.raises(KernelError, match="vfio-pci did not take it") as caught:
        do(kernel.host(), journal, binding(STUBBORN))
    assert caught.value.exit_code == 5
    assert caught.value.errno_name == "EINVAL"
    assert kernel.state() == before
    assert journal.history()[-1].outcome == "rolled-back"


def test_a_driver_that_lets_go_after_its_probe_has_refused_too(
    kernel: FakeKernel, journal: Journal
) -> None:
    kernel.drivers["nvme"].hesitant = True
    before = kernel.state()
    with pytest.raises(KernelError, match=r"nvme did not take it \(it has no driver\)"):
        do(kernel.host(), journal, binding(EDU, driver="nvme"))
    assert kernel.state() == before


def test_bind_restores_an_override_that_another_tool_had_set(
    kernel: FakeKernel, journal: Journal
) -> None:
    kernel.write_attribute(f"/sys/bus/pci/devices/{STUBBORN}/driver_override", b"nvme\n", 1)
    before = kernel.state()
    with pytest.raises(KernelError):
        do(kernel.host(), journal, binding(STUBBORN))
    assert kernel.state() == before
    assert kernel.override_of(STUBBORN) == "nvme"


def test_a_driver_that_does_not_exist_leaves_everything_as_it_was(
    kernel: FakeKernel, journal: Journal
) -> None:
    before = kernel.state()
    with pytest.raises(KernelError, match="no driver named nosuch is registered"):
        do(kernel.host(), journal, binding(NVME, driver="nosuch"))
    assert kernel.state() == before


def test_a_vfio_driver_that_the_kernel_lacks_is_unsupported(
    kernel: FakeKernel, journal: Journal
) -> None:
    with pytest.raises(Unsupported, match="this kernel has no nvgrace_gpu_vfio_pci"):
        do(kernel.host(), journal, binding(NVME, driver="nvgrace-gpu-vfio-pci"))


def test_a_module_is_loaded_for_a_driver_that_is_not_registered(
    kernel: FakeKernel, journal: Journal
) -> None:
    do(kernel.host(), journal, binding(EDU, driver="mlx5_vfio_pci"))
    assert kernel.driver_of(EDU) == "mlx5_vfio_pci"


def test_of_several_devices_all_are_bound_or_none(kernel: FakeKernel, journal: Journal) -> None:
    before = kernel.state()
    with pytest.raises(KernelError):
        do(kernel.host(), journal, binding(EDU, NVME, STUBBORN))
    assert kernel.state() == before


def test_a_bridge_that_keeps_its_group_from_user_space_is_parked_and_given_back(
    kernel: FakeKernel, journal: Journal
) -> None:
    kernel.add_driver("shpchp", ["1b36:000e"])
    kernel.host().write_attribute("/sys/bus/pci/drivers_probe", BRIDGE)
    before = kernel.state()
    with pytest.raises(Refused, match="is a bridge"):
        do(kernel.host(), journal, binding(BRIDGE))
    do(kernel.host(), journal, binding(BRIDGE, driver="none"))
    assert kernel.driver_of(BRIDGE) is None
    do(kernel.host(), journal, releasing(BRIDGE))
    assert kernel.state() == before


@pytest.mark.parametrize("driver", ["pcieport", None])
def test_a_bridge_that_is_in_nobodys_way_is_not_parked(
    kernel: FakeKernel, journal: Journal, driver: str | None
) -> None:
    if driver:
        kernel.drivers[driver].ids = frozenset(["1b36:000e"])
        kernel.host().write_attribute("/sys/bus/pci/drivers_probe", BRIDGE)
    assert kernel.driver_of(BRIDGE) == driver
    with pytest.raises(Refused, match="is a bridge"):
        do(kernel.host(), journal, binding(BRIDGE, driver="none"))


def test_unknown_devices_bridges_and_bad_names_are_refused(
    kernel: FakeKernel, journal: Journal
) -> None:
    with pytest.raises(NotFound):
        do(kernel.host(), journal, binding("0000:77:00.0"))
    with pytest.raises(Refused, match="is a bridge"):
        do(kernel.host(), journal, binding(BRIDGE))
    for name in ("../vfio-pci", "/etc/passwd", "a\nb", "x" * 5000, ""):
        with pytest.raises(UsageError, match="cannot be a driver's name"):
            do(kernel.host(), journal, binding(EDU, driver=name))
    assert kernel.writes == []


def test_a_device_without_a_group_is_unsupported(kernel: FakeKernel, journal: Journal) -> None:
    kernel.add_function("0000:06:00.0", "1234:11e8")
    with pytest.raises(Unsupported, match="in no IOMMU group"):
        do(kernel.host(), journal, binding("0000:06:00.0"))


def test_a_device_swapped_for_another_is_not_written_to(
    kernel: FakeKernel, journal: Journal
) -> None:
    host = kernel.host()
    steps = binding(EDU)(host, journal)
    kernel._remove(f"/sys/devices/pci0000:00/{EDU}")
    kernel.add_function(EDU, "10de:2684", group=1)
    with pytest.raises(Refused, match="is another device now: vendor 10de instead of 1234"):
        do(host, journal, lambda *_: steps)
    assert kernel.writes == []


def test_a_held_device_is_reported_stuck_with_its_holder_and_others_stay_workable(
    kernel: FakeKernel, journal: Journal
) -> None:
    host = kernel.host()
    before = kernel.state()
    do(host, journal, binding(NVME))
    kernel.hold(NVME, pid=4242, comm="qemu")
    with pytest.raises(Stuck, match=r"held by process 4242 \(qemu\)") as caught:
        do(host, journal, releasing(NVME))
    assert caught.value.exit_code == 6
    assert "recover" in (caught.value.hint or "")
    do(host, journal, binding(TESTDEV))
    do(host, journal, releasing(TESTDEV))
    with pytest.raises(Stuck, match=r"not finished|locked"):
        do(host, journal, releasing(NVME))
    assert recover(host, journal, timeout_s=0.1)[0].result == "stuck"
    kernel.let_go(NVME)
    assert [entry.result for entry in recover(host, journal)] == ["finished"]
    assert kernel.state() == before


def test_the_holder_of_a_devices_own_node_is_named_although_the_node_has_gone(
    kernel: FakeKernel, journal: Journal
) -> None:
    host = kernel.host()
    do(host, journal, binding(NVME))
    kernel.hold(NVME, pid=4242, comm="qemu", cdev="vfio0")
    with pytest.raises(Stuck, match=r"held by process 4242 \(qemu\)"):
        do(host, journal, releasing(NVME))
    stuck = recover(host, journal, timeout_s=0.1)[0]
    assert stuck.result == "stuck" and "process 4242 (qemu)" in (stuck.detail or "")
    kernel.let_go(NVME)
    assert [entry.result for entry in recover(host, journal)] == ["finished"]


def test_undo_takes_changes_back_one_by_one(kernel: FakeKernel, journal: Journal) -> None:
    host = kernel.host()
    states = [kernel.state()]
    for make in (binding(NVME), counting(NIC, 3, autoprobe=False), counting(NIC, 1)):
        do(host, journal, make)
        states.append(kernel.state())
    while len(states) > 1:
        states.pop()
        undo(host, journal)
        assert kernel.state() == states[-1]
    with pytest.raises(NotFound, match="no change of this boot to undo"):
        undo(host, journal)


def test_undo_refuses_what_was_changed_since(kernel: FakeKernel, journal: Journal) -> None:
    host = kernel.host()
    do(host, journal, binding(NVME))
    kernel.write_attribute("/sys/bus/pci/drivers/vfio-pci/unbind", NVME.encode(), 1)
    with pytest.raises(Refused, match="changed"):
        undo(host, journal)


def test_vfs_are_made_and_removed_and_their_drivers_come_back_on_undo(
    kernel: FakeKernel, journal: Journal
) -> None:
    host = kernel.host()
    do(host, journal, counting(NIC, 3))
    vf = kernel.vf_address(NIC, 1)
    assert kernel.driver_of(vf) == "igbvf"
    do(host, journal, binding(vf))
    before = kernel.state()
    do(host, journal, counting(NIC, 1))
    assert kernel.driver_of(vf) is None
    undo(host, journal)
    assert kernel.state() == before


def test_autoprobe_is_off_while_vfs_are_made_and_restored(
    kernel: FakeKernel, journal: Journal
) -> None:
    do(kernel.host(), journal, counting(NIC, 2, autoprobe=False))
    assert kernel.driver_of(kernel.vf_address(NIC, 0)) is None
    assert kernel.read(f"/sys/bus/pci/devices/{NIC}/sriov_drivers_autoprobe") == b"1\n"


def test_a_partial_enable_is_detected_and_taken_back(kernel: FakeKernel, journal: Journal) -> None:
    before = kernel.state()
    kernel.faults = (Fault("partial", 1),)
    with pytest.raises(KernelError, match="enabled 2 VFs where 3 were asked for"):
        do(kernel.host(), journal, counting(NIC, 3))
    assert kernel.state() == before


def test_impossible_vf_counts_are_refused_before_a_write(
    kernel: FakeKernel, journal: Journal
) -> None:
    with pytest.raises(UsageError, match="can have 0 to 7 VFs, not 8"):
        do(kernel.host(), journal, counting(NIC, 8))
    with pytest.raises(UsageError):
        do(kernel.host(), journal, counting(NIC, -1))
    with pytest.raises(Unsupported, match="no SR-IOV"):
        do(kernel.host(), journal, counting(EDU, 1))
    assert kernel.writes == []
