"""What stands is exported, whoever made it; what a policy cannot say is a comment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.change.changing import EDU, NIC, NVME, counting, do, furnished, run_folder
from vfiotool.change.journal import Journal
from vfiotool.devices.mdev import Mdev
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.export import export_policy, policy_of, read_present_state
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.mdev_attributes import parse_matrix, same_assignment
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy


def test_a_device_that_new_id_gave_to_vfio_is_exported_and_in_sync() -> None:
    kernel = furnished()
    kernel._attach(EDU, "vfio-pci")
    text = export_policy(kernel.host())
    assert f'match = {{ address = "{EDU}", id = "1234:11e8" }}' in text
    policy = parse_policy(text)
    assert plan_policy(policy, read_policy_facts(kernel.host(), policy)).steps == ()


def test_an_override_that_has_not_come_to_pass_is_a_comment() -> None:
    kernel = furnished()
    kernel._put(f"/sys/devices/pci0000:00/{NVME}/driver_override", b"vfio-pci\n")
    text = export_policy(kernel.host())
    assert f"# {NVME}: its driver_override is vfio-pci though it is on nvme" in text
    assert parse_policy(text).devices == ()


def test_a_vf_on_vfio_by_other_means_is_exported_with_its_function() -> None:
    kernel = furnished()
    with run_folder() as folder:
        do(kernel.host(), Journal(kernel.host(), folder), counting(NIC, 2))
    kernel._detach(kernel.vf_address(NIC, 1))
    kernel._attach(kernel.vf_address(NIC, 1), "vfio-pci")
    policy = parse_policy(export_policy(kernel.host()))
    (rule,) = policy.sriov
    assert [(vf.index, vf.driver) for vf in rule.vf] == [(0, None), (1, "vfio-pci")]
    assert plan_policy(policy, read_policy_facts(kernel.host(), policy)).steps == ()


def test_a_vfs_link_state_is_a_comment_and_a_vf_without_settings_has_none() -> None:
    kernel = furnished()
    with run_folder() as folder:
        do(kernel.host(), Journal(kernel.host(), folder), counting(NIC, 2))
    state = read_present_state(kernel.host())
    told = (VfSettings(1, vlan=7, link_state=2),)
    text = policy_of(replace(state, settings={NIC: told}))
    assert f"# VF 1 of {NIC}: link state down: no rule says that" in text
    assert f"VF 0 of {NIC}" not in text
    (rule,) = parse_policy(text).sriov
    assert [(vf.index, vf.vlan) for vf in rule.vf] == [(1, 7)]


@pytest.mark.parametrize("missing", ["vendor", "device"])
def test_a_function_without_ids_is_exported_by_its_address_alone(missing: str) -> None:
    kernel = furnished()
    kernel._attach(EDU, "vfio-pci")
    state = read_present_state(kernel.host())
    device = state.facts.devices[EDU]
    ids = {"vendor": device.identity.vendor, "device": device.identity.device, missing: None}
    bare = replace(device, identity=replace(device.identity, **ids))
    facts = replace(state.facts, devices={**state.facts.devices, EDU: bare})
    text = policy_of(replace(state, facts=facts))
    assert f'match = {{ address = "{EDU}" }}' in text
    parse_policy(text)


def test_what_cannot_be_looked_at_is_a_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    from vfiotool.errors import KernelError

    def fail(_: object) -> None:
        raise KernelError("list vDPA devices: EIO\nversion = 2")

    monkeypatch.setattr("vfiotool.policy.export.read_vdpa_facts", fail)
    text = policy_of(read_present_state(furnished().host()))
    assert "# not looked at: vDPA devices: list vDPA devices: EIO?version = 2" in text
    parse_policy(text)


def test_a_device_whose_lock_is_held_is_a_comment_and_the_others_are_exported() -> None:
    kernel = furnished()
    kernel._attach(EDU, "vfio-pci")
    kernel.locked.add(NVME)
    text = export_policy(kernel.host())
    assert f"# not looked at: {NVME}: reading its" in text
    assert f'address = "{EDU}"' in text
    parse_policy(text)


@pytest.mark.parametrize("lost", ["parent", "type"])
def test_an_mdev_of_which_too_little_can_be_read_is_a_comment(lost: str) -> None:
    mdev = Mdev("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "mtty", "mtty-1", None)
    state = replace(read_present_state(furnished().host()), mdevs=(replace(mdev, **{lost: None}),))
    text = policy_of(state)
    assert f"# mdev {mdev.uuid}: its parent or type cannot be read" in text
    assert parse_policy(text).mdevs == ()


def test_an_ap_matrix_is_told_by_what_was_assigned() -> None:
    assert parse_matrix("05.0004\n05.00ab\n06.0004\n06.00ab\n", "00ab\n") == (
        ("assign_adapter", "0x05"),
        ("assign_adapter", "0x06"),
        ("assign_domain", "0x0004"),
        ("assign_domain", "0x00ab"),
        ("assign_control_domain", "0x00ab"),
    )
    assert parse_matrix("05.\n06.\n", "") == (
        ("assign_adapter", "0x05"),
        ("assign_adapter", "0x06"),
    )
    assert parse_matrix(".0004\nrubbish\nzz.1\n", "zz") == (("assign_domain", "0x0004"),)


def test_an_assignment_counts_by_its_number() -> None:
    held = parse_matrix("05.00ab", "")
    assert same_assignment("assign_adapter", "5", held)
    assert same_assignment("assign_domain", "171", held)
    assert not same_assignment("assign_domain", "5", held)
    assert not same_assignment("assign_adapter", "five", held)


def test_settings_of_a_vf_are_said_and_what_no_rule_says_is_a_comment() -> None:
    kernel = furnished()
    with run_folder() as folder:
        do(kernel.host(), Journal(kernel.host(), folder), counting(NIC, 3))
    # Of VF 1 the driver told nothing.
    told = (VfSettings(0, vlan=7, trust=True, link_state=2), VfSettings(2, link_state=0))
    state = replace(read_present_state(kernel.host()), settings={NIC: told})
    text = policy_of(state)
    assert f"# VF 0 of {NIC}: link state down: no rule says that" in text
    assert text.count("link state") == 1
    (rule,) = parse_policy(text).sriov
    assert [(vf.index, vf.vlan, vf.trust) for vf in rule.vf] == [(0, 7, True)]


def test_a_function_that_tells_no_id_is_exported_by_its_address_alone() -> None:
    kernel = furnished()
    kernel._attach(EDU, "vfio-pci")
    state = read_present_state(kernel.host())
    device = state.facts.devices[EDU]
    for identity in (
        replace(device.identity, vendor=None),
        replace(device.identity, device=None),
    ):
        devices = {**state.facts.devices, EDU: replace(device, identity=identity)}
        text = policy_of(replace(state, facts=replace(state.facts, devices=devices)))
        assert f'match = {{ address = "{EDU}" }}' in text
        parse_policy(text)
