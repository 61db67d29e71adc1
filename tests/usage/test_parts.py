"""Uses by parts of a function, and what their sentences and steps say."""

from __future__ import annotations

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.host import paths
from vfiotool.host.host import Host
from vfiotool.host.observe_net import _link_lines
from vfiotool.host.tree import MemoryTree
from vfiotool.netlink.route import NetLink
from vfiotool.usage.links import SELF, read_graph
from vfiotool.usage.network import read_routes
from vfiotool.usage.sight import Sight
from vfiotool.usage.survey import survey

RNG, DISK, NIC = "0000:07:00.0", "0000:01:00.0", "0000:02:00.0"


def kinds(small: SmallHost, address: str) -> list[tuple[str, str]]:
    return [(entry.kind, entry.subject) for entry in survey(small.host(), address).blockers]


def random_source(current: str, driver: str = "virtio_rng") -> SmallHost:
    small = SmallHost()
    path = small.function(RNG, class_code="00ff00", driver="virtio-pci")
    small.link(f"{path}/virtio3/driver", f"/sys/bus/virtio/drivers/{driver}")
    small.file(paths.SYS_HWRNG, current)
    return small


def test_the_kernels_source_of_random_numbers_is_in_use() -> None:
    assert kinds(random_source("virtio_rng.0"), RNG) == [("random-source", "virtio_rng.0")]


@pytest.mark.parametrize(
    ("current", "driver"), [("tpm-rng-0", "virtio_rng"), ("virtio_rng.0", "virtio_net")]
)
def test_another_source_of_random_numbers_is_none_of_the_devices(current: str, driver: str) -> None:
    assert kinds(random_source(current, driver), RNG) == []


def routes(*rows: str) -> dict[str, list[str]]:
    small = SmallHost()
    small.file(paths.PROC_ROUTE, "\n".join(["Iface Destination Gateway Flags", *rows]))
    return read_routes(Sight(small.host()))


def test_a_route_that_is_down_or_rejects_carries_nothing() -> None:
    row = "eth1 0009A8C0 00000000 {} 0 0 0 00FFFFFF 0 0 0"
    assert routes(row.format("0001")) == {"eth1": ["192.168.9.0/24"]}
    assert routes(row.format("0000")) == {}
    assert routes(row.format("0201")) == {}


def links(*rows: str) -> SmallHost:
    small = SmallHost()
    small.file(paths.NET_LINKS, "\n".join([*rows, "."]))
    return small


def test_a_port_stands_below_its_bridge_in_its_own_namespace_alone() -> None:
    graph = read_graph(
        Sight(
            links(
                "self\t2\teth1\t\t\t\t5\t\t\t",
                "self\t5\tbr0\tbridge\t\t\t\t\t\t",
                "77\t5\tother\tbridge\t\t\t\t\t\t",
            ).host()
        )
    )
    assert [item.name for item in graph.above((SELF, 2))] == ["br0"]
    assert list(graph.above((SELF, 5))) == []


def test_what_stands_on_an_index_of_an_untold_namespace_may_stand_on_each_of_that_index() -> None:
    graph = read_graph(
        Sight(
            links(
                "self\t3\teth1\t\t\t\t\t\t\t",
                "self\t4\teth2\t\t\t\t\t\t\t",
                "77\t5\tup7\tipvtap\t?\t3\t\t\t\t",
            ).host()
        )
    )
    assert [item.name for item in graph.above((SELF, 3))] == ["up7"]
    assert [upper.name for upper, _ in graph.elsewhere([(SELF, 3)])] == ["up7"]
    assert list(graph.above((SELF, 4))) == []
    assert list(graph.above(("77", 5))) == []


def test_an_index_alone_is_not_taken_for_one_of_the_same_namespace() -> None:
    """ipvtap, moved to a container, tells no namespace, and neither does one that has no number."""
    here = NetLink(3, "eth1", True, None, None, None)
    rows = [
        NetLink(5, "up5", True, None, None, "macvlan", 3),
        NetLink(6, "up6", True, None, None, "ipvtap", 3),
        NetLink(7, "up7", True, None, None, "macvlan", 9),
        NetLink(8, "up8", True, None, None, "macvlan", 3, -1),
        NetLink(9, "veth0", True, None, None, "veth", 77),
    ]
    told = [line.split("\t")[4] for line in _link_lines("77", (here, *rows[:4]), {}, {})]
    assert told == ["", "77", "?", "?", "?"]
    (line,) = _link_lines("77", (rows[4],), {}, {})
    assert line.split("\t")[4:6] == ["", ""]


def test_a_master_that_no_row_tells_of_is_no_reason_to_fall() -> None:
    graph = read_graph(Sight(links("self\t2\teth1\t\t\t\t9\t\t\t").host()))
    assert list(graph.above((SELF, 2))) == []


def test_a_loop_device_and_a_holder_are_shown_where_each_can_be_checked() -> None:
    small = SmallHost()
    path = small.nvme(DISK, "nvme0n1", "259:0")
    small.block("nvme0n1", f"{path}/nvme/nvme0/nvme0n1", "259:0", holders=["dm-0"])
    small.block("dm-0", "/sys/devices/virtual/block/dm-0", "253:0")
    small.block("loop0", "/sys/devices/virtual/block/loop0", "7:0")
    small.file("/sys/devices/virtual/block/loop0/loop/backing_file", "/dev/nvme0n1")
    evidence = {entry.subject: entry.evidence for entry in survey(small.host(), DISK).blockers}
    assert evidence == {
        "dm-0": "/sys/class/block/nvme0n1/holders/dm-0",
        "loop0": "/sys/class/block/loop0/loop/backing_file",
    }


def test_zram_is_shown_where_it_is() -> None:
    small = SmallHost()
    small.nvme(DISK, "nvme0n1", "259:0")
    small.block("zram0", "/sys/devices/virtual/block/zram0", "252:0")
    small.file("/sys/devices/virtual/block/zram0/backing_dev", "/dev/nvme0n1")
    (entry,) = survey(small.host(), DISK).blockers
    assert entry.evidence == "/sys/class/block/zram0"


def swapping(area: str, kind: str, *mounts: str) -> SmallHost:
    small = SmallHost()
    small.nvme(DISK, "nvme0n1", "259:0")
    small.file(paths.PROC_SWAPS, f"Filename Type Size Used Priority\n{area} {kind} 1 0 -2")
    small.mounts(*mounts)
    return small


def test_a_swap_file_is_of_the_disk_that_it_lies_on_and_of_no_other() -> None:
    mount = "self\t30 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw"
    assert ("swap", "/data/swap") in kinds(swapping("/data/swap", "file", mount), DISK)
    assert ("swap", "/else/swap") not in kinds(swapping("/else/swap", "file", mount), DISK)
    # A swap partition lies on no file system, whatever its path looks like.
    assert ("swap", "/data/swap") not in kinds(swapping("/data/swap", "partition", mount), DISK)


def test_a_swap_file_on_no_known_mount_is_of_no_disk() -> None:
    assert kinds(swapping("/swap", "file"), DISK) == []


def virtiofs(driver: str) -> SmallHost:
    small = SmallHost()
    path = small.function(RNG, class_code="018000", driver="virtio-pci")
    small.link(f"{path}/virtio0/driver", f"/sys/bus/virtio/drivers/{driver}")
    small.mounts("self\t30 1 0:40 / /shared rw - virtiofs tag rw")
    return small


def test_a_virtiofs_mount_is_a_use_of_virtiofs_devices_alone() -> None:
    assert ("mounted", "/shared") in kinds(virtiofs("virtiofs"), RNG)
    assert ("mounted", "/shared") not in kinds(virtiofs("virtio_net"), RNG)


def test_a_link_to_itself_leads_nowhere_where_nothing_is() -> None:
    sight = Sight(Host(MemoryTree({"/sys/there": b"x"}, {}), live=False, name="tree"))
    assert sight.realpath("/sys/there") == "/sys/there"
    assert sight.realpath("/sys/not-there") is None


@pytest.mark.parametrize(
    ("marker", "kind"), [("bridge", "bridge"), ("bonding", "bond"), (None, "interface")]
)
def test_what_a_card_belongs_to_is_called_by_what_it_is(marker: str | None, kind: str) -> None:
    small = SmallHost()
    port = small.network(NIC, "eth1")
    small.link("/sys/class/net/top0", "/sys/devices/virtual/net/top0")
    small.file("/sys/devices/virtual/net/top0/uevent", "INTERFACE=top0")
    small.link(f"{port}/master", "/sys/devices/virtual/net/top0")
    if marker is not None:
        small.folders.add(f"/sys/devices/virtual/net/top0/{marker}")
    details = [entry.detail for entry in survey(small.host(), NIC).blockers]
    assert f"eth1 is a port of the {kind} top0" in details


def test_only_routes_without_addresses_are_flushed_as_routes() -> None:
    small = SmallHost()
    small.network(NIC, "eth1")
    small.file(paths.NET_ROUTES, "eth1\t10.9.0.0/16\n.")
    (entry,) = survey(small.host(), NIC).blockers
    assert entry.remedy == "ip route flush table all dev eth1"
    small.addresses(("eth1", "10.9.0.1/16"))
    (entry,) = survey(small.host(), NIC).blockers
    assert entry.remedy == "ip address flush dev eth1"


def test_a_target_that_netconsole_was_loaded_with_is_unseen_beside_others_that_show() -> None:
    """Only those that were made in configfs have a folder there."""
    small = SmallHost()
    small.network(NIC, "eth1")
    assert kinds(small, NIC) == []
    small.file("/sys/module/netconsole/initstate", "live")
    assert kinds(small, NIC) == [("unseen", paths.SYS_NETCONSOLE)]
    (entry,) = survey(small.host(), NIC).blockers
    assert entry.remedy is not None and "configfs" in entry.remedy
    small.file(f"{paths.SYS_NETCONSOLE}/other/dev_name", "eth9")
    small.folders |= {paths.SYS_NETCONSOLE, f"{paths.SYS_NETCONSOLE}/other"}
    (entry,) = survey(small.host(), NIC).blockers
    assert (entry.subject, entry.remedy) == (paths.SYS_NETCONSOLE, None)


def test_a_target_in_configfs_is_named_by_its_interface() -> None:
    small = SmallHost()
    small.network(NIC, "eth1")
    base = f"{paths.SYS_NETCONSOLE}/far"
    small.folders |= {paths.SYS_NETCONSOLE, base}
    small.file(f"{base}/dev_name", "eth1")
    small.file(f"{base}/enabled", "0")
    assert kinds(small, NIC) == []
    small.file(f"{base}/enabled", "1")
    (entry,) = survey(small.host(), NIC).blockers
    assert (entry.kind, entry.subject) == ("console", "eth1")
    assert entry.remedy == f"echo 0 > {base}/enabled"
    small.network("0000:03:00.0", "eth2")
    small.file(f"{base}/dev_name", "eth2")
    assert kinds(small, NIC) == []
    # An alternative name, which nothing else tells.
    small.file(f"{base}/dev_name", "enp2s0f0np0")
    assert kinds(small, NIC) == [("unseen", base)]
    assert kinds(small, RNG) == []


def test_a_console_over_the_interface_of_a_vdpa_device_is_its_use() -> None:
    small = SmallHost()
    small.link(f"{paths.SYS_VDPA_DEVICES}/vdpa0", "/sys/devices/vdpa0")
    small.link("/sys/class/net/eth3", "/sys/devices/vdpa0/virtio9/net/eth3")
    small.file("/sys/devices/vdpa0/virtio9/net/eth3/ifindex", "7")
    base = f"{paths.SYS_NETCONSOLE}/far"
    small.folders |= {paths.SYS_NETCONSOLE, base}
    small.file(f"{base}/dev_name", "eth3")
    small.file(f"{base}/enabled", "1")
    assert ("console", "eth3") in kinds(small, "vdpa0")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("quiet netconsole=@/eth0,@10.0.0.1/", [("unseen", paths.SYS_NETCONSOLE)]),
        ("netconsole.netconsole=@/eth0,@10.0.0.1/ quiet", [("unseen", paths.SYS_NETCONSOLE)]),
        ("quiet netconsole.oops_only=1 netconsole=", []),
    ],
)
def test_a_netconsole_that_is_built_in_has_the_target_of_the_kernels_command_line(
    words: str, found: list[tuple[str, str]]
) -> None:
    """Its name there may be one from before the interface was renamed."""
    small = SmallHost()
    small.network(NIC, "eth1")
    small.file("/proc/cmdline", words)
    assert kinds(small, NIC) == []
    small.folders.add("/sys/module/netconsole")
    assert kinds(small, NIC) == found


@pytest.mark.parametrize(("driver", "found"), [(None, []), ("virtio_blk", [("unseen", DISK)])])
def test_a_virtio_disk_without_a_driver_is_nobodys(
    driver: str | None, found: list[tuple[str, str]]
) -> None:
    """One with a driver, and no disk that could be seen, may be in use all the same."""
    small = SmallHost()
    path = small.function(DISK, class_code="010000", driver="virtio-pci")
    small.folders |= {f"{path}/virtio1", paths.SYS_BLOCK}
    if driver is not None:
        small.link(f"{path}/virtio1/driver", f"/sys/bus/virtio/drivers/{driver}")
    assert kinds(small, DISK) == found


@pytest.mark.parametrize(
    ("folder", "kind"),
    [(paths.SYS_MDEV_DEVICES, "mdev-children"), (paths.SYS_VDPA_DEVICES, "vdpa-children")],
)
def test_devices_made_from_a_function_are_its_uses_and_no_others(folder: str, kind: str) -> None:
    small = SmallHost()
    own, other = small.function(DISK), small.function(NIC)
    small.link(f"{folder}/mine", f"{own}/mine")
    small.link(f"{folder}/other", f"{other}/other")
    assert kinds(small, DISK) == [(kind, "mine")]
    small.link(f"{own}/mine/driver", "/sys/bus/some/drivers/vhost_vdpa")
    (entry,) = survey(small.host(), DISK).blockers
    assert entry.detail.endswith(", on vhost_vdpa") == (kind == "vdpa-children")


def test_a_function_that_could_have_vfs_and_has_none_is_nobodys() -> None:
    small = SmallHost()
    path = small.function(NIC)
    small.file(f"{path}/sriov_totalvfs", "4")
    small.file(f"{path}/sriov_numvfs", "0")
    assert kinds(small, NIC) == []
