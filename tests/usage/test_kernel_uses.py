"""Uses of an interface that need neither an address nor a socket that is bound to it."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.errors import KernelError, Unsupported
from vfiotool.host import observe_net, paths
from vfiotool.host.observe_net import parse_groups4, parse_groups6
from vfiotool.netlink import routes, traffic
from vfiotool.netlink.codec import Message, attribute, u32
from vfiotool.netlink.routes import Route, parse_next_hop, parse_route, read_routes
from vfiotool.netlink.traffic import parse_can_route
from vfiotool.usage.blocker import Blocker
from vfiotool.usage.survey import survey

NIC = "0000:02:00.0"
PEER = bytes.fromhex("fe80000000000000000000000000000a")


@pytest.fixture
def small() -> SmallHost:
    small = SmallHost()
    small.network(NIC, "eth1")
    return small


def uses(small: SmallHost) -> list[Blocker]:
    return list(survey(small.host(), NIC).blockers)


@pytest.mark.parametrize("given", ["fe80::1/64", "fe80::ffff:1/64", "fe80::5/10"])
def test_a_link_local_address_that_was_given_by_hand_is_a_use(small: SmallHost, given: str) -> None:
    small.addresses(("eth1", given))
    (entry,) = uses(small)
    assert (entry.kind, entry.detail) == ("route", f"eth1 has {given}")


@pytest.mark.parametrize(
    "made", ["fe80::5054:ff:fe12:3456/64", "fe80::1:0:0:1/64", "fe80::8d21:9be0:1c5c:7a11/64"]
)
def test_a_link_local_address_that_was_made_by_itself_is_no_use(
    small: SmallHost, made: str
) -> None:
    small.addresses(("eth1", made))
    assert uses(small) == []


def mpls(*attributes: bytes) -> bytes:
    return struct.pack("=8BI", 28, 20, 0, 0, 254, 4, 0, 1, 0) + b"".join(attributes)


def test_a_route_of_a_label_leads_over_its_interfaces() -> None:
    label = attribute(1, struct.pack(">I", 100 << 12 | 1 << 8))
    via = attribute(18, struct.pack("=H", 10) + PEER)
    assert parse_route(mpls(label, u32(4, 3), via)) == [
        Route(3, "label 100", "fe80::a", 254, automatic=False)
    ]
    hops = struct.pack("=HBBi", 8, 0, 0, 4) + struct.pack("=HBBi", 8, 0, 0, 5)
    found = parse_route(mpls(label, attribute(9, hops)))
    assert [route.index for route in found] == [4, 5]
    assert parse_route(mpls(u32(4, 3)))[0].target == "label"
    assert parse_route(mpls(label)) == []


def test_a_next_hop_that_routes_share_leads_over_its_interface() -> None:
    head = struct.pack("=BBBBI", 10, 0, 4, 0, 0)
    payload = head + u32(1, 5) + u32(5, 3) + attribute(6, PEER)
    assert parse_next_hop(payload) == [Route(3, "nexthop 5", "fe80::a", 254, automatic=False)]
    assert parse_next_hop(head + u32(1, 5)) == []  # a black hole, or a group of others


class Answers:
    """A netlink socket whose kernel has what `told` says, by message type and family."""

    def __init__(self, told: dict[tuple[int, int], bytes | Exception]) -> None:
        self.told = told

    def __call__(self, _: int) -> Answers:
        return self

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def dump(self, kind: int, payload: bytes, _: str) -> list[Message]:
        answer = self.told.get((kind, payload[0]), b"")
        if isinstance(answer, Exception):
            raise answer
        return [Message(kind - 2, 0, 0, answer)] if answer else []


def test_labels_are_asked_of_a_kernel_that_has_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another answers with the routes of all families."""
    label = mpls(attribute(1, struct.pack(">I", 7 << 12)), u32(4, 3))
    hop = struct.pack("=BBBBI", 2, 0, 4, 0, 0) + u32(1, 9) + u32(5, 4)
    answers = Answers({(26, 28): label, (26, 2): label, (106, 0): hop})
    monkeypatch.setattr(routes, "Socket", answers)
    assert [route.target for route in read_routes(mpls=True)] == ["label 7", "nexthop 9"]
    assert [route.target for route in read_routes()] == ["nexthop 9"]


def test_a_kernel_without_next_hops_has_none_and_a_dump_that_fails_is_not_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Unsupported("list next hops", errno_name="EOPNOTSUPP")
    monkeypatch.setattr(routes, "Socket", Answers({(106, 0): old}))
    assert list(read_routes()) == []
    failed = KernelError("list next hops", errno_name="ENOBUFS")
    monkeypatch.setattr(routes, "Socket", Answers({(106, 0): failed}))
    with pytest.raises(KernelError):
        list(read_routes())


@pytest.mark.parametrize(
    ("told", "evidence", "remedy"),
    [
        (
            ["label 100 via fe80::99"],
            "ip -family mpls route show dev eth1",
            "ip -family mpls route flush dev eth1",
        ),
        (["nexthop 5"], "ip nexthop show dev eth1", "ip nexthop flush dev eth1"),
        (
            ["10.9.0.0/16 table 7", "nexthop 5"],
            "ip nexthop show dev eth1; ip route show table all dev eth1",
            "ip nexthop flush dev eth1; ip route flush table all dev eth1",
        ),
        (["10.9.0.0/16"], "/proc/net/route name eth1", "ip route flush table all dev eth1"),
    ],
)
def test_a_route_of_any_kind_is_a_use_with_what_shows_and_ends_it(
    small: SmallHost, told: list[str], evidence: str, remedy: str
) -> None:
    small.file(paths.NET_ROUTES, "".join(f"eth1\t{text}\n" for text in told) + ".")
    (entry,) = uses(small)
    assert (entry.kind, entry.evidence, entry.remedy) == ("route", evidence, remedy)


@pytest.mark.parametrize(
    ("fact", "evidence"),
    [
        ("forwards CAN frames", "cangw -L"),
        ("receives multicasts for a program", "ip maddress show dev eth1"),
        ("has an LLC socket", "/proc/net/llc/socket has the address of eth1"),
        ("speaks AppleTalk", "/proc/net/atalk/interface names eth1"),
        ("sends generated packets (pktgen)", "/proc/net/pktgen/eth1"),
    ],
)
def test_what_the_kernel_does_with_an_interface_is_a_use(
    small: SmallHost, fact: str, evidence: str
) -> None:
    small.file(paths.NET_TRAFFIC, f"eth1\tthe kernel {fact}\neth1\tudp port 67\n.")
    first, second = uses(small)
    assert (first.kind, first.detail) == ("packet-socket", f"the kernel {fact} over eth1")
    assert first.evidence == evidence
    assert "udp port 67" in second.detail and "kernel" not in second.detail
    small.file(paths.NET_TRAFFIC, f"eth9\tthe kernel {fact}\n.")
    assert uses(small) == []


def test_a_can_gateway_uses_both_its_interfaces() -> None:
    head = struct.pack("=BBH", 29, 1, 0)
    assert list(parse_can_route(head + u32(9, 3) + u32(10, 4))) == [3, 4]
    # What a kernel answers that has no CAN gateway: another family's routes.
    other = struct.pack("=BBH", 2, 1, 0)
    assert list(parse_can_route(other + u32(9, 3) + u32(10, 4))) == []


def in_memory(group: str) -> str:
    """As the kernel prints four bytes of memory as one number."""
    return f"{int.from_bytes(bytes.fromhex(group), sys.byteorder):08X}"


def test_multicasts_of_a_program_are_told_from_those_of_every_interface() -> None:
    def table(*groups: str) -> list[str]:
        return [
            "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter",
            "1\tlo        :     1      V3",
            f"\t\t\t\t{in_memory('e0000001')}     1 0:00000000\t\t0",
            "2\teth1      :     2      V3",
            *(f"\t\t\t\t{in_memory(group)}     1 0:00000000\t\t0" for group in groups),
        ]

    # All hosts, mDNS, LLMNR, SSDP.
    assert list(parse_groups4(table("e0000001", "e00000fb", "e00000fc", "effffffa"))) == []
    assert list(parse_groups4(table("ef010203", "e0000001"))) == ["eth1"]
    rows = [
        "2    eth1            ff0200000000000000000001ff123456     1 00000004 0",
        "2    eth1            ff020000000000000000000000010003     1 00000004 0",
        "2    eth1            ff050000000000000000000000000002     1 00000004 0",
        "2    eth1            ff0e000000000000000000000000000c     1 00000004 0",
        "2    eth1            ff010000000000000000000000000001     1 00000004 0",
    ]
    assert list(parse_groups6(rows)) == []
    rows.append("3    eth2            ff0e0000000000000000000000001234     1 00000004 0")
    assert list(parse_groups6(rows)) == ["eth2"]


def test_what_the_kernels_tables_name_is_told_with_their_interfaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, talk = tmp_path / "pktgen", tmp_path / "atalk"
    generator.mkdir()
    for name in ("pgctrl", "kpktgend_0", "eth1@0"):
        (generator / name).touch()
    head = "Interface        Address   Networks  Status"
    talk.write_text(f"{head}\neth2             FF01:05   FF00-FFFE  0\n")
    monkeypatch.setattr(observe_net, "PROC_PACKET_GENERATOR", str(generator))
    monkeypatch.setattr(observe_net, "PROC_APPLETALK", str(talk))
    monkeypatch.setattr(observe_net, "SYS_CAN_GATEWAY", str(tmp_path))
    stations = tmp_path / "llc"
    stations.write_text(
        "SKt Mc local_mac_sap        remote_mac_sap       tx_queue rx_queue st uid link\n"
        " 2   0 52:54:00:00:03:00@42 00:00:00:00:00:00@00        0        0  7   0    0\n"
    )
    monkeypatch.setattr(observe_net, "PROC_LLC", str(stations))
    monkeypatch.setattr(observe_net, "SYS_NET", str(tmp_path))
    (tmp_path / "lo").mkdir()
    (tmp_path / "lo/address").write_text("52:54:00:00:03:00\n")
    job = struct.pack("=BBH", 29, 1, 0) + u32(9, 1) + u32(10, 77)
    monkeypatch.setattr(traffic, "Socket", Answers({(26, 29): job}))
    told = observe_net.net_traffic().splitlines()
    assert "eth1\tthe kernel sends generated packets (pktgen)" in told
    assert "eth2\tthe kernel speaks AppleTalk" in told
    assert "lo\tthe kernel has an LLC socket" in told
    (tmp_path / "lo/address").write_text("52:54:00:00:03:01\n")
    assert "LLC" not in observe_net.net_traffic()
    assert "lo\tthe kernel forwards CAN frames" in told
    assert "#77\tthe kernel forwards CAN frames" in told


def test_a_table_that_cannot_be_read_is_no_table_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe_net, "PROC_APPLETALK", str(tmp_path))
    with pytest.raises(IsADirectoryError):
        observe_net.net_traffic()
    monkeypatch.setattr(observe_net, "PROC_APPLETALK", str(tmp_path / "absent"))
    observe_net.net_traffic()
