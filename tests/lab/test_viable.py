"""Our `viable` and roles against the kernel's own verdict, in states built by hand.

The kernel answers VFIO_GROUP_GET_STATUS (include/uapi/linux/vfio.h) on a group's node, which is
there while one of its members is on a VFIO driver: so one of them is in every state here.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiotool.devices.iommu import IommuGroup, read_group, read_groups
from vfiotool.host.host import Host

MACHINE = "shared-group"
KERNELS = ("6.1", "6.12", "iommufd")

BRIDGE, EDU, TESTDEV = "0000:01:00.0", "0000:02:01.0", "0000:02:02.0"
PCI = Path("/sys/bus/pci")
VFIO_GROUP_GET_STATUS = 0x3B67
VIABLE = 1

# Drivers that take any function, by what the kernel has; to the kernel all of them but vfio-pci
# and pci-stub are host drivers.
DRIVERS = ("vfio-pci", "pci-stub", "pci-pf-stub", "uio_pci_generic", "shpchp")
# The small kernel has no such host driver; igbvf takes edu there, as a VF whose PF is down. Never
# pci-testdev: its BAR is too small for the registers that igbvf writes.
EDU_ALONE = "igbvf"


def driver_of(address: str) -> str | None:
    link = PCI / "devices" / address / "driver"
    return os.readlink(link).rpartition("/")[2] if link.exists() else None


def put(address: str, driver: str | None) -> bool:
    """Put a function on a driver, or on none; whether it is there now."""
    device = PCI / "devices" / address
    if driver_of(address) == driver:
        return True
    (device / "driver_override").write_text("\n" if driver is None else driver)
    if driver_of(address) is not None:
        (device / "driver" / "unbind").write_text(address)
    if driver is not None:
        (PCI / "drivers_probe").write_text(address)
        (device / "driver_override").write_text("\n")
    return driver_of(address) == driver


@pytest.fixture(autouse=True, scope="module")
def drivers() -> Iterator[tuple[str, ...]]:
    """The drivers that this kernel has. Everything is given back at the end."""
    subprocess.run(
        ["modprobe", "-a", *(name.replace("-", "_") for name in DRIVERS), "vfio_iommu_type1"],
        check=False,
        capture_output=True,
    )
    found = tuple(name for name in DRIVERS if (PCI / "drivers" / name).exists())
    if not {"pci-pf-stub", "uio_pci_generic"} & set(found):
        found += (EDU_ALONE,)
    yield found
    for address in (EDU, TESTDEV, BRIDGE):
        put(address, None)


def kernel_says(group: int) -> bool | None:
    """The kernel's viability flag; None where it has no node to ask."""
    try:
        descriptor = os.open(f"/dev/vfio/{group}", os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        status = bytearray(struct.pack("=II", 8, 0))
        fcntl.ioctl(descriptor, VFIO_GROUP_GET_STATUS, status)
        return bool(struct.unpack("=II", status)[1] & VIABLE)
    finally:
        os.close(descriptor)


def shared_group() -> IommuGroup:
    number = int(os.readlink(PCI / "devices" / EDU / "iommu_group").rpartition("/")[2])
    group = read_group(Host.local(), number)
    assert group is not None
    assert {member.address for member in group.devices} == {BRIDGE, EDU, TESTDEV}
    return group


def test_viable_is_the_kernels_in_every_state(drivers: tuple[str, ...]) -> None:
    wanted = (None, *(name for name in drivers if name != "shpchp"))
    bridges = (None, *(name for name in drivers if name not in ("vfio-pci", EDU_ALONE)))
    compared: dict[tuple[str | None, ...], bool] = {}
    for bridge, edu, testdev in itertools.product(bridges, wanted, wanted):
        if "vfio-pci" not in (edu, testdev) or testdev == EDU_ALONE:
            continue
        # Everything off first: a host driver cannot take a member while the group is held.
        placed = all(put(address, None) for address in (EDU, TESTDEV, BRIDGE))
        assert placed
        put(BRIDGE, bridge)
        put(EDU, edu)
        put(TESTDEV, testdev)
        state = tuple(driver_of(address) for address in (BRIDGE, EDU, TESTDEV))
        group = shared_group()
        verdict = kernel_says(group.id)
        if verdict is None or state in compared:
            continue
        compared[state] = verdict
        assert group.viable == verdict, f"bridge, edu, testdev on {state}"
    print(f"{len(compared)} states: {sum(compared.values())} viable")
    assert len(compared) >= 8
    assert set(compared.values()) == {True, False}


def test_every_driver_here_has_the_role_that_the_kernel_gives_it(drivers: tuple[str, ...]) -> None:
    for driver in drivers:
        put(EDU, None)
        assert put(TESTDEV, "vfio-pci")
        if driver == "vfio-pci" or not put(EDU, driver):
            continue
        group = shared_group()
        role = next(member.role for member in group.devices if member.address == EDU)
        assert role == ("bridge" if kernel_says(group.id) else "host"), driver
    put(EDU, None)


def test_the_command_says_the_same_before_and_after_one_of_two_is_bound() -> None:
    put(EDU, None)
    put(TESTDEV, None)
    assert put(EDU, "vfio-pci")
    for driver in (None, "vfio-pci"):
        assert put(TESTDEV, driver)
        done = subprocess.run(
            [sys.executable, "-m", "vfiotool", "groups", "--json"], capture_output=True, check=True
        )
        groups = json.loads(done.stdout)["groups"]
        asked = 0
        for group in groups:
            verdict = kernel_says(group["id"])
            if verdict is not None:
                asked += 1
                assert group["viable"] == verdict
        assert asked == 1


def test_all_groups_are_read_and_root_ports_do_not_stand_in_the_way() -> None:
    roles = {
        member.driver: member.role
        for group in read_groups(Host.local())
        for member in group.devices
    }
    assert roles["pcieport"] == "bridge"
    assert roles["virtio-pci"] == "host"
