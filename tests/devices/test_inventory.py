"""The inventory, and what details add: VFIO drivers and nodes, slots, children."""

from __future__ import annotations

import struct

import pytest

from tests.fakes.config_space import build
from tests.fakes.memory_host import DEVICES, HostBuilder
from vfiotool.devices.config.decode import parse_config
from vfiotool.devices.details import DetailReader, Details, link_of, read_details
from vfiotool.devices.inventory import read_inventory
from vfiotool.devices.mdev import read_mdev_types, read_mdevs
from vfiotool.devices.pci import Link, read_function
from vfiotool.devices.sriov import read_vfs

PF, VF0, VF1 = "0000:01:00.0", "0000:01:10.0", "0000:01:10.2"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
ALIASES = """\
alias pci:v00008086d000010C9sv*sd*bc*sc*i* igb
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v00008086d000010C9sv*sd*bc*sc*i* fancy_vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
"""


def builder() -> HostBuilder:
    made = HostBuilder()
    made.function(
        PF,
        driver="igb",
        group=7,
        attributes={
            "sriov_totalvfs": "7\n",
            "sriov_numvfs": "2\n",
            "config": bytes(build([(0x01, bytes(6))])),
        },
        links={"virtfn0": f"../{VF0}", "virtfn1": f"../{VF1}", "iommu": "../../virtual/dmar0"},
    )
    for group, vf in enumerate((VF0, VF1), 8):
        made.function(vf, driver="vfio-pci", group=group, links={"physfn": f"../{PF}"})
        made.link(f"{DEVICES}/{vf}/driver", "../../../bus/pci/drivers/vfio-pci")
    made.file("/proc/sys/kernel/osrelease", "6.12.0\n")
    return made


def details(made: HostBuilder, address: str = PF) -> Details:
    host = made.host()
    function = read_function(host, address)
    assert function is not None
    return DetailReader(host).read(function)


def test_the_inventory_holds_functions_groups_and_vfs() -> None:
    inventory = read_inventory(builder().host())
    assert [function.address for function in inventory.functions] == [PF, VF0, VF1]
    assert [(vf.index, vf.address, vf.driver) for vf in inventory.vfs] == [
        (0, VF0, "vfio-pci"),
        (1, VF1, "vfio-pci"),
    ]
    assert inventory.by_group[7].devices[0].address == PF
    assert inventory.by_address[PF].iommu == "dmar0"


def test_vfs_are_in_the_order_of_their_index_not_of_their_names() -> None:
    made = HostBuilder().function(
        PF, links={f"virtfn{index}": f"../0000:02:{10 - index:02x}.0" for index in range(11)}
    )
    for index in range(11):
        made.function(f"0000:02:{10 - index:02x}.0")
    assert [vf.index for vf in read_vfs(made.host(), PF)] == list(range(11))


def test_a_variant_driver_is_preferred_to_the_general_one() -> None:
    made = builder().file("/lib/modules/6.12.0/modules.alias", ALIASES)
    assert details(made).vfio_driver == "fancy_vfio_pci"


def test_the_general_driver_is_named_as_the_kernel_names_it() -> None:
    lines = [line for line in ALIASES.splitlines() if "fancy" not in line]
    made = builder().file("/lib/modules/6.12.0/modules.alias", "\n".join(lines) + "\n")
    assert details(made).vfio_driver == "vfio-pci"


def test_a_built_in_vfio_pci_is_found_without_any_alias() -> None:
    made = builder()
    made.folders.append("/sys/bus/pci/drivers/vfio-pci")
    assert details(made).vfio_driver == "vfio-pci"


def test_no_vfio_driver_at_all_is_none() -> None:
    assert details(builder()).vfio_driver is None


@pytest.mark.parametrize("class_code", ["60400", "60401", "60700"])
def test_bridges_have_no_vfio_driver(class_code: str) -> None:
    made = builder().file("/lib/modules/6.12.0/modules.alias", ALIASES)
    made.function("0000:00:01.0", class_code=class_code)
    assert details(made, "0000:00:01.0").vfio_driver is None


def test_vfio_nodes_are_those_of_the_group_and_of_the_function() -> None:
    made = builder()
    made.file("/dev/vfio/8", b"").file("/dev/vfio/vfio", b"")
    made.file("/dev/vfio/devices/vfio0", b"")
    made.link("/sys/class/vfio-dev/vfio0", f"../../devices/pci0000:00/{VF0}/vfio-dev/vfio0")
    found = details(made, VF0)
    assert (found.group_node, found.device_node) == ("/dev/vfio/8", "/dev/vfio/devices/vfio0")
    assert details(made, VF1).group_node is None


def test_a_noiommu_group_has_a_node_of_its_own_name() -> None:
    made = builder().file("/dev/vfio/noiommu-8", b"")
    assert details(made, VF0).group_node == "/dev/vfio/noiommu-8"


def test_slots_are_found_by_domain_bus_and_device() -> None:
    made = builder().file("/sys/bus/pci/slots/4/address", "0000:01:00\n")
    made.file("/sys/bus/pci/slots/5/address", 5)
    assert details(made).slot == "4"
    assert details(made, VF0).slot is None


def test_mediated_and_vdpa_children_are_named_under_their_parent() -> None:
    made = builder()
    made.link(f"/sys/bus/mdev/devices/{UUID}", f"../../../devices/pci0000:00/{PF}/{UUID}")
    made.link("/sys/bus/vdpa/devices/vdpa0", f"../../../devices/pci0000:00/{PF}/vdpa0")
    made.link(f"/sys/class/mdev_bus/{PF}", f"../../devices/pci0000:00/{PF}")
    found = details(made)
    assert (found.mdev_parent, found.mdevs, found.vdpas) == (True, (UUID,), ("vdpa0",))
    assert found.vfs == (VF0, VF1)
    assert not details(made, VF0).mdev_parent


def test_configuration_space_that_cannot_be_read_is_none_and_the_rest_is_read() -> None:
    made = builder().file(f"{DEVICES}/{PF}/config", 13)
    found = details(made)
    assert found.config is None and found.vfs == (VF0, VF1)


def test_details_of_all_functions_are_in_bus_order() -> None:
    assert [item.vfs for item in read_details(builder().host())] == [(VF0, VF1), (), ()]


def test_mdev_types_and_instances_survive_missing_attributes() -> None:
    made = HostBuilder()
    base = "/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1"
    made.file(f"{base}/device_api", "vfio-pci\n").file(f"{base}/available_instances", "many\n")
    made.link(f"/sys/bus/mdev/devices/{UUID}", f"../../../devices/virtual/mtty/mtty/{UUID}")
    made.link(f"/sys/devices/virtual/mtty/mtty/{UUID}/mdev_type", "../mdev_supported_types/mtty-1")
    (kind,) = read_mdev_types(made.host())
    assert (kind.device_api, kind.available_instances, kind.name) == ("vfio-pci", None, None)
    (mdev,) = read_mdevs(made.host())
    assert (mdev.uuid, mdev.parent) == (UUID, "mtty")


def express(link: bytes, link2: bytes = bytes(12), kind: int = 0) -> bytes:
    """A PCI Express capability's body with these link registers."""
    head = struct.pack("<H", 0x0002 | kind << 4) + bytes(8)
    return head + link + bytes(24) + link2 + bytes(8)


@pytest.mark.parametrize(
    ("link", "link2", "kind", "expected"),
    [
        # Link Capabilities 2 tells a speed that Link Capabilities cannot.
        ((0x0103, 0x1042), 0x1E, 0, Link(5.0, 4, 16.0, 16)),
        ((0x0102, 0x1011), 0, 0, Link(2.5, 1, 5.0, 16)),
        # A link that is down.
        ((0x0101, 0x0000), 0, 4, Link(None, None, 2.5, 16)),
        # A root complex integrated endpoint has no link at all.
        ((0x0101, 0x1011), 0, 9, Link(None, None, None, None)),
    ],
)
def test_the_link_is_told_from_configuration_space_as_the_kernel_tells_it(
    link: tuple[int, int], link2: int, kind: int, expected: Link
) -> None:
    body = express(struct.pack("<IHH", link[0], 0, link[1]), struct.pack("<III", link2, 0, 0), kind)
    assert link_of(parse_config(bytes(build([(0x10, body)])))) == expected


def test_without_privilege_the_link_comes_from_the_attributes() -> None:
    made = builder()
    made.file(f"{DEVICES}/{PF}/config", bytes(build([(0x10, bytes(58))])[:64]))
    made.file(f"{DEVICES}/{PF}/max_link_width", "8\n")
    made.file(f"{DEVICES}/{PF}/max_link_speed", "8.0 GT/s PCIe\n")
    assert details(made).link == Link(None, None, 8.0, 8)


def test_a_conventional_function_has_no_link() -> None:
    assert details(builder()).link is None
