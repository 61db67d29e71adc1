"""Eswitch modes, MSI-X counts and VFs of a function on vfio-pci, on the fake kernel.

No card with an eswitch can be emulated, and the lab's kernels have no netdevsim: what the drivers
demand is modelled in tests/fakes/switch.py after their sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.change.changing import binding, counting, do, run_folder
from tests.fakes.kernel import FAULTS, Fault
from tests.fakes.switch import DEFAULT_MSIX, ICE, MLX, SwitchKernel
from tests.policy.test_plan import HEAD, apply, plan_on
from vfiotool.change.journal import Journal
from vfiotool.change.plans.facts import Facts, read_facts
from vfiotool.change.plans.sriov import plan_vf_count
from vfiotool.change.recover import recover
from vfiotool.change.remarks import remarks
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.state import msix_count, read_msix_count
from vfiotool.change.undo import undo
from vfiotool.errors import Refused, Stuck, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.policy.export import export_policy
from vfiotool.policy.parse import PolicyError, parse_policy


@pytest.fixture
def folder() -> Iterator[str]:
    with run_folder() as path:
        yield path


def sriov(pf: str, vfs: int, *more: str) -> str:
    lines = [f'[[sriov]]\nmatch = {{ address = "{pf}" }}\nvfs = {vfs}', *more]
    return HEAD + "\n".join(lines) + "\n"


def switching(pf: str, count: int, mode: str | None) -> object:
    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        facts = read_facts(host, [pf], journal, eswitch_wanted=True)
        return plan_vf_count(facts, pf, count, eswitch=mode)

    return make


def verbs(kernel: SwitchKernel, text: str) -> list[str]:
    return [
        f"{step.verb} {step.ends()[0]}->{step.ends()[1]}"
        for step in plan_on(kernel.host(), text).steps
    ]


SWITCHDEV = 'eswitch = "switchdev"'


def test_mlx5_makes_its_vfs_first_and_switches_while_they_are_unbound(folder: str) -> None:
    kernel = SwitchKernel()
    before = kernel.state()
    text = sriov(MLX, 2, SWITCHDEV)
    assert verbs(kernel, text) == [
        "set-autoprobe 1->0",
        "set-vf-count 0->2",
        "set-autoprobe 0->1",
        "set-eswitch-mode legacy->switchdev",
        "bind-driver None->*",
        "bind-driver None->*",
    ]
    apply(kernel, text, folder)
    assert kernel.modes[MLX] == "switchdev"
    assert kernel.driver_of(kernel.vf_address(MLX, 1)) == "mlx5_core"
    assert plan_on(kernel.host(), text).steps == ()
    undo(kernel.host(), Journal(kernel.host(), folder))
    assert kernel.state() == before


def test_ice_has_no_vf_while_it_switches(folder: str) -> None:
    kernel = SwitchKernel()
    do(kernel.host(), Journal(kernel.host(), folder), counting(ICE, 3))
    before = kernel.state()
    text = sriov(ICE, 3, SWITCHDEV)
    found = [line for line in verbs(kernel, text) if "count" in line or "eswitch" in line]
    assert found == [
        "set-vf-count 3->0",
        "set-eswitch-mode legacy->switchdev",
        "set-vf-count 0->3",
    ]
    apply(kernel, text, folder)
    assert kernel.modes[ICE] == "switchdev" and kernel.num_vfs(ICE) == 3
    assert kernel.driver_of(kernel.vf_address(ICE, 0)) == "iavf"
    assert plan_on(kernel.host(), text).steps == ()
    undo(kernel.host(), Journal(kernel.host(), folder))
    assert plain(kernel.state()) == plain(before)


def plain(state: dict[object, object]) -> dict[object, object]:
    """Without the addresses that cards give new VFs by chance."""
    return {key: value for key, value in state.items() if not isinstance(key, tuple)}


def test_vfs_that_stay_are_kept_from_their_drivers_while_mlx5_switches(folder: str) -> None:
    kernel = SwitchKernel()
    host, journal = kernel.host(), Journal(kernel.host(), folder)
    do(host, journal, counting(MLX, 2))
    apply(kernel, sriov(MLX, 2, 'vf = [ { index = 1, driver = "vfio-pci" } ]'), folder)
    before = kernel.state()
    text = sriov(MLX, 2, SWITCHDEV)
    assert verbs(kernel, text) == [
        "bind-driver mlx5_core->None",
        "bind-driver vfio-pci->None",
        "set-eswitch-mode legacy->switchdev",
        "bind-driver None->mlx5_core",
        "bind-driver None->vfio-pci",
    ]
    apply(kernel, text, folder)
    drivers = [kernel.driver_of(kernel.vf_address(MLX, index)) for index in (0, 1)]
    assert drivers == ["mlx5_core", "vfio-pci"]
    undo(host, journal)
    assert kernel.state() == before


def test_vfs_without_a_driver_or_out_of_sight_are_not_parked_while_mlx5_switches(
    folder: str,
) -> None:
    kernel = SwitchKernel()
    do(kernel.host(), Journal(kernel.host(), folder), counting(MLX, 2))
    apply(kernel, sriov(MLX, 2, 'vf = [ { index = 1, driver = "none" } ]'), folder)
    facts = read_facts(kernel.host(), [MLX], eswitch_wanted=True)

    def planned(facts: Facts) -> list[str]:
        steps = plan_vf_count(facts, MLX, 2, eswitch="switchdev")
        return [f"{step.verb} {step.ends()[0]}->{step.ends()[1]}" for step in steps]

    switch = "set-eswitch-mode legacy->switchdev"
    assert planned(facts) == ["bind-driver mlx5_core->None", switch, "bind-driver None->mlx5_core"]
    assert planned(replace(facts, devices={MLX: facts.devices[MLX]})) == [switch]


def test_mlx5_in_switchdev_goes_back_to_legacy_for_another_number_of_vfs(folder: str) -> None:
    kernel = SwitchKernel()
    host, journal = kernel.host(), Journal(kernel.host(), folder)
    apply(kernel, sriov(MLX, 2, SWITCHDEV), folder)
    before = kernel.state()
    # Nobody asks for a mode: the card keeps its own.
    do(host, journal, switching(MLX, 4, None))  # type: ignore[arg-type]
    assert kernel.modes[MLX] == "switchdev" and kernel.num_vfs(MLX) == 4
    assert kernel.driver_of(kernel.vf_address(MLX, 3)) == "mlx5_core"
    undo(host, journal)
    assert plain(kernel.state()) == plain(before)
    do(host, journal, switching(MLX, 0, "legacy"))  # type: ignore[arg-type]
    assert kernel.modes[MLX] == "legacy" and kernel.num_vfs(MLX) == 0


def test_a_vf_rule_gives_its_driver_after_the_switch(folder: str) -> None:
    kernel = SwitchKernel()
    text = sriov(MLX, 2, SWITCHDEV, 'vf = [ { index = 0, driver = "vfio-pci" } ]')
    apply(kernel, text, folder)
    drivers = [kernel.driver_of(kernel.vf_address(MLX, index)) for index in (0, 1)]
    assert drivers == ["vfio-pci", None]
    assert plan_on(kernel.host(), text).steps == ()


def test_a_driver_without_eswitch_is_unsupported(folder: str) -> None:
    kernel = SwitchKernel()
    do(kernel.host(), Journal(kernel.host(), folder), lambda *_: ())
    kernel.drivers["ice"].ids = frozenset()
    kernel._detach(ICE)
    with pytest.raises(Unsupported, match="has no eswitch"):
        plan_on(kernel.host(), sriov(ICE, 1, SWITCHDEV))


def test_a_policy_names_modes_that_there_are() -> None:
    with pytest.raises(PolicyError, match="must be one of legacy, switchdev"):
        parse_policy(sriov(MLX, 1, 'eswitch = "both"'))
    with pytest.raises(PolicyError, match="apply driver first"):
        parse_policy(sriov(MLX, 1, SWITCHDEV, 'driver = "vfio-pci"'))
    with pytest.raises(PolicyError, match="is not a UUID"):
        parse_policy(sriov(MLX, 1, 'vf_token = "sesame"'))


def test_export_then_plan_is_empty_with_an_eswitch_and_a_function_on_vfio(folder: str) -> None:
    kernel = SwitchKernel()
    kernel.allow_vfio_vfs()
    apply(kernel, sriov(MLX, 2, SWITCHDEV), folder)
    apply(kernel, sriov(ICE, 2, 'driver = "vfio-pci"'), folder)
    text = export_policy(kernel.host())
    assert plan_on(kernel.host(), text).steps == ()
    assert {'eswitch = "switchdev"', 'driver = "vfio-pci"'} <= set(text.splitlines())


# Every fault at every write, once and for good.

SWEPT = {
    "mlx5": (MLX, 0, SWITCHDEV, 'vf = [ { index = 0, msix = 4, driver = "vfio-pci" } ]'),
    "mlx5 with VFs": (MLX, 2, SWITCHDEV),
    "ice with VFs": (ICE, 2, SWITCHDEV),
    "vfio-pci": (ICE, 2, 'driver = "vfio-pci"'),
}


@pytest.mark.parametrize("name", SWEPT)
def test_every_fault_ends_before_after_or_declared_stuck(name: str) -> None:
    pf, made, *more = SWEPT[name]
    text = sriov(str(pf), 2, *map(str, more))

    def start(folder: str) -> SwitchKernel:
        kernel = SwitchKernel()
        kernel.allow_vfio_vfs()
        if made:
            do(kernel.host(), Journal(kernel.host(), folder), counting(str(pf), int(made)))
        kernel.writes.clear()
        return kernel

    with run_folder() as folder:
        kernel = start(folder)
        before = plain(kernel.state())
        apply(kernel, text, folder)
        after, writes = plain(kernel.state()), len(kernel.writes)
    assert writes >= 6
    for at in range(1, writes + 1):
        for kind in FAULTS:
            for always in (False, True):
                with run_folder() as folder:
                    kernel = start(folder)
                    kernel.faults = (Fault(kind, at, always),)
                    end = {"applied": after, "undone": before}[_attempt(kernel, text, folder)]
                    assert plain(kernel.state()) == end, (at, kind, always)


def _attempt(kernel: SwitchKernel, text: str, folder: str) -> str:
    journal = Journal(kernel.host(), folder)
    try:
        apply(kernel, text, folder)
    except Stuck:
        kernel.clear_faults()
        (one,) = recover(kernel.host(), journal)
        return {"finished": "applied", "undone": "undone"}[one.result]
    except VfiotoolError:
        return "undone"
    return "applied"


# MSI-X


def test_a_vf_is_unbound_while_its_vectors_are_counted_anew(folder: str) -> None:
    kernel = SwitchKernel()
    host, journal = kernel.host(), Journal(kernel.host(), folder)
    do(host, journal, counting(MLX, 2))
    before = kernel.state()
    text = sriov(MLX, 2, "vf = [ { index = 1, msix = 30 } ]")
    assert verbs(kernel, text) == [
        "bind-driver mlx5_core->None",
        f"set-msix-count {DEFAULT_MSIX}->30",
        "bind-driver None->mlx5_core",
    ]
    apply(kernel, text, folder)
    vf = kernel.vf_address(MLX, 1)
    assert read_msix_count(host, vf) == 30
    assert kernel.driver_of(vf) == "mlx5_core"
    # The attribute cannot be read back; the capability can: a plan after it is empty.
    assert plan_on(host, text).steps == ()
    undo(host, journal)
    assert kernel.state() == before


def test_a_looping_or_short_configuration_has_no_vectors() -> None:
    loop = bytearray(256)
    loop[0x06], loop[0x34], loop[0x40], loop[0x41] = 0x10, 0x40, 0x05, 0x40
    assert msix_count(bytes(loop)) is None
    assert msix_count(bytes(64)) is None
    assert msix_count(b"") is None


# VFs of a function on vfio-pci


def test_vfio_pci_makes_vfs_only_where_its_option_is_set(folder: str) -> None:
    kernel = SwitchKernel()
    text = sriov(ICE, 2, 'driver = "vfio-pci"')
    with pytest.raises(Refused, match="enable_sriov is not set") as caught:
        plan_on(kernel.host(), text)
    assert "options vfio-pci enable_sriov=1" in (caught.value.hint or "")
    kernel.allow_vfio_vfs()
    before = kernel.state()
    apply(kernel, text, folder)
    assert kernel.driver_of(ICE) == "vfio-pci"
    # vfio-pci takes the VFs of its functions by itself.
    assert kernel.driver_of(kernel.vf_address(ICE, 0)) == "vfio-pci"
    assert plan_on(kernel.host(), text).steps == ()
    undo(kernel.host(), Journal(kernel.host(), folder))
    assert kernel.state() == before


def test_a_function_that_is_given_away_loses_its_vfs_first(folder: str) -> None:
    kernel = SwitchKernel()
    do(kernel.host(), Journal(kernel.host(), folder), counting(ICE, 2))
    with pytest.raises(Refused, match="enable_sriov is not set"):
        plan_on(kernel.host(), sriov(ICE, 2, 'driver = "vfio-pci"'))
    kernel.allow_vfio_vfs()
    before = kernel.state()
    apply(kernel, sriov(ICE, 1, 'driver = "vfio-pci"'), folder)
    assert kernel.driver_of(ICE) == "vfio-pci" and kernel.num_vfs(ICE) == 1
    undo(kernel.host(), Journal(kernel.host(), folder))
    assert plain(kernel.state()) == plain(before)


def test_vfs_need_a_driver_that_makes_them() -> None:
    with pytest.raises(UsageError, match="cannot have 2 VFs without a driver"):
        plan_on(SwitchKernel().host(), sriov(ICE, 2, 'driver = "none"'))


def test_a_plan_says_that_a_token_will_guard_the_vfs(folder: str) -> None:
    kernel = SwitchKernel()
    kernel.allow_vfio_vfs()
    text = sriov(ICE, 2, 'driver = "vfio-pci"')
    (note,) = remarks(kernel.host(), plan_on(kernel.host(), text).steps)
    assert note.startswith(f"{ICE} is on vfio-pci: its VFs open only with the VF token")
    apply(kernel, text, folder)
    vf = kernel.vf_address(ICE, 1)
    do(kernel.host(), Journal(kernel.host(), folder), binding(vf, driver="none"))
    again = binding(vf)(kernel.host(), None)
    assert len(remarks(kernel.host(), again)) == 1
    assert remarks(kernel.host(), plan_on(kernel.host(), sriov(MLX, 2)).steps) == ()


def test_a_plan_says_who_else_sets_these_vfs() -> None:
    kernel = SwitchKernel()
    claims = [
        "NetworkManager\t/etc/NetworkManager/x.nmconnection\tinterface:eth7\tsriov total-vfs=4",
        "systemd.link\t/etc/systemd/network/9.link\tpath:pci-" + ICE + "\tVFs=2",
        "netplan\t/etc/netplan/1.yaml\tinterface:eth99\tvirtual-function-count: 2",
    ]
    kernel._put("/proc/vfiotool/other-tools", "\n".join(claims).encode())
    host = kernel.host()
    assert remarks(host, plan_on(host, sriov(MLX, 2)).steps) == (
        f"NetworkManager sets the VFs of {MLX} too and may undo this "
        "(sriov total-vfs=4 in /etc/NetworkManager/x.nmconnection)",
    )
    (note,) = remarks(host, plan_on(host, sriov(ICE, 1)).steps)
    assert note.startswith(f"systemd.link sets the VFs of {ICE} too")


def test_vfs_that_stay_through_a_switch_are_no_vfs_to_be_remembered(folder: str) -> None:
    """What a VF had is kept for undoing only where the VF is destroyed."""
    kernel = SwitchKernel()
    apply(kernel, sriov(MLX, 2, SWITCHDEV), folder)
    assert verbs(kernel, sriov(MLX, 2, 'eswitch = "legacy"')) == [
        "bind-driver mlx5_core->None",
        "bind-driver mlx5_core->None",
        "set-eswitch-mode switchdev->legacy",
        "bind-driver None->mlx5_core",
        "bind-driver None->mlx5_core",
    ]
