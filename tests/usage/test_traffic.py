"""Uses of an interface without an address, of a crypto engine, and of far disks."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.errors import KernelError, Unsupported
from vfiotool.host import observe_net, paths
from vfiotool.netlink import traffic
from vfiotool.netlink.codec import nested, string
from vfiotool.netlink.traffic import (
    BoundSocket,
    parse_hooked,
    parse_redirects,
    parse_socket,
    parse_vsock_socket,
    parse_xdp_socket,
    read_bound_sockets,
    read_filtered,
    read_redirected,
)
from vfiotool.usage.case import read_case
from vfiotool.usage.far_disks import vital_over_network
from vfiotool.usage.links import in_namespace
from vfiotool.usage.sight import Sight
from vfiotool.usage.survey import survey
from vfiotool.usage.verdict import explain

NIC, DISK, ENGINE = "0000:02:00.0", "0000:01:00.0", "0000:05:00.0"
RX_ALL = """
receive list 'rx_all':
  device   can_id   can_mask  function  userdata   matches  ident
   can0     000    00000000  ffff      ffff         0  raw
"""


def network(name: str = "eth1") -> SmallHost:
    small = SmallHost()
    small.network(NIC, name)
    return small


def found(small: SmallHost, address: str = NIC) -> list[tuple[str, str, str]]:
    entries = survey(small.host(), address).blockers
    return [(entry.kind, entry.subject, entry.detail) for entry in entries]


@pytest.mark.parametrize(
    ("fact", "kind", "words"),
    [
        ("redirected", "traffic-rule", "a tc rule of another interface sends packets to eth1"),
        ("filtered", "traffic-rule", "tc filters take packets of eth1"),
        ("programmed", "traffic-rule", "BPF programs take packets of eth1 (tcx)"),
        ("udp port 67", "packet-socket", "a socket bound to eth1 (udp port 67)"),
    ],
)
def test_what_tc_and_sockets_do_is_a_use(fact: str, kind: str, words: str) -> None:
    small = network()
    small.file(paths.NET_TRAFFIC, f"eth1\t{fact}\nother\tredirected\n.")
    ((got, subject, detail),) = found(small)
    assert (got, subject) == (kind, "eth1")
    assert words in detail


def test_traffic_of_other_interfaces_is_no_use() -> None:
    small = network()
    small.file(paths.NET_TRAFFIC, "eth0\tredirected\neth0\tudp port 67\n.")
    assert found(small) == []


def test_both_a_rule_and_a_socket_are_named() -> None:
    small = network()
    small.file(paths.NET_TRAFFIC, "eth1\tfiltered\neth1\ttcp port 80\n.")
    assert [kind for kind, _, _ in found(small)] == ["packet-socket", "traffic-rule"]


def test_a_program_on_a_can_bus_is_a_use() -> None:
    small = network("can0")
    small.file(f"{paths.PROC_CAN}/rcvlist_all", RX_ALL)
    small.file(f"{paths.PROC_CAN}/stats", RX_ALL)
    ((kind, subject, detail),) = found(small)
    assert (kind, subject) == ("packet-socket", "can0")
    assert "CAN frames" in detail
    assert not found(network("can1"))


def engine(driver: str, references: int, module: str = "intel_qat") -> SmallHost:
    small = SmallHost()
    small.function(ENGINE, class_code="0b4000", driver=driver)
    small.link(f"/sys/bus/pci/drivers/{driver}/module", "/sys/module/qat_4xxx")
    small.folders.add("/sys/module/intel_qat/holders/qat_4xxx")
    small.file(
        paths.PROC_CRYPTO,
        f"name : cbc(aes)\ndriver : qat_aes_cbc\nmodule : {module}\nrefcnt : {references}\n\n"
        "name : cbc(aes)\ndriver : cbc-aes-aesni\nmodule : aesni_intel\nrefcnt : 9",
    )
    return small


@pytest.mark.parametrize(
    ("references", "module", "kinds"),
    [
        (1, "intel_qat", []),
        (2, "intel_qat", ["crypto-engine"]),
        (2, "qat_4xxx", ["crypto-engine"]),
        (2, "kernel", []),
    ],
)
def test_a_crypto_engine_is_used_while_an_algorithm_of_its_driver_is(
    references: int, module: str, kinds: list[str]
) -> None:
    assert [kind for kind, _, _ in found(engine("4xxx", references, module), ENGINE)] == kinds


@pytest.mark.parametrize(("driver", "kinds"), [("c6xxvf", ["crypto-engine"]), ("vfio-pci", [])])
def test_a_crypto_engines_vf_counts_while_a_driver_of_the_host_has_it(
    driver: str, kinds: list[str]
) -> None:
    small = engine("c6xx", 2)
    vf = "0000:05:01.0"
    path = small.function(vf, class_code="0b4000", driver=driver)
    small.link(f"{path}/physfn", f"/sys/devices/pci0000:00/{ENGINE}")
    small.link(f"/sys/bus/pci/drivers/{driver}/module", f"/sys/module/{driver}")
    small.folders.add("/sys/module/intel_qat/holders/c6xxvf")
    assert [kind for kind, _, _ in found(small, vf)] == kinds


@pytest.mark.parametrize(
    ("driver", "kinds"), [("virtio_crypto", ["crypto-engine"]), ("virtio_rng", [])]
)
def test_a_virtio_function_is_a_crypto_engine_by_its_driver(driver: str, kinds: list[str]) -> None:
    small = SmallHost()
    path = small.function(ENGINE, class_code="100000", driver="virtio-pci")
    small.link(f"{path}/virtio3/driver", f"/sys/bus/virtio/drivers/{driver}")
    entry = f"name : cbc(aes)\ndriver : virtio_aes\nmodule : {driver}\nrefcnt : 2"
    small.file(paths.PROC_CRYPTO, entry)
    assert [kind for kind, _, _ in found(small, ENGINE)] == kinds


def test_an_algorithm_in_use_is_no_use_of_another_class_of_device() -> None:
    small = engine("4xxx", 2)
    small.function("0000:06:00.0", class_code="00ff00", driver="4xxx")
    assert found(small, "0000:06:00.0") == []


def test_a_zram_device_that_writes_back_is_part_of_the_disks_chain() -> None:
    small = SmallHost()
    small.nvme(DISK, "nvme0n1", "259:0")
    small.block("zram0", "/sys/devices/virtual/block/zram0", "252:0")
    small.file("/sys/devices/virtual/block/zram0/backing_dev", "/dev/nvme0n1")
    small.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 100")
    entries = survey(small.host(), DISK).blockers
    assert [(entry.kind, entry.subject) for entry in entries] == [
        ("swap", "/dev/zram0"),
        ("storage-member", "zram0"),
    ]
    assert entries[1].remedy == "zramctl --reset /dev/zram0"


def test_a_controller_that_is_exported_whole_is_a_use_though_it_has_no_disk() -> None:
    small = SmallHost()
    path = small.function(DISK, class_code="010802", driver="nvme")
    small.file(f"{path}/nvme/nvme0/dev", "241:0")
    line = "through\tpassthru\t/srv/node\t{}\n."
    small.file(paths.BLOCK_TARGETS, line.format("241:0"))
    ((kind, subject, _),) = found(small, DISK)
    assert (kind, subject) == ("storage-member", "through")
    small.file(paths.BLOCK_TARGETS, line.format("241:1"))
    assert "storage-member" not in [kind for kind, _, _ in found(small, DISK)]


def shares(*mounts: str) -> SmallHost:
    """A machine with a shared folder `root` over virtio-9p and these mounts."""
    small = SmallHost()
    path = small.function(DISK, class_code="000200", driver="virtio-pci")
    small.file(f"{path}/virtio0/mount_tag", "root")
    small.link(f"{path}/virtio0/driver", "/sys/bus/virtio/drivers/9pnet_virtio")
    small.mounts(*mounts)
    return small


OVERLAY = "self\t22 1 0:25 / / rw - overlay overlay rw,lowerdir=/lower,upperdir=/u,workdir=/w"


def test_a_shared_folder_may_be_what_a_root_overlay_stands_on() -> None:
    """The initramfs mounted it, and no table shows it since the root was switched."""
    verdict = explain(read_case(shares(OVERLAY).host(), DISK))
    assert ("mounted", "/") in [(entry.kind, entry.subject) for entry in verdict.blockers]
    assert "/ may be on" in verdict.warnings[0]
    assert verdict.next == ()


def test_a_shared_folder_that_is_mounted_elsewhere_may_be_below_the_root_all_the_same() -> None:
    moved = "self\t23 22 0:30 / /run/host rw - 9p root rw"
    verdict = explain(read_case(shares(OVERLAY, moved).host(), DISK))
    subjects = [entry.subject for entry in verdict.blockers if entry.kind == "mounted"]
    assert subjects == ["/run/host", "/"]
    assert verdict.next == ()


def test_a_shared_folder_that_another_overlay_may_stand_on_can_be_given_up() -> None:
    verdict = explain(read_case(shares(OVERLAY.replace(" / rw", " /merged rw")).host(), DISK))
    assert ("mounted", "/merged") in [(entry.kind, entry.subject) for entry in verdict.blockers]
    assert verdict.warnings == ()


@pytest.mark.parametrize(
    "mounts",
    [
        (),
        ("self\t22 1 8:1 / / rw - ext4 /dev/sda1 rw", OVERLAY.replace(" / rw", " /merged rw")),
        (OVERLAY, "self\t23 22 0:30 / /lower rw - 9p other rw"),
        (OVERLAY.replace("=/lower", "=l/ABC"),),
    ],
)
def test_an_overlay_over_what_is_seen_says_nothing_of_a_shared_folder(
    mounts: tuple[str, ...],
) -> None:
    assert found(shares(*mounts), DISK) == []


def far_host(disk: str, path: str, transport: str = "tcp") -> SmallHost:
    """A host whose /var stands on `disk`, and whose card has an address."""
    small = network()
    small.addresses(("eth1", "10.0.0.1/24"))
    small.block(disk, path, "259:7")
    small.block("dm-0", "/sys/devices/virtual/block/dm-0", "253:0")
    small.link(f"/sys/devices/virtual/block/dm-0/slaves/{disk}", path)
    small.file("/sys/class/nvme/nvme3/transport", transport)
    small.mounts("self\t30 1 253:0 / /var rw - ext4 /dev/dm-0 rw")
    return small


def test_volumes_that_form_a_loop_lead_to_no_far_disk() -> None:
    small = far_host("sda", "/sys/devices/pci0000:00/0000:00:01.0/sda")
    lower = "/sys/devices/virtual/block/dm-1"
    small.block("dm-1", lower, "253:1")
    small.link("/sys/devices/virtual/block/dm-0/slaves/dm-1", lower)
    small.link(f"{lower}/slaves/dm-0", "/sys/devices/virtual/block/dm-0")
    assert vital_over_network(Sight(small.host())) is None


@pytest.mark.parametrize(
    ("disk", "path", "transport", "words"),
    [
        ("sdx", "/sys/devices/platform/host7/session1/target7:0:0/block/sdx", "", "iSCSI"),
        ("nbd0", "/sys/devices/virtual/block/nbd0", "", "nbd"),
        ("nvme3n1", "/sys/devices/virtual/nvme-fabrics/ctl/nvme3/nvme3n1", "tcp", "NVMe over TCP"),
        ("nvme3n1", "/sys/devices/virtual/nvme-fabrics/ctl/nvme3/nvme3n1", "rdma", "over RDMA"),
        ("nvme3n1", "/sys/devices/virtual/nvme-fabrics/ctl/nvme3/nvme3n1", "loop", None),
        ("sdx", "/sys/devices/pci0000:00/0000:00:1f.2/ata1/host0/block/sdx", "", None),
    ],
)
def test_no_address_is_ended_where_the_host_runs_from_a_far_disk(
    disk: str, path: str, transport: str, words: str | None
) -> None:
    verdict = explain(read_case(far_host(disk, path, transport).host(), NIC))
    if words is None:
        assert verdict.warnings == ()
    else:
        assert words in verdict.warnings[0]
        assert verdict.next == ()


def test_a_far_disk_under_native_multipath_is_known_by_its_path() -> None:
    small = far_host("nvme2n1", "/sys/devices/virtual/nvme-subsystem/nvme-subsys2/nvme2n1")
    hidden = "/sys/devices/virtual/nvme-fabrics/ctl/nvme3/nvme2c3n1"
    small.block("nvme2c3n1", hidden, "")
    verdict = explain(read_case(small.host(), NIC))
    assert "NVMe over TCP" in verdict.warnings[0]


def test_actions_that_no_filter_has_redirect_nothing() -> None:
    def message(bound: int) -> bytes:
        parameters = struct.pack("=IIiiiiI", 1, 0, 4, 1, bound, 1, 7)
        action = nested(1, string(1, "mirred"), nested(2, nested(2, parameters, flag=False)))
        return bytes(4) + nested(1, action, flag=False)

    assert list(parse_redirects(message(1))) == [7]
    assert list(parse_redirects(message(0))) == []
    assert list(parse_redirects(message(1)[:30])) == []


def test_only_disciplines_with_hooks_are_asked_for_filters() -> None:
    def message(kind: str) -> bytes:
        return struct.pack("=B3xiIII", 0, 5, 0, 0, 0) + string(1, kind)

    assert list(parse_hooked(message("clsact"))) == [5]
    assert list(parse_hooked(message("ingress"))) == [5]
    assert list(parse_hooked(message("fq_codel"))) == []
    assert list(parse_hooked(b"")) == []


def test_a_socket_is_told_by_the_interface_that_it_is_bound_to() -> None:
    def message(index: int) -> bytes:
        return (
            struct.pack("=4B", 2, 10, 0, 0)
            + struct.pack(">H", 67)
            + bytes(34)
            + struct.pack("=I", index)
            + bytes(28)
        )

    assert list(parse_socket("udp", message(3))) == [BoundSocket(3, "udp", 67)]
    assert list(parse_socket("udp", message(0))) == []
    assert list(parse_socket("udp", message(3)[:43])) == []


def test_a_socket_of_this_machine_that_is_bound_is_found() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        try:
            service.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        except PermissionError:
            pytest.skip("binding to an interface needs CAP_NET_RAW here")
        service.bind(("127.0.0.1", 0))
        port = service.getsockname()[1]
        sockets = list(read_bound_sockets())
    if not sockets:
        pytest.skip("this kernel has no socket diagnosis")
    assert BoundSocket(socket.if_nametoindex("lo"), "udp", port) in sockets


LINK_LOCAL = """
import re, socket, subprocess
from vfiotool.netlink.traffic import read_bound_sockets

def ip(command):
    return subprocess.run(["ip", *command.split()], capture_output=True, text=True).stdout

ip("link add v0 type veth peer name v1")
for name in ("lo", "v0", "v1"):
    ip(f"link set {name} up")
for name in ("v0", "v1"):
    while "tentative" in (text := ip(f"-6 address show dev {name}")) or "fe80" not in text:
        pass
service = socket.create_server(("::", 7000), family=socket.AF_INET6)
plain = socket.create_connection(("::1", 7000))
print({item.index for item in read_bound_sockets()})
address = re.search("fe80[^/ ]*", ip("-6 address show dev v1"))[0]
connection = socket.create_connection((f"{address}%v0", 7000), timeout=30)
ends = {socket.if_nametoindex("v0"), socket.if_nametoindex("v1")}
print({item.index for item in read_bound_sockets()} == ends)
"""


def test_a_connection_over_a_link_local_address_is_found() -> None:
    """The interface has no address that somebody gave it, and the connection ends with it."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("no iproute2 or util-linux here")
    command = ["unshare", "--net", sys.executable, "-c", LINK_LOCAL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "Operation not permitted" in done.stderr:
        pytest.skip("a network namespace needs CAP_SYS_ADMIN")
    assert done.stdout.splitlines() == ["set()", "True"], done.stderr


def test_a_kernel_without_the_socket_diagnosis_has_no_sockets_to_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        text = "open a netlink socket of protocol 4: Protocol not supported"
        raise Unsupported(text, errno_name="EPROTONOSUPPORT")

    monkeypatch.setattr(traffic, "Socket", refuse)
    assert list(read_bound_sockets()) == []
    assert read_redirected() == frozenset()
    assert read_filtered() == frozenset()


@pytest.mark.parametrize("number", ["EOPNOTSUPP", "ENOTSUP"])
def test_a_kernel_without_tc_has_no_rules_to_tell(
    monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """95 has two names: the kernel's, and the one that Python takes."""

    def refuse(*_: object) -> None:
        raise KernelError("list tc actions", errno_name=number)

    monkeypatch.setattr(traffic, "Socket", refuse)
    assert read_redirected() == frozenset()
    assert read_filtered() == frozenset()


def test_a_kernel_without_a_protocols_diagnosis_has_no_sockets_of_it_to_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise KernelError("list raw sockets", errno_name="ENOENT")

    monkeypatch.setattr(traffic, "Socket", refuse)
    assert list(read_bound_sockets()) == []


@pytest.mark.parametrize("number", ["EINVAL", "EPERM", "ENOBUFS", "EINTR", "ETIMEDOUT"])
def test_a_dump_that_fails_is_no_dump_without_entries(
    monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    def fail(*_: object) -> None:
        raise KernelError("list tc actions", errno_name=number)

    monkeypatch.setattr(traffic, "Socket", fail)
    for look in (read_redirected, read_filtered, lambda: list(read_bound_sockets())):
        with pytest.raises(KernelError):
            look()


def test_a_protocol_of_the_kernels_own_is_a_use() -> None:
    small = network()
    table = (
        "Type Device      Function\n0800          ip_rcv\n88ca eth1     tipc_l2_rcv_msg [tipc]\n"
    )
    small.file("/proc/net/ptype", table)
    ((kind, subject, detail),) = found(small)
    assert (kind, subject) == ("packet-socket", "eth1")
    assert "(tipc_l2_rcv_msg [tipc])" in detail


@pytest.mark.parametrize(
    "row", ["ALL  eth1     packet_rcv", "0004          llc_rcv [llc]", "88ca eth9 x"]
)
def test_what_serves_all_interfaces_or_another_is_none_of_this(row: str) -> None:
    small = network()
    small.file("/proc/net/ptype", f"Type Device      Function\n{row}\n")
    assert found(small) == []


def test_an_rdma_device_that_stands_on_an_interface_is_a_use() -> None:
    small = network()
    for name, place in (("rxe0", "virtual"), ("mlx5_0", "pci0000:00/0000:02:00.0")):
        real = f"/sys/devices/{place}/infiniband/{name}"
        small.link(f"/sys/class/infiniband/{name}", real)
        small.file(f"{real}/ports/1/gid_attrs/ndevs/0", "eth1")
    assert [(kind, subject) for kind, subject, _ in found(small)] == [("bridge-or-bond", "rxe0")]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("321", "nsenter --target 321 --net"),
        ("/run/netns/a b", "nsenter --net='/run/netns/a b'"),
        ("321/task/322", "nsenter --net=/proc/321/task/322/ns/net"),
    ],
)
def test_a_command_in_a_namespace_begins_with_what_enters_it(where: str, words: str) -> None:
    assert in_namespace(where) == words


@pytest.mark.parametrize("number", ["EMFILE", "ENOBUFS", "EPERM", "EAFNOSUPPORT"])
def test_a_socket_that_cannot_be_had_is_no_kernel_without_the_facility(
    monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """Out of descriptors, or under a filter of system calls: nothing was seen."""

    def refuse(*_: object) -> None:
        raise Unsupported("open a netlink socket of protocol 4", errno_name=number)

    monkeypatch.setattr(traffic, "Socket", refuse)
    for read in (read_bound_sockets, read_redirected, read_filtered):
        with pytest.raises(Unsupported):
            list(read())


def test_an_xdp_socket_is_told_by_its_interface_and_queue() -> None:
    def message(index: int) -> bytes:
        info = struct.pack("=HHII", 12, 1, index, 3)
        return struct.pack("=BBxxI8x", 44, 3, 77) + struct.pack("=HHI", 8, 0, 0) + info

    assert list(parse_xdp_socket(message(5))) == [BoundSocket(5, "xdp queue 3", 0)]
    assert list(parse_xdp_socket(message(0))) == []
    assert list(parse_xdp_socket(message(5)[:-1])) == []


@pytest.mark.parametrize(
    ("state", "ends", "said"),
    [
        (10, (0xFFFFFFFF, 22, 0xFFFFFFFF, 0xFFFFFFFF), ["a program listens on port 22"]),
        (1, (3, 1024, 2, 22), ["a program is connected with port 22 of context 2"]),
        (1, (1, 1024, 1, 22), []),
    ],
)
def test_a_vsock_socket_is_told_unless_it_stays_within(
    state: int, ends: tuple[int, ...], said: list[str]
) -> None:
    payload = struct.pack("=BBBxIIII12x", 40, 1, state, *ends)
    assert list(parse_vsock_socket(payload)) == said
    assert list(parse_vsock_socket(payload[:10])) == []


def test_xdp_sockets_that_no_diagnosis_tells_are_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_net, "_socket_counts", lambda: {"XDP": 1})
    monkeypatch.setattr(observe_net, "has_tcx", lambda index: False)
    monkeypatch.setattr(traffic, "read_xdp_sockets", lambda: iter(()))
    assert "!\tXDP sockets" in observe_net.net_traffic()
    monkeypatch.setattr(traffic, "read_xdp_sockets", lambda: iter([BoundSocket(1, "xdp q 0", 0)]))
    told = observe_net.net_traffic()
    assert "lo\txdp q 0" in told
    assert "!" not in told


def test_a_disk_over_ethernet_is_a_use_of_the_interface_that_leads_there() -> None:
    """It needs no address, and no socket: the kernel sends its frames."""
    small = SmallHost()
    small.network(NIC, "eth1")
    small.block("etherd!e1.1", "/sys/devices/virtual/block/etherd!e1.1", "152:16")
    small.file("/sys/class/block/etherd!e1.1/netif", "eth7,eth9")
    assert survey(small.host(), NIC).blockers == ()
    small.file("/sys/class/block/etherd!e1.1/netif", "eth7,eth1")
    (entry,) = survey(small.host(), NIC).blockers
    assert (entry.kind, entry.subject) == ("packet-socket", "eth1")
    assert "etherd!e1.1" in entry.detail


def test_an_interface_that_multicasts_are_routed_over_is_in_use() -> None:
    """A router needs no address of it but the link-local one that the kernel gave."""
    small = network()
    head = "Interface      BytesIn  PktsIn  BytesOut PktsOut Flags"
    small.file(paths.PROC_MULTICAST6, f"{head}\n 0 eth9  0 0 0 0 00000")
    assert found(small) == []
    small.file(paths.PROC_MULTICAST6, f"{head}\n 0 eth9  0 0 0 0 00000\n 1 eth1  0 0 0 0 00000")
    ((kind, subject, detail),) = found(small)
    assert (kind, subject) == ("packet-socket", "eth1")
    assert "multicast routing" in detail
