"""What hypervisors are told, and whether a device is ready for one."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.cli.main import main
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.errors import NotFound, Refused, Unsupported
from vfiotool.host.host import Host
from vfiotool.snapshot.load import open_root
from vfiotool.vm import cloud_hypervisor, libvirt, preflight, qemu
from vfiotool.vm.handed import Handed, handed, handed_vdpa
from vfiotool.vm.releases import require_release

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"


def inventory_of(name: str) -> Inventory:
    return read_inventory(open_root(str(HOSTS / name)))


def functions(*names: str) -> list[Handed]:
    template = inventory_of("shared-group").by_address["0000:02:01.0"]
    return [Handed(name, f"/sys/bus/pci/devices/{name}", "vfio-pci", 5, template) for name in names]


def test_functions_of_one_card_stay_functions_of_one_device() -> None:
    words = qemu.arguments(functions("0000:01:00.0", "0000:01:00.1"))
    ports = [word for word in words if word.startswith("pcie-root-port")]
    assert len(ports) == 1
    first, second = [word for word in words if word.startswith("vfio-pci")]
    assert first.endswith("addr=0x0.0,multifunction=on")
    assert second.endswith("addr=0x0.1")


def test_a_lone_function_becomes_function_0() -> None:
    words = qemu.arguments(functions("0000:01:00.3"))
    assert words[-1] == "vfio-pci,host=0000:01:00.3,id=vfio-0000-01-00.3,bus=vfio-rp0"


def test_functions_without_a_function_0_are_numbered_from_0() -> None:
    words = qemu.arguments(functions("0000:01:00.2", "0000:01:00.3"))
    places = [word.split("addr=")[1] for word in words if word.startswith("vfio-pci")]
    assert places == ["0x0.0,multifunction=on", "0x0.1"]


def test_every_root_port_has_a_place_of_its_own() -> None:
    words = qemu.arguments(functions(*(f"0000:{bus:02x}:00.0" for bus in range(1, 21))))
    ports = [word for word in words if word.startswith("pcie-root-port")]
    places = {word.split("addr=")[1].split(",")[0] for word in ports}
    assert len(places) == len(ports) == 20


def test_iommufd_is_one_object_that_all_devices_share() -> None:
    words = qemu.arguments(functions("0000:01:00.0", "0000:02:00.0"), iommufd=True)
    assert words[:2] == ["-object", "iommufd,id=iommufd0"]
    assert [word.endswith(",iommufd=iommufd0") for word in words if "vfio-pci" in word] == [
        True
    ] * 2


def test_an_mdev_is_named_by_its_path_and_its_api() -> None:
    inventory = inventory_of("mdev-parents")
    uuid = inventory.mdevs[0].uuid
    device = handed(inventory, uuid)
    assert qemu.arguments([device])[-1].startswith(
        f"vfio-pci,sysfsdev=/sys/bus/mdev/devices/{uuid},id=mdev-{uuid}"
    )
    element = ElementTree.fromstring(libvirt.hostdevs([device]))
    assert element.attrib["type"] == "mdev"
    assert element.attrib["model"] == "vfio-pci"
    assert element.find("source/address").attrib == {"uuid": uuid}  # type: ignore[union-attr]


def test_libvirt_is_told_not_to_rebind() -> None:
    element = ElementTree.fromstring(libvirt.hostdevs(functions("0001:0a:1f.7")))
    assert element.attrib == {"mode": "subsystem", "type": "pci", "managed": "no"}
    address = element.find("source/address")
    assert address is not None
    assert address.attrib == {"domain": "0x0001", "bus": "0x0a", "slot": "0x1f", "function": "0x7"}


def test_cloud_hypervisor_takes_all_paths_after_one_option() -> None:
    assert cloud_hypervisor.arguments(functions("0000:01:00.0", "0000:02:00.0")) == [
        "--device",
        "path=/sys/bus/pci/devices/0000:01:00.0",
        "path=/sys/bus/pci/devices/0000:02:00.0",
    ]


def test_a_device_on_a_host_driver_is_not_ready_and_the_remedy_is_named() -> None:
    host = open_root(str(HOSTS / "shared-group"))
    inventory = read_inventory(host)
    device = handed(inventory, "0000:00:1e.0")
    found = preflight.findings(host, inventory, device)
    # A program has its port open: what why says of it is said here too, and comes first.
    assert [finding.kind for finding in found] == ["not-bound", "group-not-viable", "open-file"]
    assert found[0].next == "vfiotool why 0000:00:1e.0"
    assert found[1].next == "vfiotool bind 0000:00:1e.0 --whole-group"
    with pytest.raises(Refused, match="virtio-pci"):
        preflight.require_ready(host, inventory, [device])


def test_a_bound_device_of_a_viable_group_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    root = str(HOSTS / "shared-group")
    assert main(["--root", root, "--json", "vm", "check", "0000:02:01.0"]) == 0
    assert json.loads(capsys.readouterr().out)["ready"] is True
    assert main(["--root", root, "vm", "check", "0000:00:1e.0"]) == 1


TOKEN = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def guarded(pf_driver: str) -> tuple[Host, Inventory, str, str]:
    """A host with a function on a driver and one VF of it on vfio-pci."""
    small, pf, vf = SmallHost(), "0000:03:00.0", "0000:03:10.0"
    base = small.function(pf, group=3, driver=pf_driver)
    for name, number in (("totalvfs", 2), ("numvfs", 1), ("drivers_autoprobe", 1)):
        small.file(f"{base}/sriov_{name}", str(number))
    place = small.function(vf, group=4, driver="vfio-pci")
    small.link(f"{place}/physfn", base)
    small.link(f"{base}/virtfn0", place)
    host = small.host()
    return host, read_inventory(host), pf, vf


def test_a_vf_of_a_function_on_vfio_pci_wants_its_token() -> None:
    host, inventory, pf, vf = guarded("vfio-pci")
    device = handed(inventory, vf)
    (finding,) = preflight.findings(host, inventory, device)
    assert (finding.kind, finding.next) == ("vf-token", f"vfiotool vm qemu {vf} --vf-token UUID")
    with pytest.raises(Refused, match=f"{pf} is on a VFIO driver"):
        preflight.require_ready(host, inventory, [device])
    preflight.require_ready(host, inventory, [device], TOKEN)
    words = qemu.arguments([device, handed(inventory, pf)], vf_token=TOKEN)
    assert sum(word.endswith(f",vf-token={TOKEN}") for word in words) == 2
    with pytest.raises(Unsupported, match="which iommufd does not take"):
        qemu.arguments([device], iommufd=True, vf_token=TOKEN)


def test_no_token_is_given_where_the_host_drives_the_physical_function() -> None:
    # vfio-pci refuses a token that it did not ask for.
    host, inventory, _, vf = guarded("igb")
    device = handed(inventory, vf)
    assert preflight.findings(host, inventory, device) == ()
    assert "vf-token" not in " ".join(qemu.arguments([device], vf_token=TOKEN))


def test_a_token_that_is_no_uuid_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    root = str(HOSTS / "shared-group")
    assert main(["--root", root, "vm", "qemu", "0000:02:01.0", "--vf-token", "a,b"]) == 2
    assert "is not a valid UUID" in capsys.readouterr().err


FIELD = HOSTS.parent / "field"


def field(case: str) -> Host:
    (folder,) = FIELD.glob(f"{case}-*")
    return open_root(str(folder / "root.txt"))


def qemu_words(host: Host, name: str) -> list[str]:
    return qemu.arguments([handed(read_inventory(host), name)])


def test_a_function_in_a_domain_above_ffff_is_named_by_its_path() -> None:
    # QEMU parses 16 bits of domain in host=.
    template = functions("10000:e1:00.0")
    assert qemu.arguments(template)[-1].startswith(
        "vfio-pci,sysfsdev=/sys/bus/pci/devices/10000:e1:00.0,id=vfio-10000-e1-00.0,bus="
    )
    assert qemu.arguments(functions("ffff:e1:00.0"))[-1].startswith("vfio-pci,host=ffff:e1:00.0,")


MATRIX = "783e6dbb-ea0e-411f-94e2-717eaad438bf"


def test_a_crypto_device_of_s390x_gets_no_pci_port() -> None:
    host = field("16")
    words = qemu_words(host, MATRIX)
    path = f"/sys/bus/mdev/devices/{MATRIX}"
    assert words == ["-device", f"vfio-ap,sysfsdev={path},id=mdev-{MATRIX}"]
    assert qemu_words(host, "0001:00:00.0") == [
        "-device",
        "vfio-pci,host=0001:00:00.0,id=vfio-0001-00-00.0",
    ]
    with pytest.raises(Unsupported, match="takes PCI devices only"):
        cloud_hypervisor.arguments([handed(read_inventory(host), MATRIX)])


def test_channel_devices_have_a_device_number_each() -> None:
    devices = [Handed(name, f"/sys/{name}", "vfio-ccw", 1, None) for name in ("a", "b")]
    numbers = [word.rpartition(",")[2] for word in qemu.arguments(devices) if "ccw" in word]
    assert numbers == ["devno=fe.0.0000", "devno=fe.0.0001"]


def test_a_vendor_vgpu_is_ready_on_the_vendors_driver() -> None:
    host = field("03")
    inventory = read_inventory(host)
    assert preflight.findings(host, inventory, handed(inventory, "0000:41:00.4")) == ()


def test_vm_check_says_what_why_says() -> None:
    host = open_root(str(HOSTS / "storage-in-use"))
    inventory = read_inventory(host)
    found = preflight.findings(host, inventory, handed(inventory, "0000:01:00.0"))
    assert [finding.kind for finding in found] == ["not-bound", "mounted"]
    assert {finding.next for finding in found} == {"vfiotool why 0000:01:00.0"}


def test_an_unknown_device_is_not_found() -> None:
    with pytest.raises(NotFound):
        handed(inventory_of("shared-group"), "0000:7f:00.0")


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_the_folder_of_all_vdpa_devices_is_no_device(name: str) -> None:
    small = SmallHost()
    small.link("/sys/bus/vdpa/devices/vdpa0", "/sys/devices/vdpa0")
    small.file("/sys/devices/vdpa0/uevent", "")
    with pytest.raises(NotFound):
        handed_vdpa(small.host(), name)


@pytest.mark.parametrize(("given", "enough"), [("9", True), ("v9", True), ("8", False)])
def test_a_release_without_its_second_number_is_its_first(given: str, enough: bool) -> None:
    if enough:
        require_release("QEMU", given, {"iommufd"})
    else:
        with pytest.raises(Unsupported, match="has no iommufd"):
            require_release("QEMU", given, {"iommufd"})
