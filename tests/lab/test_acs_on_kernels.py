"""Our reason for a shared group against the kernel's own grouping, on every function there is."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.blockers_guest import why
from vfiotool.devices.acs import REQUIRED, find_mergers
from vfiotool.devices.config.decode import read_config
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")

ACS_CONTROL = 6


@pytest.fixture(scope="module")
def inventory() -> Inventory:
    return read_inventory(Host.local())


def test_a_merger_is_named_for_exactly_the_functions_that_share_a_group(
    inventory: Inventory,
) -> None:
    host = Host.local()
    members = {
        member.address: len(group.devices) for group in inventory.groups for member in group.devices
    }
    assert max(members.values()) > 1
    wrong = []
    for function in inventory.functions:
        if function.iommu_group is None:
            continue
        mergers = find_mergers(host, function.address, function.path)
        if bool(mergers) != (members[function.address] > 1):
            wrong.append((function.address, members[function.address], mergers))
    assert wrong == []


def shared(inventory: Inventory) -> str:
    """The edu device behind the bridge to conventional PCI."""
    for function in inventory.functions:
        ports = [piece for piece in function.path.split("/") if piece.count(":") == 2]
        if function.vendor == "1234" and len(ports) > 2:
            return function.address
    pytest.skip("this machine has no shared group")


def test_why_names_the_bridge_that_merges(inventory: Inventory) -> None:
    address = shared(inventory)
    function = inventory.by_address[address]
    bridge = function.path.split("/")[-2]
    notes = why(address)[1]["notes"]
    assert f"behind {bridge}, a bridge to conventional PCI, all devices share one identity" in notes


@pytest.fixture
def port(inventory: Inventory) -> Iterator[tuple[str, str, str]]:
    """A function alone behind a root port with ACS: its address and path, and the port's."""
    for function in inventory.functions:
        ports = [piece for piece in function.path.split("/") if piece.count(":") == 2]
        if len(ports) < 2 or find_mergers(Host.local(), function.address, function.path):
            continue
        config = read_config(Host.local(), ports[-2])
        if config is not None and config.find("acs") is not None:
            yield function.address, function.path, ports[-2]
            return
    pytest.skip("no port with ACS on this machine")


@pytest.mark.parametrize(
    ("bit", "name"), [(0, "source_validation"), (2, "request_redirect"), (4, "upstream_forwarding")]
)
def test_a_bit_switched_off_in_a_real_port_is_named(
    port: tuple[str, str, str], bit: int, name: str
) -> None:
    address, path, bridge = port
    config = read_config(Host.local(), bridge)
    assert config is not None
    acs = config.find("acs")
    assert acs is not None
    file = Path(f"/sys/bus/pci/devices/{bridge}/config")
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        at = acs.offset + ACS_CONTROL
        (before,) = struct.unpack("<H", os.pread(descriptor, 2, at))
        assert before >> bit & 1
        os.pwrite(descriptor, struct.pack("<H", before & ~(1 << bit)), at)
        try:
            (merger,) = find_mergers(Host.local(), address, path)
            assert (merger.address, merger.missing) == (bridge, (REQUIRED[name],))
        finally:
            os.pwrite(descriptor, struct.pack("<H", before), at)
    finally:
        os.close(descriptor)
    assert find_mergers(Host.local(), address, path) == ()
