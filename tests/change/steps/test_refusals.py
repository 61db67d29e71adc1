"""What single steps refuse, ask of the guard and hold, apart from any plan."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.change.changing import (
    EDU,
    NIC,
    NVME,
    TESTDEV,
    binding,
    counting,
    do,
    furnished,
    run_folder,
)
from tests.fakes.kernel import FakeKernel
from tests.fakes.vdpa import VdpaKernel
from vfiotool.change import confirm as confirming
from vfiotool.change.folder import Folder
from vfiotool.change.journal import Journal, _one_of
from vfiotool.change.plans.facts import read_facts
from vfiotool.change.plans.vdpa import plan_vdpa_add, plan_vdpa_bind, plan_vdpa_remove
from vfiotool.change.plans.vdpa_facts import read_vdpa_facts
from vfiotool.change.sealed import seal
from vfiotool.change.steps.base import device_keys
from vfiotool.change.steps.bind import BindDriver, Binding
from vfiotool.change.steps.state import ANY, read_driver, read_pci_identity
from vfiotool.change.steps.vdpa import SetVdpa, SetVdpaAutoprobe
from vfiotool.change.steps.vf_network import SetVfProperty, interface_of, read_settings
from vfiotool.change.writer import forget_origins
from vfiotool.devices.vdpa import VdpaSettings
from vfiotool.errors import KernelError, NotFound, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_VDPA_AUTOPROBE
from vfiotool.host.tree import MemoryTree
from vfiotool.netlink.route import VfSettings


@pytest.fixture
def journal() -> Iterator[tuple[FakeKernel, Journal]]:
    kernel = furnished()
    with run_folder() as folder:
        yield kernel, Journal(kernel.host(), folder)


def bind_step(address: str, driver: str | None, bus: str = "pci") -> BindDriver:
    return BindDriver(address, Binding(None, None), Binding(driver, driver), bus=bus)


def test_a_binding_on_a_bus_that_is_not_ours_is_refused() -> None:
    with pytest.raises(UsageError, match="not a bus"):
        bind_step("1-1", "usb-storage", bus="usb").check_names()


@pytest.mark.parametrize("name", ["01:00.0", "0000:01:00.0/..", "nvme0", "0000:0A:00.0"])
def test_a_binding_of_what_is_no_pci_address_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        bind_step(name, "vfio-pci").check_names()
    bind_step("vdpa0", "vhost_vdpa", bus="vdpa").check_names()


def test_only_a_vf_for_user_space_has_a_token_to_keep(journal: tuple[FakeKernel, Journal]) -> None:
    kernel, log = journal
    do(kernel.host(), log, counting(NIC, 1))
    vf = kernel.vf_address(NIC, 0)
    assert bind_step(vf, "vfio-pci").token_owner(kernel.host()) == NIC
    assert bind_step(vf, "igbvf").token_owner(kernel.host()) is None
    assert bind_step(vf, None).token_owner(kernel.host()) is None


def test_a_vf_is_locked_with_its_function_and_its_group(
    journal: tuple[FakeKernel, Journal],
) -> None:
    kernel, log = journal
    do(kernel.host(), log, counting(NIC, 1))
    vf = kernel.vf_address(NIC, 0)
    keys = device_keys(kernel.host(), "pci", vf)
    assert {f"device-{vf}", f"device-{NIC}"} < keys
    assert any(key.startswith("group-") for key in keys)
    assert device_keys(kernel.host(), "pci", "0000:77:00.0") == {"device-0000:77:00.0"}


def test_settings_of_vfs_are_asked_of_the_running_host_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = (VfSettings(0, mac="52:54:00:00:00:01"),)
    monkeypatch.setattr("vfiotool.change.steps.vf_network.read_vf_settings", lambda index: wanted)
    files: dict[str, bytes | int] = {
        f"/sys/bus/pci/devices/{NIC}/net/eth0/x": b"",
        "/sys/class/net/eth0/ifindex": b"3\n",
    }
    tree = MemoryTree(files, {})
    assert read_settings(Host(tree, live=True, name="live"), NIC) == wanted
    assert read_settings(Host(tree, live=False, name="file"), NIC) is None
    assert interface_of(Host(MemoryTree({}, {}), live=True, name="live"), NIC) is None


def vf_step(kernel: FakeKernel, *, keep: bool = False) -> SetVfProperty:
    before, after = VfSettings(0, vlan=0), VfSettings(0, vlan=7)
    return SetVfProperty(NIC, 0, before, after, keep=keep)


def test_a_setting_takes_the_vf_that_it_changes_and_no_more(
    journal: tuple[FakeKernel, Journal],
) -> None:
    kernel, log = journal
    step = vf_step(kernel)
    assert not step.present(kernel.host())
    assert list(step.takes(kernel.host())) == []
    do(kernel.host(), log, counting(NIC, 1))
    assert step.present(kernel.host())
    assert [item.device for item in step.takes(kernel.host())] == [kernel.vf_address(NIC, 0)]
    assert list(vf_step(kernel, keep=True).takes(kernel.host())) == []


def test_a_setting_that_somebody_else_changed_is_not_overwritten(
    journal: tuple[FakeKernel, Journal],
) -> None:
    kernel, log = journal
    do(kernel.host(), log, counting(NIC, 1))
    step = SetVfProperty(NIC, 0, VfSettings(0, vlan=3), VfSettings(0, vlan=7))
    with pytest.raises(VfiotoolError):
        step.check(kernel.host())
    vf_step(kernel).check(kernel.host())


def vdpa(kernel: VdpaKernel, name: str = "v0") -> None:
    kernel.host()
    with run_folder() as folder:
        settings = VdpaSettings(mac="52:54:00:12:34:56")
        do(
            kernel.host(),
            Journal(kernel.host(), folder),
            lambda host, _: plan_vdpa_add(
                read_vdpa_facts(host), name, "vdpasim_net", None, settings
            ),
        )


def test_the_removal_of_a_vdpa_device_takes_it_while_it_is_there() -> None:
    kernel = VdpaKernel()
    step = SetVdpa(name="v0", parent="vdpasim_net", exists=False)
    assert list(step.takes(kernel.host())) == []
    vdpa(kernel)
    assert [item.device for item in step.takes(kernel.host())] == ["v0"]
    made = SetVdpa(name="v0", parent="vdpasim_net", exists=True)
    assert list(made.takes(kernel.host())) == []


@pytest.mark.parametrize("autoprobe", [True, False])
def test_removing_a_vdpa_device_keeps_the_host_from_the_one_that_undoing_makes(
    autoprobe: bool,
) -> None:
    kernel = VdpaKernel()
    vdpa(kernel)
    facts = replace(read_vdpa_facts(kernel.host()), autoprobe=autoprobe)
    verbs = [step.verb for step in plan_vdpa_remove(facts, "v0")]
    assert verbs.count("set-vdpa-autoprobe") == (2 if autoprobe else 0)


def test_a_vdpa_device_of_an_unknown_parent_is_not_removed() -> None:
    kernel = VdpaKernel()
    vdpa(kernel)
    facts = read_vdpa_facts(kernel.host())
    orphans = tuple(replace(device, parent=None) for device in facts.devices)
    with pytest.raises(VfiotoolError, match="parent of v0 is not known"):
        plan_vdpa_remove(replace(facts, devices=orphans), "v0")


@pytest.mark.parametrize(("pairs", "wanted"), [(4, 4), (None, None), ("4", None)])
def test_what_a_removed_vdpa_device_had_is_what_undoing_gives_it(
    pairs: object, wanted: int | None
) -> None:
    kernel = VdpaKernel()
    vdpa(kernel)
    facts = read_vdpa_facts(kernel.host())
    devices = tuple(
        replace(device, config={**(device.config or {}), "max_vqp": pairs})
        for device in facts.devices
    )
    steps = plan_vdpa_remove(replace(facts, devices=devices), "v0")
    (step,) = [step for step in steps if isinstance(step, SetVdpa)]
    assert (step.max_vqp, step.mac) == (wanted, "52:54:00:12:34:56")


def test_a_vdpa_driver_that_is_there_is_not_loaded() -> None:
    kernel = VdpaKernel()
    vdpa(kernel)
    facts = read_vdpa_facts(kernel.host())
    here = plan_vdpa_bind(facts, "v0", "vhost_vdpa")
    assert [step.verb for step in here] == ["bind-driver"]
    away = plan_vdpa_bind(replace(facts, drivers=frozenset()), "v0", "vhost_vdpa")
    assert [step.verb for step in away] == ["load-module", "bind-driver"]


def test_a_value_of_another_type_is_out_of_place_in_a_journal() -> None:
    assert _one_of(1, int) == 1
    assert _one_of(True, bool) is True
    for value, kind in ((True, int), ("1", int), (1, str), (None, int)):
        with pytest.raises(TypeError):
            _one_of(value, kind)


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(VfiotoolError, match="No space"):
        folder.replace("state", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_confirmed_change_is_not_taken_for_one_that_waits(
    journal: tuple[FakeKernel, Journal],
) -> None:
    """Another `confirm` has kept it between the listing and the lock."""
    kernel, log = journal
    log.pending.replace("token", confirming.seal({"x": 1}))
    names = log.pending.names
    log.pending.remove("token")
    object.__setattr__(log.pending, "names", lambda: ["token"])
    try:
        with pytest.raises(VfiotoolError, match="no change waits"):
            confirming.confirm(kernel.host(), log)
    finally:
        object.__setattr__(log.pending, "names", names)


def test_attaching_to_a_change_that_was_kept_already_writes_nothing(
    journal: tuple[FakeKernel, Journal],
) -> None:
    _, log = journal
    confirming.attach(log, "token", 7)
    assert log.pending.names() == []


def test_the_ids_of_vfs_are_facts() -> None:
    facts = read_facts(furnished().host(), [NIC])
    sriov = facts.devices[NIC].sriov
    assert sriov is not None
    assert sriov.vf_device == "10ca"


def test_a_kernel_that_does_not_tell_the_ids_of_vfs_leaves_them_unknown() -> None:
    kernel = furnished()
    kernel._remove(f"{kernel.host().realpath(f'/sys/bus/pci/devices/{NIC}')}/sriov_vf_device")
    sriov = read_facts(kernel.host(), [NIC]).devices[NIC].sriov
    assert sriov is not None and sriov.vf_device is None


def test_a_device_that_is_gone_has_no_driver_to_be_read() -> None:
    host = furnished().host()
    assert read_driver(host, "pci", NIC) == "igb"
    with pytest.raises(NotFound, match=r"0000:7f:00\.0 is not there"):
        read_driver(host, "pci", "0000:7f:00.0")


def test_an_origin_is_forgotten_by_the_goal_that_was_seen_and_by_the_kernels_choice(
    journal: tuple[FakeKernel, Journal],
) -> None:
    kernel, log = journal
    host, identity = kernel.host(), read_pci_identity(kernel.host(), NVME)

    def kept(after: Binding) -> bool:
        log.remember("pci", NVME, identity, Binding("nvme", None))
        step = BindDriver(NVME, Binding("nvme", None), after, identity)
        forget_origins(host, log, [step], hold=True)
        return log.origin("pci", NVME, identity) is not None

    # What was just seen to hold is not read again; what the kernel chose has to be.
    assert kept(Binding("vfio-pci", "vfio-pci"))
    assert not kept(Binding(ANY, None))
    kernel._detach(NVME)
    kernel._attach(NVME, "vfio-pci")
    assert kept(Binding(ANY, None))


def test_an_empty_record_is_named_as_damaged(journal: tuple[FakeKernel, Journal]) -> None:
    kernel, log = journal
    do(kernel.host(), log, counting(NIC, 1))
    (done,) = Path(log.run_folder).glob("boot-*/*.done")
    done.write_bytes(b"")
    with pytest.raises(KernelError, match=r"damaged at its first line"):
        log.history()


def test_an_attribute_that_somebody_else_changed_is_not_overwritten() -> None:
    step = SetVdpaAutoprobe(True, False)
    for text, drifts in ((b"1\n", False), (b"0\n", False), (b"7\n", True)):
        host = Host(MemoryTree({SYS_VDPA_AUTOPROBE: text}, {}), live=True, name="live")
        if drifts:
            with pytest.raises(VfiotoolError, match="7"):
                step.check(host)
        else:
            step.check(host)


def test_an_attribute_that_cannot_be_read_is_there_all_the_same() -> None:
    """Such as those that only take what is written to them."""
    files: dict[str, bytes | int] = {SYS_VDPA_AUTOPROBE: errno.EACCES}
    host = Host(MemoryTree(files, {}), live=True, name="live")
    SetVdpaAutoprobe(True, False).check(host)
    with pytest.raises(VfiotoolError):
        SetVdpaAutoprobe(True, False).check(Host(MemoryTree({}, {}), live=True, name="live"))


def test_a_folder_inside_is_that_of_the_folder_that_was_checked(tmp_path: Path) -> None:
    """And not what somebody has put at its path since."""
    folder = Folder(str(tmp_path / "state"))
    (tmp_path / "state").rename(tmp_path / "moved")
    (tmp_path / "state").mkdir()
    folder.sub("inner").replace("name", b"x")
    assert (tmp_path / "moved" / "inner" / "name").read_bytes() == b"x"
    assert list((tmp_path / "state").iterdir()) == []


def test_an_entry_of_an_unknown_kind_is_damage(journal: tuple[FakeKernel, Journal]) -> None:
    kernel, log = journal
    do(kernel.host(), log, counting(NIC, 1))
    (done,) = Path(log.run_folder).glob("boot-*/*.done")
    lines = done.read_bytes().splitlines(keepends=True)
    lines.insert(-1, seal({"t": "bogus", "n": 0}))
    done.write_bytes(b"".join(lines))
    with pytest.raises(KernelError, match="damaged"):
        log.history()


def test_a_driver_that_is_not_registered_is_said_to_be_none(
    journal: tuple[FakeKernel, Journal],
) -> None:
    kernel, log = journal
    goal = Binding("nosuch", "nosuch")
    step = BindDriver(EDU, Binding(None, None), goal)
    with pytest.raises(KernelError, match="no driver named nosuch is registered"):
        do(kernel.host(), log, lambda host, _: (step,))
    assert "/sys/bus/pci/drivers_probe" not in [path for path, _ in kernel.writes]


def test_a_plan_that_wants_other_locks_each_time_is_given_up(
    journal: tuple[FakeKernel, Journal],
) -> None:
    """What it would write to is not what is locked."""
    kernel, log = journal
    plans = itertools.cycle([binding(EDU), binding(TESTDEV)])
    with pytest.raises(KernelError, match="kept changing"):
        do(kernel.host(), log, lambda host, own: next(plans)(host, own))
    assert kernel.writes == []
