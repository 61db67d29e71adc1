"""vDPA: what netlink's attributes mean, plans and steps on a kernel in memory, every fault."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.change.changing import run_folder
from tests.fakes.kernel import FAULTS, Fault
from tests.fakes.vdpa import FAMILY, VdpaKernel
from vfiotool.change.apply import change
from vfiotool.change.journal import Journal
from vfiotool.change.plans.vdpa import (
    plan_vdpa_add,
    plan_vdpa_bind,
    plan_vdpa_remove,
    plan_vdpa_set,
)
from vfiotool.change.plans.vdpa_facts import read_vdpa_facts
from vfiotool.change.recover import recover
from vfiotool.change.steps.base import Step
from vfiotool.change.undo import undo
from vfiotool.cli.main import main
from vfiotool.devices.vdpa import (
    VdpaSettings,
    check_name,
    delete_request,
    new_request,
    parse_config,
    parse_mac,
    parse_parent,
    parse_parent_attributes,
    read_counters,
    read_devices,
    read_parents,
)
from vfiotool.devices.virtio_features import class_names, feature_names
from vfiotool.errors import NotFound, Refused, Stuck, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree
from vfiotool.netlink.codec import Message, iterate_attributes, parse_attributes, string, u16, u64
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy

MAC = "52:54:00:12:34:56"
OTHER_MAC = "52:54:00:65:43:21"


def attributes(*parts: bytes) -> dict[int, bytes]:
    return parse_attributes(b"".join(parts))


# What the attributes mean


def test_the_link_status_is_read_though_it_comes_wider_than_declared() -> None:
    for status in (u16(11, 1), struct.pack("=HHBxxx", 5, 11, 1)):
        found = parse_config(1, attributes(status))
        assert found is not None and found["link"] == "up" and found["link_announce"] is False


def test_attribute_21_is_a_disks_capacity_and_nothing_of_a_network_device() -> None:
    both = attributes(u64(21, 0x300000020), u16(13, 1500))
    assert parse_config(2, both) == {"capacity_sectors": 0x300000020}
    assert parse_config(1, both) == {"mtu": 1500}


def test_a_class_without_configuration_has_none() -> None:
    assert parse_config(26, attributes(u64(20, 1))) is None
    assert parse_config(None, {}) is None and parse_config(1, {}) is None


def test_flags_of_a_disk_are_booleans_and_ruled_out_fields_are_left_out() -> None:
    found = parse_config(2, attributes(u64(21, 8), struct.pack("=HHBxxx", 5, 35, 1)))
    assert found == {"capacity_sectors": 8, "read_only": True}


def test_several_classes_leave_class_features_unnamed() -> None:
    parent = parse_parent_attributes(
        attributes(string(2, "vduse"), u64(3, 1 << 1 | 1 << 2), u64(16, 1 << 9))
    )
    assert parent is not None
    assert parent.classes == ("net", "block") and parent.features == ("bit-9",)


def test_unknown_classes_and_bits_have_a_name_all_the_same() -> None:
    assert class_names(1 << 60) == ("type-60",)
    assert feature_names(1 << 50 | 1 << 32, 1) == ("VERSION_1", "bit-50")


@given(st.binary(max_size=300), st.sampled_from([1, 2, 26, None]))
def test_whatever_the_kernel_sends_is_read_or_left(data: bytes, kind: int | None) -> None:
    found = parse_attributes(data)
    parse_config(kind, found)
    parse_parent_attributes(found)


# Requests


def test_a_new_request_carries_what_was_asked_for() -> None:
    request = new_request(FAMILY, "v0", "pci/0000:01:00.2", VdpaSettings(MAC, 1400, 2, 1 << 32))
    assert request.type == FAMILY and request.payload[:2] == b"\x03\x01"
    found = dict(iterate_attributes(request.payload[4:]))
    assert found[1] == b"pci\0" and found[2] == b"0000:01:00.2\0" and found[4] == b"v0\0"
    assert found[10] == parse_mac(MAC) and len(found[10]) == 6
    assert found[13] == struct.pack("=H", 1400) and found[12] == struct.pack("=H", 2)
    assert found[20] == struct.pack("=Q", 1 << 32)
    assert "v0" in request.what


def test_hostile_names_are_refused() -> None:
    for name in ("", "..", "../x", "a/b", "x" * 65, "a\nb", "a b", "-x", "a..b"):
        with pytest.raises(UsageError):
            check_name(name)
        with pytest.raises(UsageError):
            delete_request(FAMILY, name)
    for parent in ("", "/x", "a/b/c", "pci/../x", "x\0", "pci/"):
        with pytest.raises(UsageError):
            parse_parent(parent)


@pytest.mark.parametrize(
    "settings",
    [
        VdpaSettings(mac="52:54"),
        VdpaSettings(mtu=0),
        VdpaSettings(mtu=70000),
        VdpaSettings(max_vqp=0),
        VdpaSettings(features=1 << 64),
    ],
)
def test_values_that_cannot_be_are_refused(settings: VdpaSettings) -> None:
    with pytest.raises(UsageError):
        new_request(FAMILY, "v0", "vdpasim_net", settings)


# Reading


def test_a_root_that_does_not_run_shows_what_sysfs_has() -> None:
    tree = MemoryTree(
        {
            "/sys/devices/v0/driver_override": b"vhost_vdpa\n",
            "/sys/devices/v0/vhost-vdpa-3/dev": b"510:3\n",
            "/sys/devices/v1/driver_override": b"(null)\n",
            "/sys/devices/v1/virtio5/net/eth7/mtu": b"1500\n",
        },
        {
            "/sys/bus/vdpa/devices/v0": "../../../devices/v0",
            "/sys/bus/vdpa/devices/v1": "../../../devices/v1",
            "/sys/devices/v0/driver": "../../bus/vdpa/drivers/vhost_vdpa",
            "/sys/devices/v1/driver": "../../bus/vdpa/drivers/virtio_vdpa",
        },
    )
    host = Host(tree, live=False, name="snapshot")
    first, second = read_devices(host)
    assert first.node == "/dev/vhost-vdpa-3" and first.driver == first.driver_override
    assert second.interfaces == ("eth7",) and second.driver_override is None
    assert first.parent is None and first.type is None and first.config is None
    assert read_parents(host) == ()


def test_a_kernel_without_vdpa_says_which_option(capsys: pytest.CaptureFixture[str]) -> None:
    class Mute(VdpaKernel):
        def ask_netlink(self, request: Any, timeout_s: float) -> list[Message]:
            from vfiotool.errors import KernelError

            raise KernelError("look up netlink family vdpa", errno_name="ENOENT")

    with pytest.raises(Unsupported) as caught:
        read_parents(Mute().host())
    assert "CONFIG_VDPA" in (caught.value.hint or "")


def test_a_device_that_vanishes_before_its_configuration_is_read() -> None:
    kernel = VdpaKernel()
    kernel._new("v0", {2: b"vdpasim_net\0"})
    config = kernel._config
    kernel._config = lambda name: (kernel._delete(name), config(name))[1]  # type: ignore[method-assign]
    [device] = read_devices(kernel.host())
    assert device.name == "v0" and device.config is None and device.driver is None


# Plans and steps on a kernel in memory

Make = Callable[[Host], tuple[Step, ...]]


def do(kernel: VdpaKernel, folder: str, make: Make) -> Journal:
    host = kernel.host()
    journal = Journal(host, folder)
    change(host, journal, "vdpa", lambda: make(host), timeout_s=5)
    return journal


def adding(
    name: str = "v0", parent: str = "vdpasim_net", driver: str | None = "vhost_vdpa"
) -> Make:
    settings = VdpaSettings(MAC, 1400) if parent == "vdpasim_net" else VdpaSettings()
    return lambda host: plan_vdpa_add(read_vdpa_facts(host), name, parent, driver, settings)


def test_a_device_for_a_vm_is_never_offered_to_the_host() -> None:
    kernel = VdpaKernel()
    seen: list[str | None] = []
    kernel.before_write = lambda *_: seen.append(kernel.vdpa_driver("v0"))
    with run_folder() as folder:
        do(kernel, folder, adding())
    assert kernel.vdpa_driver("v0") == "vhost_vdpa" and "virtio_vdpa" not in seen
    assert kernel.vdpa_state()["autoprobe"] == b"1\n"


def test_what_is_there_needs_no_step() -> None:
    kernel = VdpaKernel()
    with run_folder() as folder:
        do(kernel, folder, adding())
    assert adding()(kernel.host()) == ()
    [bind] = adding(driver="virtio_vdpa")(kernel.host())
    assert bind.ends() == ("vhost_vdpa", "virtio_vdpa")


def test_undo_of_each_change_gives_the_state_before() -> None:
    kernel = VdpaKernel()
    with run_folder() as folder:
        empty = kernel.vdpa_state()
        journal = do(kernel, folder, adding())
        made = kernel.vdpa_state()
        do(kernel, folder, lambda host: plan_vdpa_bind(read_vdpa_facts(host), "v0", "virtio-vdpa"))
        assert kernel.vdpa_driver("v0") == "virtio_vdpa"
        undo(kernel.host(), journal)
        assert kernel.vdpa_state() == made
        do(kernel, folder, lambda host: plan_vdpa_remove(read_vdpa_facts(host), "v0"))
        assert kernel.vdpa_state() == empty
        undo(kernel.host(), journal)
        assert kernel.vdpa_state() == made
        undo(kernel.host(), journal)
        assert kernel.vdpa_state() == empty


def test_another_mac_address_is_set_once_and_undone() -> None:
    kernel = VdpaKernel()
    with run_folder() as folder:
        do(kernel, folder, adding())
        made = kernel.vdpa_state()

        def make(host: Host) -> tuple[Step, ...]:
            return plan_vdpa_set(read_vdpa_facts(host), "v0", OTHER_MAC.upper())

        journal = do(kernel, folder, make)
        assert read_devices(kernel.host())[0].config is not None
        assert kernel.made["v0"][1] == parse_mac(OTHER_MAC)
        assert make(kernel.host()) == ()
        undo(kernel.host(), journal)
        assert kernel.vdpa_state() == made


def test_counters_are_read_by_queue_and_the_kernels_words_are_kept() -> None:
    kernel = VdpaKernel()
    with run_folder() as folder:
        do(kernel, folder, adding(driver="virtio_vdpa"))
        do(kernel, folder, adding(name="b0", parent="vdpasim_blk", driver="virtio_vdpa"))
    host = kernel.host()
    disk, card = read_devices(host)
    assert [(item.queue, dict(item.counters)) for item in read_counters(host, card)] == [
        (0, {"packets": 7, "bytes": 900}),
        (1, {"packets": 8, "bytes": 900}),
    ]
    with pytest.raises(Unsupported, match="no statistics"):
        read_counters(host, disk)
    kernel._detach_vdpa("v0")
    with pytest.raises(VfiotoolError, match="feature negotiation not complete"):
        read_counters(host, card)


def test_refusals() -> None:
    kernel = VdpaKernel()
    with run_folder() as folder:
        do(kernel, folder, adding())
    facts = read_vdpa_facts(kernel.host())
    with pytest.raises(NotFound, match="vdpasim_blk"):
        plan_vdpa_add(facts, "v1", "nowhere")
    with pytest.raises(Refused, match="vdpasim_net"):
        plan_vdpa_add(facts, "v0", "vdpasim_blk")
    with pytest.raises(Unsupported, match="mac"):
        plan_vdpa_add(facts, "v1", "vdpasim_blk", None, VdpaSettings(mac=MAC))
    # What a device was given when it was made stays: another wish is not in sync.
    assert plan_vdpa_add(facts, "v0", "vdpasim_net", None, VdpaSettings(MAC.upper(), 1400)) == ()
    with pytest.raises(Refused, match="with mtu 1400 and not 9000"):
        plan_vdpa_add(facts, "v0", "vdpasim_net", None, VdpaSettings(MAC, 9000))
    with pytest.raises(UsageError, match="driver"):
        plan_vdpa_bind(facts, "v0", "nvme")
    with pytest.raises(NotFound):
        plan_vdpa_remove(facts, "v9")
    with pytest.raises(UsageError, match="MAC"):
        plan_vdpa_set(facts, "v0", "52:54")
    plain = replace(facts.devices[0], config={"capacity": 1})
    without = replace(facts, devices=(plain,))
    with pytest.raises(Unsupported, match="has no MAC address"):
        plan_vdpa_set(without, "v0", MAC)


POLICY = """version = 1
[[vdpa]]
name = "n0"
parent = "vdpasim_net"
driver = "vhost_vdpa"
mac = "52:54:00:12:34:56"
[[vdpa]]
name = "b0"
parent = "vdpasim_blk"
driver = "virtio_vdpa"
[[vdpa]]
name = "b1"
parent = "vdpasim_blk"
"""


def applying(host: Host) -> tuple[Step, ...]:
    policy = parse_policy(POLICY, "p")
    return plan_policy(policy, read_policy_facts(host, policy)).steps


def test_a_policy_is_in_sync_after_it_was_applied() -> None:
    kernel = VdpaKernel()
    with run_folder() as folder:
        do(kernel, folder, applying)
        assert kernel.vdpa_driver("n0") == "vhost_vdpa"
        assert kernel.vdpa_driver("b0") == kernel.vdpa_driver("b1") == "virtio_vdpa"
        assert applying(kernel.host()) == ()


def existing(make: Make) -> tuple[Callable[[], VdpaKernel], Make]:
    def furnished() -> VdpaKernel:
        kernel = VdpaKernel()
        with run_folder() as folder:
            do(kernel, folder, adding())
        kernel.writes.clear()
        return kernel

    return furnished, make


CHANGES: dict[str, tuple[Callable[[], VdpaKernel], Make]] = {
    "add": (VdpaKernel, adding()),
    "add for the host": (VdpaKernel, adding(parent="vdpasim_blk", driver=None)),
    "bind": existing(lambda host: plan_vdpa_bind(read_vdpa_facts(host), "v0", "virtio_vdpa")),
    "remove": existing(lambda host: plan_vdpa_remove(read_vdpa_facts(host), "v0")),
    "set": existing(lambda host: plan_vdpa_set(read_vdpa_facts(host), "v0", OTHER_MAC)),
    "policy": (VdpaKernel, applying),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_fault_ends_in_before_or_after_or_declared_stuck(name: str) -> None:
    make_kernel, make = CHANGES[name]
    kernel = make_kernel()
    before = kernel.vdpa_state()
    with run_folder() as folder:
        do(kernel, folder, make)
    after, writes = kernel.vdpa_state(), len(kernel.writes)
    assert before != after and writes
    cases = 0
    for at in range(1, writes + 1):
        for kind in FAULTS:
            for always in (False, True):
                kernel = make_kernel()
                kernel.faults = (Fault(at, kind, always),)
                with run_folder() as folder:
                    outcome, journal = "applied", Journal(kernel.host(), folder)
                    try:
                        do(kernel, folder, make)
                    except Stuck:
                        outcome = "stuck"
                    except VfiotoolError:
                        outcome = "rolled back"
                    where = f"{name}: {kind} at write {at}{' always' * always}: {outcome}"
                    if outcome != "stuck":
                        expected = after if outcome == "applied" else before
                        assert kernel.vdpa_state() == expected, where
                    kernel.clear_faults()
                    results = recover(kernel.host(), journal)
                    assert len(results) == (outcome == "stuck"), where
                    assert kernel.vdpa_state() in (before, after), where
                cases += 1
    print(f"{name}: {cases} cases over {writes} writes")


# The command line


def test_json_of_a_root_that_does_not_run(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sys/bus/vdpa/devices").mkdir(parents=True)
    assert main(["--root", str(tmp_path), "--json", "vdpa", "list"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format_version": "1.0", "vdpas": []}
    assert main(["--root", str(tmp_path), "--json", "vdpa", "parents"]) == 0
    assert json.loads(capsys.readouterr().out)["parents"] == []
    for words in (["add", "v0", "vdpasim_net"], ["add", "v0", "vdpasim_net", "--features", "x"]):
        assert main(["--root", str(tmp_path), "--json", "vdpa", *words]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"
