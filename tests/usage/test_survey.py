"""Networks, displays, open nodes, VFs and mdevs in use, on hosts in memory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.small_host import SmallHost
from tests.usage.why_page import PAGE, with_kinds
from vfiotool.devices.attached import is_part_of
from vfiotool.usage.blocker import KINDS
from vfiotool.usage.network import read_routes
from vfiotool.usage.sight import Sight
from vfiotool.usage.survey import blockers, survey

NIC = "0000:03:00.0"
GPU = "0000:02:00.0"
ROUTE_HEAD = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
DEFAULT4 = "eth1\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
SUBNET4 = "eth1\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"


@pytest.fixture
def small() -> SmallHost:
    return SmallHost()


def found(small: SmallHost, address: str = NIC) -> list[tuple[str, str]]:
    return [(entry.kind, entry.subject) for entry in blockers(small.host(), address)]


def test_an_interface_that_is_only_up_is_not_in_use(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    small.addresses(
        ("lo", "127.0.0.1/8"), ("eth1", "fe80::5054:ff:fe12:3456/64"), ("eth9", "10.0.0.1/8")
    )
    assert found(small) == []


def test_an_address_is_a_use(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    made = "fe80::5054:ff:fe12:3456/64"
    small.addresses(("eth1", "10.0.2.15/24"), ("eth1", "fec0::1/64"), ("eth1", made))
    (entry,) = blockers(small.host(), NIC)
    assert entry.kind == "route"
    assert entry.detail == "eth1 has 10.0.2.15/24, fec0::1/64"
    assert entry.evidence == "ip address show dev eth1"
    assert entry.remedy == "ip address flush dev eth1"


def test_the_default_route_is_flagged(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    small.addresses(("eth1", "10.0.2.15/24"))
    small.file("/proc/net/route", ROUTE_HEAD + DEFAULT4 + SUBNET4)
    (entry,) = blockers(small.host(), NIC)
    assert "carries the default route (default via 10.0.2.2)" in entry.detail
    assert "/proc/net/route name eth1" in entry.evidence


def test_a_route_without_an_address_is_a_use(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    small.file("/proc/net/route", ROUTE_HEAD + SUBNET4)
    (entry,) = blockers(small.host(), NIC)
    assert entry.detail == "eth1 carries routes (10.0.2.0/24)"


def test_automatic_ipv6_routes_are_no_use_but_a_gateway_is(small: SmallHost) -> None:
    zero, link_local = "0" * 32, "fe80" + "0" * 28
    peer = "fe80000000000000000000000000000a"
    small.file(
        "/proc/net/ipv6_route",
        f"{link_local} 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001 eth1\n"
        f"ff{'0' * 30} 08 {zero} 00 {zero} 00000100 00000001 00000000 00000001 eth1\n"
        f"{peer} 80 {zero} 00 {zero} 00000000 00000001 00000000 80200001 eth1\n"
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
        "garbage\n",
    )
    assert read_routes(Sight(small.host())) == {}
    small.file(
        "/proc/net/ipv6_route",
        f"{zero} 00 {zero} 00 {peer} 00000400 00000001 00000000 00000003 eth1",
    )
    assert read_routes(Sight(small.host())) == {"eth1": ["default ::/0 via fe80::a"]}


def test_ipv6_routes_to_a_network_and_through_a_gateway_are_uses(small: SmallHost) -> None:
    zero, peer = "0" * 32, "fe80000000000000000000000000000a"
    small.file(
        "/proc/net/ipv6_route",
        f"20010db8{'0' * 24} 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001 eth1\n"
        f"fe80{'0' * 28} 0a {zero} 00 {peer} 00000100 00000001 00000000 00000003 eth1",
    )
    routes = ["2001:db8::/64", "fe80::/10 via fe80::a"]
    assert read_routes(Sight(small.host())) == {"eth1": routes}


def test_the_callers_ssh_session_is_named_and_never_cut_by_a_remedy(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    small.addresses(("eth1", "10.0.2.15/24"))
    small.file("/proc/vfiotool/caller", "10.0.2.15\t192.0.2.9")
    (entry,) = blockers(small.host(), NIC)
    assert "carries your SSH session from 192.0.2.9 to 10.0.2.15" in entry.detail
    assert entry.remedy is None


def test_an_ssh_session_over_a_link_local_address_counts(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    small.addresses(("eth1", "fe80::1/64"))
    small.file("/proc/vfiotool/caller", "fe80::1%eth1\tfe80::9")
    assert found(small) == [("route", "eth1")]


def test_a_bridge_port_names_the_bridge_and_what_the_bridge_carries(small: SmallHost) -> None:
    path = small.network(NIC, "eth1")
    bridge = small.virtual_interface("br0", "bridge", path)
    small.link(f"{path}/master", bridge)
    small.folders.add(f"{bridge}/bridge")
    small.addresses(("br0", "10.0.2.15/24"))
    first, second = blockers(small.host(), NIC)
    assert (first.kind, first.subject) == ("bridge-or-bond", "br0")
    assert first.detail == "eth1 is a port of the bridge br0"
    assert first.evidence == "/sys/class/net/eth1/master leads to br0"
    assert first.remedy == "ip link set eth1 nomaster"
    assert second.detail == "br0 (over eth1) has 10.0.2.15/24"


def test_a_team_port_names_the_team_and_what_it_carries(small: SmallHost) -> None:
    """Nothing in sysfs tells a team: the kernel's link messages do."""
    path = small.network(NIC, "eth1")
    team = small.virtual_interface("team0", "team", path)
    small.link(f"{path}/master", team)
    small.file(f"{team}/uevent", "INTERFACE=team0\nIFINDEX=7")
    small.file("/proc/vfiotool/net-kinds", "team0\tteam")
    small.addresses(("team0", "10.0.2.15/24"))
    first, second = blockers(small.host(), NIC)
    assert (first.kind, first.subject) == ("bridge-or-bond", "team0")
    assert first.detail == "eth1 is a port of the team team0"
    assert first.evidence == "/sys/class/net/eth1/master leads to team0"
    assert first.remedy == "ip link set eth1 nomaster"
    assert second.detail == "team0 (over eth1) has 10.0.2.15/24"


def test_a_vlan_over_a_bond_is_found_through_both(small: SmallHost) -> None:
    path = small.network(NIC, "eth1")
    bond = small.virtual_interface("bond0", "bond", path)
    small.link(f"{path}/master", bond)
    small.folders.add(f"{bond}/bonding")
    small.virtual_interface("bond0.7", "vlan", bond)
    small.addresses(("bond0.7", "10.7.0.1/24"))
    entries = {(entry.kind, entry.subject): entry for entry in blockers(small.host(), NIC)}
    assert set(entries) == {("bridge-or-bond", "bond0"), ("route", "bond0.7")}
    assert entries["route", "bond0.7"].detail.startswith("bond0.7 (over eth1 > bond0) has")


def test_a_macvlan_stands_on_its_interface(small: SmallHost) -> None:
    path = small.network(NIC, "eth1")
    small.virtual_interface("mv0", "macvlan", path)
    (entry,) = blockers(small.host(), NIC)
    assert entry.detail == "the macvlan mv0 stands on eth1"
    assert entry.remedy == "ip link delete mv0"


def test_an_interface_in_another_network_namespace_is_found(small: SmallHost) -> None:
    path = small.function(NIC, class_code="020000", driver="igb")
    small.file(
        "/proc/vfiotool/net-namespaces",
        f"321\teth1\t{path}\t10.9.0.1/24,fd00::1/64\n"
        f"321\teth3\t{path}\t\n"
        "321\teth2\t/sys/devices/pci0000:00/0000:09:00.0\t\n"
        "!\tnetwork namespaces of 2 processes of other users",
    )
    usage = survey(small.host(), NIC)
    entry, bare, unseen = usage.blockers
    assert (
        entry.detail
        == "eth1 lives in the network namespace of pid 321 with 10.9.0.1/24, fd00::1/64"
    )
    assert bare.detail == "eth3 lives in the network namespace of pid 321"
    assert entry.evidence == "/proc/321/ns/net"
    assert (unseen.kind, unseen.subject) == ("unseen", "net-namespaces")


@pytest.mark.parametrize(
    ("driver", "expected"), [("igb", [("unseen", NIC)]), ("vfio-pci", []), (None, [])]
)
def test_a_card_whose_interface_may_be_in_an_unseen_namespace_is_in_use(
    small: SmallHost, driver: str | None, expected: list[tuple[str, str]]
) -> None:
    small.function(NIC, class_code="020000", driver=driver)
    small.addresses()
    assert found(small) == []
    small.folders.add("/sys/class/net")
    assert found(small) == expected
    small.file("/proc/vfiotool/net-namespaces", "!\tthe network namespace of pid 9")
    assert found(small) == [("unseen", "net-namespaces"), *expected]


def test_a_root_without_addresses_says_that_they_are_unseen(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    del small.files["/proc/vfiotool/addresses"]
    assert survey(small.host(), NIC).unknown == ("the addresses of the interfaces",)


def test_a_pppoe_session_is_a_use(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    small.file(
        "/proc/net/pppoe",
        "Id       Address              Device\n00000001 52:54:00:12:34:56    eth1",
    )
    (entry,) = blockers(small.host(), NIC)
    assert (entry.kind, entry.subject) == ("route", "eth1")
    assert entry.evidence == "/proc/net/pppoe names eth1"


def test_virtio_interfaces_belong_to_their_function(small: SmallHost) -> None:
    path = small.function(NIC, class_code="020000", identity="1af4:1041", driver="virtio-pci")
    small.link("/sys/class/net/eth0", f"{path}/virtio1/net/eth0")
    small.addresses(("eth0", "10.0.0.1/8"))
    assert found(small) == [("route", "eth0")]


def gpu(small: SmallHost, driver: str | None = "bochs-drm") -> str:
    path = small.function(GPU, class_code="030000", identity="1234:1111", driver=driver)
    small.file(f"{path}/boot_vga", "1")
    return path


def test_the_boot_display_is_in_use_until_vfio_has_it(small: SmallHost) -> None:
    gpu(small)
    assert found(small, GPU) == [("boot-vga", GPU)]
    taken = SmallHost()
    gpu(taken, "vfio-pci")
    assert found(taken, GPU) == []


def test_an_unbound_boot_display_still_shows_the_text_console(small: SmallHost) -> None:
    gpu(small, None)
    small.file("/sys/class/vtconsole/vtcon0/name", "(S) VGA+")
    small.file("/sys/class/vtconsole/vtcon0/bind", "1")
    (entry,) = blockers(small.host(), GPU)
    assert "text mode (/sys/class/vtconsole/vtcon0)" in entry.detail


def test_lit_connectors_and_the_consoles_frame_buffer_are_uses(small: SmallHost) -> None:
    path = small.function(GPU, class_code="030000", driver="amdgpu")
    for name, enabled in (("card0-HDMI-A-1", "enabled"), ("card0-DP-1", "disabled")):
        small.link(f"/sys/class/drm/{name}", f"{path}/drm/card0/{name}")
        small.file(f"{path}/drm/card0/{name}/enabled", enabled)
        small.file(f"{path}/drm/card0/{name}/status", "connected")
    small.link("/sys/class/graphics/fb0", f"{path}/graphics/fb0")
    small.file("/sys/class/vtconsole/vtcon1/name", "(M) frame buffer device")
    small.file("/sys/class/vtconsole/vtcon1/bind", "1")
    assert found(small, GPU) == [("display", "card0-HDMI-A-1"), ("display", "fb0")]
    small.file("/sys/class/vtconsole/vtcon1/bind", "0")
    assert found(small, GPU) == [("display", "card0-HDMI-A-1")]


def test_a_firmware_frame_buffer_in_a_bar_is_a_use(small: SmallHost) -> None:
    path = small.function(GPU, class_code="030000")
    small.file(f"{path}/resource", "0x00000000c0000000 0x00000000c0ffffff 0x0000000000042208")
    small.file(
        "/proc/iomem",
        "c0000000-c0ffffff : 0000:02:00.0\n  c0000000-c07fffff : BOOTFB\nd0000000-d0ffffff : efifb",
    )
    (entry,) = blockers(small.host(), GPU)
    assert entry.detail == "BOOTFB draws on its memory (BAR 0)"


def test_a_kernel_console_on_a_serial_card_is_a_use(small: SmallHost) -> None:
    path = small.function(GPU, class_code="070002", driver="serial")
    small.file("/sys/class/tty/console/active", "tty0 ttyS4")
    small.link("/sys/class/tty/ttyS4", f"{path}/tty/ttyS4")
    assert found(small, GPU) == [("console", "ttyS4")]


def test_a_kernel_console_on_a_virtio_port_is_a_use(small: SmallHost) -> None:
    path = small.function(GPU, class_code="078000", driver="virtio-pci")
    small.file("/sys/class/tty/console/active", "tty0 hvc0")
    small.link(f"{path}/virtio2/driver", "/sys/bus/virtio/drivers/virtio_console")
    assert found(small, GPU) == [("console", "hvc0")]


def test_open_nodes_are_named_with_every_process_that_holds_them(small: SmallHost) -> None:
    path = small.function(NIC, driver="nvme", class_code="010802", group=7)
    small.block("nvme0n1", "/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0")
    small.block("nvme0c0n1", f"{path}/nvme/nvme0/nvme0c0n1", "259:1")
    virtual = "/sys/devices/virtual"
    small.file(
        "/proc/vfiotool/open-nodes",
        f"10\tfio\t/dev/nvme0\t{path}/nvme/nvme0\n"
        f"11\tdd\t/dev/nvme0\t{path}/nvme/nvme0\n"
        f"12\tdd\t/dev/nvme0n1\t{virtual}/nvme-subsystem/nvme-subsys0/nvme0n1\n"
        f"13\tfio\t/dev/ng0n1\t{virtual}/nvme-subsystem/nvme-subsys0/ng0n1\n"
        f"14\tqemu\t/dev/vfio/7\t{virtual}/vfio/7\n"
        f"15\tqemu\t/dev/vfio/8\t{virtual}/vfio/8\n"
        f"16\tdpdk\t{path}/resource0\t{path}\n"
        "17\tx\t/dev/dri/card0\t/sys/devices/pci0000:00/0000:09:00.0/drm/card0\n"
        "broken line\n"
        "!\topen files of 4 processes of other users",
    )
    usage = survey(small.host(), NIC)
    assert [entry.subject for entry in usage.blockers] == [
        "/dev/ng0n1",
        "/dev/nvme0",
        "/dev/nvme0n1",
        "/dev/vfio/7",
        f"{path}/resource0",
        "open-nodes",
    ]
    assert usage.blockers[1].evidence == (
        "pid 10 (fio) has /dev/nvme0 open; pid 11 (dd) has /dev/nvme0 open"
    )
    assert "open files of 4 processes of other users" in usage.blockers[-1].detail


def test_the_proprietary_nvidia_node_is_found_by_its_minor(small: SmallHost) -> None:
    small.function(GPU, class_code="030000", driver="nvidia")
    small.file(f"/proc/driver/nvidia/gpus/{GPU}/information", "Model: X\nDevice Minor: \t 3")
    small.file("/proc/vfiotool/open-nodes", "9\tcuda\t/dev/nvidia3\t-\n8\tcuda\t/dev/nvidia1\t-")
    assert found(small, GPU) == [("open-file", "/dev/nvidia3")]


def test_enabled_vfs_are_named_with_their_drivers(small: SmallHost) -> None:
    path = small.function(NIC, class_code="020000", driver="igb")
    small.addresses()
    small.file(f"{path}/sriov_totalvfs", "7")
    small.file(f"{path}/sriov_numvfs", "2")
    for index, driver in enumerate(("vfio-pci", "igbvf")):
        vf = f"0000:03:10.{index * 2}"
        small.function(vf, driver=driver)
        small.link(f"{path}/virtfn{index}", f"/sys/devices/pci0000:00/{vf}")
    (entry,) = blockers(small.host(), NIC)
    assert (entry.kind, entry.remedy) == ("vfs-enabled", f"vfiotool vf set {NIC} 0")
    assert entry.evidence == f"/sys/bus/pci/devices/{NIC}/sriov_numvfs is 2"
    assert "0000:03:10.0 (vfio-pci, a VM may hold it), 0000:03:10.2 (igbvf)" in entry.detail


def test_mediated_devices_keep_their_parent_in_use_and_can_be_held_themselves(
    small: SmallHost,
) -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    path = small.function(GPU, class_code="030000", driver="i915")
    small.link(f"/sys/bus/mdev/devices/{uuid}", f"{path}/{uuid}")
    small.member(9, uuid, f"{path}/{uuid}")
    assert found(small, GPU) == [("mdev-children", uuid)]
    assert found(small, uuid) == []
    small.file("/proc/vfiotool/open-nodes", "5\tqemu\t/dev/vfio/9\t/sys/devices/virtual/vfio/9")
    assert found(small, uuid) == [("open-file", "/dev/vfio/9")]


def test_a_device_that_is_gone_has_no_users(small: SmallHost) -> None:
    assert blockers(small.host(), "0000:7f:00.0") == ()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("/sys/devices/a", True),
        ("/sys/devices/a/nvme/nvme0", True),
        ("/sys/devices/ab", False),
        ("/sys/devices/a/0000:01:00.0/nvme/nvme0", False),
        ("/sys/devices/a/pci10000:e0/10000:e0:01.0/10000:e1:00.0/nvme/nvme0", True),
    ],
)
def test_a_functions_parts_end_where_the_next_function_begins(device: str, expected: bool) -> None:
    assert is_part_of("/sys/devices/a", device) is expected


def test_every_kind_of_blocker_is_documented() -> None:
    """The page's table is the code's: python -m tests.usage.why_page writes it."""
    page = PAGE.read_text()
    assert with_kinds(page) == page


def test_a_kind_that_only_a_driver_ends_is_a_use_and_can_be_mended() -> None:
    for kind in KINDS.values():
        if kind.ends_with_driver:
            assert kind.cuts_a_use and kind.can_be_mended


TABLES = (
    "/proc/vfiotool/mounts",
    "/proc/vfiotool/open-nodes",
    "/proc/vfiotool/addresses",
    "/proc/vfiotool/net-kinds",
    "/proc/vfiotool/net-namespaces",
    "/proc/vfiotool/caller",
    "/proc/self/mountinfo",
    "/proc/swaps",
    "/proc/net/route",
    "/proc/net/ipv6_route",
    "/proc/net/pppoe",
    "/proc/iomem",
    "/sys/class/tty/console/active",
    "/run/udev/data/b259:0",
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(TABLES), st.text(max_size=200), max_size=6))
def test_no_text_in_a_table_stops_the_survey(texts: dict[str, str]) -> None:
    small = SmallHost()
    small.network(NIC, "eth1")
    path = small.nvme(GPU, "nvme0n1", "259:0", group=1)
    small.folders.add("/proc/spl/kstat/zfs/tank")
    small.file(f"{path}/resource", "0x1000 0x1fff 0x200")
    for name, text in texts.items():
        small.files[name] = text.encode()
    for address in (NIC, GPU):
        for entry in survey(small.host(), address).blockers:
            assert entry.kind in KINDS


def test_the_live_observations_name_a_node_held_by_another_process(tmp_path: Path) -> None:
    """On this machine: a child holds a block or character device that has a sysfs entry."""
    import os
    import subprocess

    from vfiotool.host.host import Host
    from vfiotool.host.paths import OPEN_NODES

    node = "/dev/loop-control"
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"{node}: {errno.errorcode[error.errno or 0]}")
    with subprocess.Popen(["sleep", "60"], stdin=descriptor) as child:
        os.close(descriptor)
        text = Host.local().read(OPEN_NODES) or ""
        child.kill()
    assert f"{child.pid}\tsleep\t{node}\t/sys/devices/virtual/misc/loop-control" in text
