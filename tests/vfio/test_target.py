"""From names to targets, and what is said when there is nothing to open; on laid-out hosts."""

from __future__ import annotations

import json

import pytest

from vfiotool.cli.drive.opening import number, region_number
from vfiotool.cli.main import main
from vfiotool.errors import NotFound, Refused, Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree
from vfiotool.vfio import Device, find, open_space
from vfiotool.vfio.target import bus_windows

EDU = "0000:00:01.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
DEVICE = f"/sys/devices/pci0000:00/{EDU}"


def laid_out(
    *nodes: str, driver: str | None = "vfio-pci", group: str | None = "7", live: bool = True
) -> Host:
    links = {f"/sys/bus/pci/devices/{EDU}": f"../../../devices/pci0000:00/{EDU}"}
    if driver:
        links[f"{DEVICE}/driver"] = f"../../../bus/pci/drivers/{driver}"
    if group:
        links[f"{DEVICE}/iommu_group"] = f"../../../kernel/iommu_groups/{group}"
    files: dict[str, bytes | int] = {f"{DEVICE}/vendor": b"0x1234\n"}
    files.update(dict.fromkeys(nodes, b""))
    folders = [f"{DEVICE}/vfio-dev/vfio3"] if "/dev/vfio/devices/vfio3" in nodes else []
    return Host(MemoryTree(files, links, folders), live=live, name="a laid-out host")


def test_short_and_long_addresses_name_the_same_device() -> None:
    host = laid_out("/dev/vfio/7", "/dev/vfio/vfio", "/dev/vfio/devices/vfio3", "/dev/iommu")
    target = find("00:01.0", host)
    assert target == find(EDU, host)
    assert (target.name, target.bus, target.group, target.driver) == (EDU, "pci", "7", "vfio-pci")
    assert target.group_node == "/dev/vfio/7"
    assert target.cdev_node == "/dev/vfio/devices/vfio3"
    assert not target.noiommu


@pytest.mark.parametrize(
    "name", ["", "edu", "../../etc", "0000:00:01.8", "0000:00:20.0", UUID + "0", "0" * 36]
)
def test_what_is_no_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="neither a PCI address nor"):
        find(name, laid_out())


@pytest.mark.parametrize("name", ["0000:00:02.0", UUID])
def test_what_is_not_there_is_not_found(name: str) -> None:
    with pytest.raises(NotFound) as caught:
        find(name, laid_out())
    assert caught.value.device == name
    assert "vfiotool" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("driver", "group", "says", "hint"),
    [
        ("nvme", "7", "is on driver nvme, which is not a VFIO driver", f"vfiotool bind {EDU}"),
        (None, "7", "is on no driver", f"vfiotool bind {EDU}"),
        ("nvme", None, "in no IOMMU group", "vfiotool doctor"),
    ],
)
def test_a_device_that_is_not_on_vfio_is_refused_with_the_command(
    driver: str | None, group: str | None, says: str, hint: str
) -> None:
    with pytest.raises(Refused, match=says) as caught:
        Device.open(EDU, host=laid_out(driver=driver, group=group))
    assert caught.value.hint == hint
    assert caught.value.exit_code == 4


def test_a_group_without_an_iommu_is_opened_only_by_name() -> None:
    host = laid_out("/dev/vfio/noiommu-7", "/dev/vfio/vfio")
    target = find(EDU, host)
    assert target.noiommu and target.group_node == "/dev/vfio/noiommu-7"
    for backend in ("auto", "type1", "iommufd"):
        with pytest.raises(Unsupported, match="no-IOMMU group"):
            open_space(target, backend, host)


def test_a_mediated_device_s_group_is_no_noiommu_group_whatever_its_name() -> None:
    folder = f"/sys/devices/virtual/mtty/mtty/{UUID}"
    links = {
        f"/sys/bus/mdev/devices/{UUID}": f"../../../devices/virtual/mtty/mtty/{UUID}",
        f"{folder}/iommu_group": "../../../../../kernel/iommu_groups/4",
    }
    files: dict[str, bytes | int] = {
        f"{folder}/uevent": b"",
        "/sys/kernel/iommu_groups/4/name": b"vfio-noiommu\n",
        "/dev/vfio/4": b"",
    }
    host = Host(MemoryTree(files, links), live=True, name="a laid-out host")
    target = find(UUID.upper(), host)
    assert (target.bus, target.group_node, target.noiommu) == ("mdev", "/dev/vfio/4", False)


def test_a_platform_device_is_found_by_its_name_and_its_kind_is_told() -> None:
    name = "fff51000.ethernet"
    links = {
        f"/sys/bus/platform/devices/{name}": f"../../../devices/platform/{name}",
        f"/sys/devices/platform/{name}/driver": "../../../bus/platform/drivers/vfio-platform",
        f"/sys/devices/platform/{name}/iommu_group": "../../../kernel/iommu_groups/26",
    }
    files: dict[str, bytes | int] = {
        f"/sys/devices/platform/{name}/uevent": b"",
        "/dev/vfio/26": b"",
    }
    host = Host(MemoryTree(files, links), live=True, name="a laid-out host")
    target = find(name, host)
    assert (target.bus, target.driver, target.group) == ("platform", "vfio-platform", "26")
    assert target.group_node == "/dev/vfio/26"
    with pytest.raises(UsageError, match="neither a PCI address nor"):
        find("fff51000.serial", host)


def test_what_this_kernel_lacks_is_unsupported_by_name() -> None:
    group_only = laid_out("/dev/vfio/7", "/dev/vfio/vfio")
    with pytest.raises(Unsupported, match="no character device for iommufd"):
        open_space(find(EDU, group_only), "iommufd", group_only)
    cdev_only = laid_out("/dev/vfio/devices/vfio3", "/dev/iommu")
    with pytest.raises(Unsupported, match="no VFIO group"):
        open_space(find(EDU, cdev_only), "type1", cdev_only)
    with pytest.raises(UsageError, match="not a backend"):
        open_space(find(EDU, group_only), "container", group_only)


def test_a_host_that_is_not_this_one_opens_nothing() -> None:
    host = laid_out("/dev/vfio/7", "/dev/vfio/vfio", live=False)
    with pytest.raises(UsageError, match="not the running host"):
        Device.open(EDU, host=host)


def test_device_commands_report_in_the_contract_s_shape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["device", "info", "7fff:7f:1f.7", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["kind"] == "not-found"
    assert told["error"]["device"] == "7fff:7f:1f.7"
    for arguments in (
        ["device", "read", EDU, "bar9", "0"],
        ["device", "read", EDU, "0", "zero"],
        ["device", "read", EDU, "0", "0", "--width", "3"],
        ["device", "read", EDU, "0", "0", "--count", "0"],
        ["device", "write", EDU, "0", "0", "-1"],
        ["device", "trace", "/no/such/trace"],
        ["device", "info", "edu"],
    ):
        assert main(arguments) == 2, arguments
    assert main(["demo", "toaster", EDU]) == 3
    assert "edu" in capsys.readouterr().err


def test_regions_have_names_and_numbers_have_two_bases() -> None:
    assert [region_number(text) for text in ("0", "bar5", "ROM", "config", "0x9")] == [
        0, 5, 6, 7, 9,
    ]  # fmt: skip
    assert number("0x10", "an offset") == number("16", "an offset") == 16
    with pytest.raises(UsageError, match="negative"):
        number("-4", "an offset")


@pytest.mark.parametrize("name", [7, None, b"0000:00:01.0"])
def test_what_is_no_name_is_refused_in_words(name: object) -> None:
    with pytest.raises(UsageError, match="not the name of a device"):
        Device.open(name)  # type: ignore[arg-type]


def test_the_windows_of_a_device_are_its_own_and_those_of_the_bridges_above() -> None:
    port = "/sys/devices/pci0000:00/0000:00:11.0"
    below = f"{port}/0000:01:00.0"
    files: dict[str, bytes | int] = {
        f"{port}/resource": b"0x0 0x0 0x0\n"
        b"0x0000000000001000 0x0000000000001fff 0x0000000000000101\n"
        b"0x00000000fe000000 0x00000000fe1fffff 0x0000000000000200\nnonsense\n",
        f"{below}/resource": b"0x00000000fe000000 0x00000000fe003fff 0x0000000000140204\n",
    }
    links = {"/sys/bus/pci/devices/0000:01:00.0": f"../../..{below.removeprefix('/sys')}"}
    host = Host(MemoryTree(files, links, []), live=True, name="a laid-out host")
    target = find("0000:01:00.0", host)
    assert bus_windows(target, host) == [(0xFE000000, 0xFE003FFF), (0xFE000000, 0xFE1FFFFF)]
