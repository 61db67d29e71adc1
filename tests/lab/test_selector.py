"""Selectors on a running host: each way to name a device leads to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vfiotool.devices.selector import path_of, resolve, resolve_all
from vfiotool.errors import Ambiguous, NotFound
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")

PF, DISK = "0000:01:00.0", "0000:03:00.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"


def test_serial_number_tells_twins_apart() -> None:
    host = Host.local()
    assert resolve(host, "serial:lab-nvme-0") == PF
    assert resolve(host, "serial:lab-nvme-1") == DISK
    with pytest.raises(Ambiguous) as caught:
        resolve(host, "id:1b36:0010")
    assert PF in caught.value.message and DISK in caught.value.message


def test_a_disk_leads_to_its_controller_through_partitions_and_volumes() -> None:
    host = Host.local()
    disks = {
        name: found
        for name in host.listdir("/sys/class/block")
        if name.startswith("nvme") and "c" not in name
        for found in [resolve_all(host, f"block:{name}")]
    }
    assert sorted(disks.values()) == [[PF], [DISK]]
    subprocess.run(["modprobe", "dm-mod"], check=True)
    name = next(name for name, found in disks.items() if found == [DISK])
    subprocess.run(
        ["dmsetup", "create", "--noudevsync", "layer", "--table", f"0 2048 linear /dev/{name} 0"],
        check=True,
    )
    try:
        dm = next(p.name for p in Path("/sys/class/block").glob("dm-*"))
        assert resolve(host, f"block:{dm}") == DISK
    finally:
        subprocess.run(["dmsetup", "remove", "--noudevsync", "layer"], check=True)


def test_a_vf_is_named_by_its_physical_function_and_index() -> None:
    host = Host.local()
    numvfs = Path(f"/sys/bus/pci/devices/{PF}/sriov_numvfs")
    with pytest.raises(NotFound):
        resolve(host, f"vf:{PF}/1")
    numvfs.write_text("2")
    try:
        wanted = Path(f"/sys/bus/pci/devices/{PF}/virtfn1").resolve().name
        assert resolve(host, f"vf:{PF}/1") == wanted
        assert resolve(host, "vf:serial:lab-nvme-0/1") == wanted
    finally:
        numvfs.write_text("0")


def test_the_path_of_every_function_names_it_alone() -> None:
    host = Host.local()
    for entry in Path("/sys/bus/pci/devices").iterdir():
        assert resolve(host, f"path:{path_of(host, entry.name)}") == entry.name


def test_a_slot_names_what_is_plugged_into_it() -> None:
    host = Host.local()
    named = 0
    for slot in Path("/sys/bus/pci/slots").iterdir():
        place = (slot / "address").read_text().strip()
        there = sorted(
            entry.name
            for entry in Path("/sys/bus/pci/devices").iterdir()
            if entry.name.startswith(f"{place}.")
        )
        if there:
            assert resolve_all(host, f"slot:{slot.name}") == there
            named += 1
    assert named or not list(Path("/sys/bus/pci/slots").iterdir())


def test_an_interface_leads_to_its_card() -> None:
    host = Host.local()
    cards = 0
    for entry in Path("/sys/class/net").iterdir():
        device = entry / "device"
        if device.exists() and device.resolve().parent.name.startswith("0000:"):
            assert resolve(host, f"net:{entry.name}") == device.resolve().name
            cards += 1
    if not cards:
        pytest.skip("this kernel or QEMU has no igb")


def test_a_mediated_device_is_named_by_its_uuid() -> None:
    host = Host.local()
    create = Path("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create")
    if not create.exists():
        pytest.skip("this kernel has no mtty")
    create.write_text(UUID)
    try:
        assert resolve(host, UUID.upper()) == UUID
    finally:
        Path(f"/sys/bus/mdev/devices/{UUID}/remove").write_text("1")
    with pytest.raises(NotFound):
        resolve(host, UUID)
