"""Addresses, identities, BARs, and functions as sysfs shows them."""

from __future__ import annotations

import errno
from math import isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.memory_host import HostBuilder
from vfiotool.devices.inventory import read_inventory
from vfiotool.devices.pci import (
    Address,
    Link,
    Sriov,
    list_addresses,
    parse_identity,
    parse_resource,
    parse_speed,
    read_function,
    read_functions,
)
from vfiotool.errors import UsageError
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree

PF, VF = "0000:01:00.0", "0000:01:10.2"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("05:01.0", "0000:05:01.0"),
        ("0000:05:01.0", "0000:05:01.0"),
        ("10000:E1:1F.7", "10000:e1:1f.7"),
    ],
)
def test_addresses_are_read_short_long_and_in_big_domains(text: str, whole: str) -> None:
    assert str(Address.parse(text)) == whole


@pytest.mark.parametrize("text", ["", "05:01", "5:1.0", "05:21.0", "05:01.8", "05:01.0\n", "../x"])
def test_what_is_no_address_is_bad_usage(text: str) -> None:
    with pytest.raises(UsageError):
        Address.parse(text)


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7))
def test_an_address_survives_being_written(
    domain: int, bus: int, device: int, function: int
) -> None:
    address = Address(domain, bus, device, function)
    assert Address.parse(str(address)) == address


def test_functions_are_listed_in_bus_order_with_domains_above_ffff_last() -> None:
    builder = HostBuilder()
    for address in ("10000:00:00.0", "0000:ff:00.0", "ffff:00:00.0", "0000:05:01.0"):
        builder.function(address)
    builder.link("/sys/bus/pci/devices/no address", "../../../devices/x")
    assert list_addresses(builder.host()) == [
        "0000:05:01.0",
        "0000:ff:00.0",
        "ffff:00:00.0",
        "10000:00:00.0",
    ]


def test_an_identity_is_lower_case_and_padded() -> None:
    identity = parse_identity(PF, "DRIVER=edu\nPCI_CLASS=FF00\nPCI_ID=8086:C9\nnonsense\n")
    assert (identity.vendor, identity.device, identity.class_code) == ("8086", "00c9", "00ff00")
    assert (identity.driver, identity.subsystem_vendor) == ("edu", None)


def test_a_value_cannot_begin_a_line_of_its_own() -> None:
    # Found by fuzzing: str.splitlines() also splits at these.
    for separator in "\x0b\x0c\x1c\x85\u2028":
        identity = parse_identity(PF, f"OF_NAME=x{separator}PCI_ID=8086:0001\n")
        assert identity.vendor is None


@given(st.text(max_size=200))
def test_any_uevent_gives_an_identity(text: str) -> None:
    assert parse_identity(PF, text).address == PF


@given(st.text(max_size=400))
def test_any_resource_file_gives_regions(text: str) -> None:
    assert all(region.size > 0 for region in parse_resource(text))


@given(st.one_of(st.text(max_size=40), st.floats().map(str)))
def test_any_link_speed_is_a_number_that_json_has_or_none(text: str) -> None:
    speed = parse_speed(text)
    assert speed is None or isfinite(speed)


def test_unset_malformed_and_foreign_resources_are_passed_over() -> None:
    unset = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    text = (
        "0x00000000fe000000 0x00000000fe01ffff 0x0000000000040200\n"
        + unset
        + "0x000000000000c000 0x000000000000c01f 0x0000000000040101\n"
        + "not three numbers\n"
        + "0x0000004000000000 0x00000040ffffffff 0x000000000014220c\n"
        + unset
        + "0x00000000fd000000 0x00000000fd00ffff 0x0000000000046200\n"
        + "0x0000004100000000 0x0000004100000fff 0x0000000000140204\n"
    )
    found = [(r.index, r.size, r.kind, r.prefetchable, r.bits) for r in parse_resource(text)]
    assert found == [
        (0, 0x20000, "mem", False, 32),
        (2, 0x20, "io", False, 32),
        (4, 1 << 32, "mem", True, 64),
        (6, 0x10000, "mem", True, 32),
    ]


def whole_host() -> HostBuilder:
    builder = HostBuilder()
    builder.function(
        PF,
        driver="igb",
        group=7,
        attributes={
            "driver_override": "(null)\n",
            "revision": "0x01\n",
            "numa_node": "-1\n",
            "sriov_totalvfs": "7\n",
            "sriov_numvfs": "2\n",
            "sriov_drivers_autoprobe": "0\n",
            "reset_method": "flr bus\n",
            "current_link_speed": "Unknown\n",
            "current_link_width": "0\n",
            "max_link_speed": "16.0 GT/s PCIe\n",
            "max_link_width": "255\n",
            "power_state": "D3hot\n",
            "d3cold_allowed": "1\n",
            "label": "Onboard LAN\n",
        },
        links={"virtfn0": "../0000:01:10.0", "virtfn1": f"../{VF}", "virtfnX": "../nothing"},
    )
    builder.function(VF, group=9, links={"physfn": f"../{PF}"})
    return builder


def test_a_function_is_read_with_all_its_attributes() -> None:
    function = read_function(whole_host().host(), PF)
    assert function is not None
    assert function.sriov == Sriov(total_vfs=7, num_vfs=2, autoprobe=False)
    assert function.link == Link(None, None, 16.0, None)
    assert function.reset_methods == ("flr", "bus")
    assert (function.iommu_group, function.numa_node, function.revision) == (7, None, "01")
    assert (function.driver, function.driver_override) == ("igb", None)
    assert (function.power_state, function.d3cold_allowed) == ("D3hot", True)
    assert function.label == "Onboard LAN"


def test_a_vf_knows_its_pf_and_its_index() -> None:
    function = read_function(whole_host().host(), VF)
    assert function is not None
    assert (function.physfn, function.vf_index) == (PF, 1)


def test_boot_vga_is_read_for_displays_alone() -> None:
    builder = HostBuilder()
    builder.function(PF, class_code="30000", attributes={"boot_vga": "1\n"})
    function = read_function(builder.host(), PF)
    assert function is not None and function.boot_vga is True


def test_unreadable_and_nonsensical_attributes_are_none_and_the_rest_is_read() -> None:
    builder = whole_host()
    base = f"/sys/devices/pci0000:00/{PF}"
    for name in ("revision", "driver_override", "resource", "reset_method", "sriov_numvfs"):
        builder.file(f"{base}/{name}", errno.EIO)
    for name in ("numa_node", "d3cold_allowed", "current_link_width"):
        builder.file(f"{base}/{name}", "\x1b[31mred\n")
    function = read_function(builder.host(), PF)
    assert function is not None
    assert (function.revision, function.driver_override, function.reset_methods) == (None, None, ())
    assert (function.numa_node, function.d3cold_allowed) == (None, None)
    assert function.sriov == Sriov(total_vfs=7, num_vfs=None, autoprobe=False)
    assert function.power_state == "D3hot"


class VanishingTree(MemoryTree):
    """A tree from which one function goes away after so many reads of it."""

    reads_left = 3

    def read(self, path: str) -> bytes:
        if PF in path:
            self.reads_left -= 1
            if self.reads_left < 0:
                raise OSError(errno.ENODEV, "No such device", path)
        return super().read(path)


@pytest.mark.parametrize("reads", range(20))
def test_a_function_that_vanishes_while_it_is_read_harms_no_other(reads: int) -> None:
    builder = whole_host()
    tree = VanishingTree(builder.files, builder.links)
    tree.reads_left = reads
    inventory = read_inventory(Host(tree, live=False, name="test"))
    assert VF in inventory.by_address
    assert {group.id for group in inventory.groups} == {7, 9}


def test_functions_that_are_gone_are_left_out() -> None:
    found = read_functions(whole_host().host(), ["0000:0f:00.0", VF])
    assert [function.address for function in found] == [VF]
