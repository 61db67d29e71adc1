"""Groups: members of every kind, roles, viability."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.memory_host import HostBuilder
from vfiotool.devices.identity import GroupScan, list_groups, parse_facts, read_uevent
from vfiotool.devices.iommu import (
    ReservedRegion,
    is_vfio_driver,
    parse_reserved_regions,
    read_group,
    read_groups,
    role_of,
)
from vfiotool.devices.pci import list_addresses, parse_uevent, read_functions
from vfiotool.host.tree import MemoryTree
from vfiotool.snapshot.load import open_root

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.mark.parametrize(
    ("driver", "role"),
    [
        (None, "unbound"),
        ("vfio-pci", "vfio"),
        ("mlx5_vfio_pci", "vfio"),
        ("nvgrace_gpu_vfio_pci", "vfio"),
        ("vfio-platform", "vfio"),
        ("pcieport", "bridge"),
        ("pci-stub", "bridge"),
        ("pci-pf-stub", "host"),
        ("shpchp", "host"),
        ("nvme", "host"),
    ],
)
def test_a_drivers_role_is_the_kernels(driver: str | None, role: str) -> None:
    assert role_of(driver) == role
    assert driver is None or is_vfio_driver(driver) == (role == "vfio")


def test_one_member_on_a_host_driver_makes_a_group_not_viable() -> None:
    builder = HostBuilder()
    builder.function("0000:01:00.0", driver="vfio-pci", group=3)
    builder.function("0000:01:00.1", driver="snd_hda_intel", group=3)
    builder.function("0000:02:00.0", driver="pcieport", group=4)
    groups = read_groups(builder.host())
    assert [(group.id, group.viable) for group in groups] == [(3, False), (4, True)]
    assert groups[0].type == "DMA"
    assert groups[0].reserved_regions == (ReservedRegion(0xFEE00000, 0xFEEFFFFF, "msi"),)


def test_members_of_other_buses_are_listed_beside_functions() -> None:
    builder = HostBuilder()
    builder.function("0000:01:00.0", group=3)
    platform = "/sys/devices/platform/fd000000.dma"
    builder.member(3, "fd000000.dma", platform)
    builder.link(f"{platform}/driver", "../../../bus/platform/drivers/pl330")
    builder.file(f"{platform}/uevent", "DRIVER=pl330\n")
    group = read_group(builder.host(), 3)
    assert group is not None
    found = [(member.address, member.driver, member.role) for member in group.devices]
    assert found == [("0000:01:00.0", None, "unbound"), ("fd000000.dma", "pl330", "host")]
    assert not group.viable


def test_a_mediated_device_is_a_member_of_its_own_role() -> None:
    builder = HostBuilder()
    path = f"/sys/devices/virtual/mtty/mtty/{UUID}"
    builder.member(5, UUID, path)
    builder.link(f"{path}/driver", "../../../../../bus/mdev/drivers/mtty")
    builder.link(f"/sys/bus/mdev/devices/{UUID}", f"../../../devices/virtual/mtty/mtty/{UUID}")
    builder.file(f"{path}/uevent", "DRIVER=mtty\n")
    group = read_group(builder.host(), 5)
    assert group is not None and group.viable
    assert (group.devices[0].role, group.devices[0].driver) == ("mdev", "mtty")


def test_a_member_that_vanished_is_named_and_holds_nothing_up() -> None:
    builder = HostBuilder()
    builder.function("0000:01:00.0", driver="vfio-pci", group=3)
    builder.link("/sys/kernel/iommu_groups/3/devices/0000:01:00.7", "../../../../devices/gone")
    group = read_group(builder.host(), 3)
    assert group is not None and group.viable
    assert [member.address for member in group.devices] == ["0000:01:00.0", "0000:01:00.7"]
    assert group.devices[1].vendor is None


def test_a_group_that_is_not_there_is_none() -> None:
    assert read_group(HostBuilder().host(), 3) is None


def test_groups_are_in_numeric_order_and_strangers_are_passed_over() -> None:
    builder = HostBuilder()
    for group in (10, 9, 2):
        builder.function(f"0000:0{group % 8}:00.0", group=group)
    builder.file("/sys/kernel/iommu_groups/README", "no group")
    assert [group.id for group in read_groups(builder.host())] == [2, 9, 10]


def test_vfs_with_equal_uevents_keep_their_own_names() -> None:
    builder = HostBuilder()
    for number in range(3):
        builder.function(f"0000:01:00.{number}", driver="iavf", group=number)
    found = [group.devices[0].address for group in read_groups(builder.host())]
    assert found == ["0000:01:00.0", "0000:01:00.1", "0000:01:00.2"]


def test_malformed_windows_are_passed_over() -> None:
    text = "0x10 0x1f direct\nnonsense\n0x20 0x2f\n0x30 0x3f direct-relaxable\n"
    found = parse_reserved_regions(text)
    assert [region.type for region in found] == ["direct", "direct-relaxable"]


@given(st.binary(max_size=300))
def test_any_uevent_gives_facts(data: bytes) -> None:
    assert len(parse_facts(data)) == 5


@given(st.text(max_size=300))
def test_any_windows_are_read(text: str) -> None:
    assert isinstance(parse_reserved_regions(text), tuple)


def test_unreadable_attributes_of_a_group_are_none() -> None:
    builder = HostBuilder().function("0000:01:00.0", group=3)
    builder.file("/sys/kernel/iommu_groups/3/type", 13)
    builder.file("/sys/kernel/iommu_groups/3/reserved_regions", 5)
    assert isinstance(builder.host().tree, MemoryTree)
    group = read_group(builder.host(), 3)
    assert group is not None
    assert (group.type, group.reserved_regions) == (None, ())


@pytest.mark.parametrize("name", ["vfs-enabled", "storage-in-use", "net-in-use", "mdev-parents"])
def test_what_is_put_together_for_uevent_is_what_the_kernel_says_there(name: str) -> None:
    host = open_root(str(HOSTS / name))
    for address in list_addresses(host):
        base = f"/sys/bus/pci/devices/{address}"
        told = parse_uevent((read_uevent(host.tree, base) or b"").decode())
        kernel = parse_uevent(host.read(f"{base}/uevent") or "")
        for side in (told, kernel):
            side["PCI_CLASS"] = f"{int(side['PCI_CLASS'], 16):06x}"
        assert told == {key: kernel[key] for key in kernel if key in told}
        assert set(kernel) - set(told) <= {"PCI_SLOT_NAME"}


def test_no_uevent_is_read_of_a_function_that_has_a_modalias() -> None:
    """Its reader would wait for the device's lock on Linux 6.1."""
    host = open_root(str(HOSTS / "vfs-enabled"))
    read = host.tree.read

    def refuse(path: str) -> bytes:
        assert "/bus/pci/devices/" not in path or not path.endswith("/uevent")
        return read(path)

    host.tree.read = refuse  # type: ignore[method-assign]
    scan = GroupScan(host)
    assert all(scan.members(group) for group in list_groups(host))
    addresses = list_addresses(host)
    assert len(read_functions(host, addresses)) == len(addresses) > 10
