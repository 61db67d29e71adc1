"""The netlink codec against pyroute2, against the running kernel, and against garbage."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2 import IPRoute
from pyroute2.netlink import nla, nlmsg
from pyroute2.netlink.devlink import DEVLINK_CMD_ESWITCH_GET, DEVLINK_CMD_ESWITCH_SET, devlinkcmd
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from vfiotool.errors import KernelError, NotPermitted, Stuck, Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree
from vfiotool.netlink import codec as netlink
from vfiotool.netlink.codec import Message, Request, Socket
from vfiotool.netlink.devlink import get_eswitch, parse_eswitch, read_eswitch, set_eswitch
from vfiotool.netlink.route import (
    VfSettings,
    parse_address,
    parse_link,
    parse_vf_list,
    read_addresses,
    read_links,
    set_vf,
)


class Oracle(nlmsg):
    """A message of pyroute2's with each shape of attribute that our builders make."""

    fields = (("cmd", "B"), ("version", "B"), ("reserved", "H"))
    nla_map = (
        ("A_UNSPEC", "none"),
        ("A_U8", "uint8"),
        ("A_U16", "uint16"),
        ("A_U32", "uint32"),
        ("A_U64", "uint64"),
        ("A_TEXT", "asciiz"),
        ("A_NEST", "nest"),
    )

    class nest(nla):
        nla_map = (("N_UNSPEC", "none"), ("N_TEXT", "asciiz"), ("N_U16", "uint16"))


def oracle_decode(cls: type[nlmsg], data: bytes) -> nlmsg:
    message = cls(data)
    message.decode()
    return message


def test_pyroute2_reads_what_the_builders_make() -> None:
    payload = netlink.generic(
        7,
        2,
        netlink.u8(1, 200),
        netlink.u16(2, 60000),
        netlink.u32(3, 1 << 31),
        netlink.u64(4, 1 << 63),
        netlink.string(5, "vdpa0"),
        netlink.nested(6, netlink.string(1, "inner"), netlink.u16(2, 5)),
    )
    message = oracle_decode(Oracle, netlink.encode(0x20, 1, 3, payload))
    assert (message["cmd"], message["version"]) == (7, 2)
    assert [message.get_attr(f"A_{name}") for name in ("U8", "U16", "U32", "U64", "TEXT")] == [
        200,
        60000,
        1 << 31,
        1 << 63,
        "vdpa0",
    ]
    nest = message.get_attr("A_NEST")
    assert (nest.get_attr("N_TEXT"), nest.get_attr("N_U16")) == ("inner", 5)


def test_what_pyroute2_makes_is_read_the_same() -> None:
    message = Oracle()
    message["cmd"] = 9
    message["header"]["sequence_number"] = 77
    message["attrs"] = [
        ["A_TEXT", "name"],
        ["A_U64", 1 << 40],
        ["A_NEST", {"attrs": [["N_U16", 12]]}],
    ]
    message.encode()
    (parsed,) = netlink.decode(bytes(message.data))
    command, attributes = netlink.parse_generic(parsed)
    assert (parsed.sequence, command) == (77, 9)
    assert netlink.as_text(attributes[5]) == "name"
    assert netlink.as_int(attributes[4]) == 1 << 40
    assert netlink.as_int(netlink.parse_attributes(attributes[6])[2]) == 12


def test_a_vf_request_is_what_pyroute2_understands() -> None:
    settings = VfSettings(
        index=3,
        mac="52:54:00:00:00:01",
        vlan=10,
        qos=5,
        spoof_check=False,
        trust=True,
        min_rate_mbps=10,
        max_rate_mbps=1000,
        link_state=1,
    )
    request = set_vf(17, settings)
    message = oracle_decode(ifinfmsg, netlink.encode(request.type, 5, 1, request.payload))
    assert message["index"] == 17
    vf = message.get_attr("IFLA_VFINFO_LIST").get_attr("IFLA_VF_INFO")
    vlan, rate = vf.get_attr("IFLA_VF_VLAN"), vf.get_attr("IFLA_VF_RATE")
    assert vf.get_attr("IFLA_VF_MAC")["mac"] == "52:54:00:00:00:01"
    assert (vlan["vf"], vlan["vlan"], vlan["qos"]) == (3, 10, 5)
    assert (rate["vf"], rate["min_tx_rate"], rate["max_tx_rate"]) == (3, 10, 1000)
    assert vf.get_attr("IFLA_VF_SPOOFCHK")["spoofchk"] == 0
    assert vf.get_attr("IFLA_VF_TRUST")["trust"] == 1
    assert vf.get_attr("IFLA_VF_LINK_STATE")["link_state"] == 1
    # The kernel answers in the form that it takes.
    assert parse_vf_list(request.payload) == [settings]


def test_settings_that_are_not_given_are_not_sent() -> None:
    request = set_vf(17, VfSettings(index=0, trust=False))
    message = oracle_decode(ifinfmsg, netlink.encode(request.type, 5, 1, request.payload))
    vf = message.get_attr("IFLA_VFINFO_LIST").get_attr("IFLA_VF_INFO")
    assert [name for name, _ in vf["attrs"]] == ["IFLA_VF_TRUST"]


@pytest.mark.parametrize("mac", ["", "52:54", "52:54:00:00:00:01:02", "zz:54:00:00:00:01"])
def test_a_malformed_mac_is_refused_before_anything_is_sent(mac: str) -> None:
    with pytest.raises(KernelError, match="is not a MAC address"):
        set_vf(17, VfSettings(index=0, mac=mac))


def test_unreported_vf_settings_are_none() -> None:
    mac = struct.pack("=I", 1) + bytes.fromhex("525400000001") + bytes(26)
    spoof = struct.pack("=2I", 1, 0xFFFFFFFF)
    values = netlink.nested(1, netlink.attribute(1, mac), netlink.attribute(4, spoof))
    payload = bytes(16) + netlink.nested(22, values)
    assert parse_vf_list(payload) == [VfSettings(1, mac="52:54:00:00:00:01")]


def test_links_are_those_that_pyroute2_lists() -> None:
    with IPRoute() as oracle:
        expected = {(link["index"], link.get_attr("IFLA_IFNAME")) for link in oracle.get_links()}
    assert {(link.index, link.name) for link in read_links()} == expected


def test_addresses_are_those_that_pyroute2_lists() -> None:
    with IPRoute() as oracle:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in oracle.get_links()}
        expected = {
            (
                names[entry["index"]],
                f"{entry.get_attr('IFA_LOCAL') or entry.get_attr('IFA_ADDRESS')}"
                f"/{entry['prefixlen']}",
            )
            for entry in oracle.get_addr()
        }
    assert set(read_addresses()) == expected
    assert ("lo", "127.0.0.1/8") in expected


def test_on_a_point_to_point_link_the_own_end_is_told_not_the_peers() -> None:
    message = ifaddrmsg()
    message["family"], message["prefixlen"], message["index"] = 2, 32, 4
    message["attrs"] = [["IFA_ADDRESS", "10.0.0.2"], ["IFA_LOCAL", "10.0.0.1"]]
    message.encode()
    (parsed,) = netlink.decode(bytes(message.data))
    assert parse_address(parsed.payload) == (4, "10.0.0.1/32")


def test_a_family_is_resolved_as_pyroute2_resolves_it() -> None:
    with Socket(netlink.NETLINK_GENERIC) as channel:
        assert netlink.resolve_family(channel, "nlctrl") == 0x10


def test_an_absent_family_is_unsupported_and_names_the_module() -> None:
    with (
        Socket(netlink.NETLINK_GENERIC) as channel,
        pytest.raises(Unsupported, match="no netlink family 'vfiotool-none'") as caught,
    ):
        netlink.resolve_family(channel, "vfiotool-none")
    assert "modprobe vfiotool-none" in (caught.value.hint or "")


def test_the_kernels_errno_and_words_are_in_the_error() -> None:
    # An interface index that nothing has; strict checking makes the kernel say more of a bad dump.
    with Socket(netlink.NETLINK_ROUTE) as channel:
        with pytest.raises(KernelError, match=r"look at interface 2147483000.*ENODEV") as caught:
            payload = struct.pack("=BxHiII", 0, 0, 2147483000, 0, 0)
            channel.request(18, payload, 0, "look at interface 2147483000")
        assert caught.value.errno_name == "ENODEV"
        with pytest.raises(KernelError, match="the kernel says: "):
            channel.dump(18, struct.pack("=BxHiII", 0, 5, 0, 0, 0), "dump with a bad header")


def test_a_socket_is_usable_after_an_error() -> None:
    with Socket(netlink.NETLINK_ROUTE) as channel:
        with pytest.raises(KernelError):
            channel.request(18, struct.pack("=BxHiII", 0, 0, 2147483000, 0, 0), 0, "x")
        answers = channel.dump(18, struct.pack("=BxHiII", 0, 0, 0, 0, 0), "list interfaces")
    assert "lo" in {parse_link(message.payload).name for message in answers}


def ext_ack(kind: int, flags: int, words: str) -> Message:
    attributes = netlink.string(1, words)
    head = struct.pack("=i", -22)
    if kind == netlink.NLMSG_ERROR:
        original = netlink.encode(19, 5, 1, b"12345678")
        head += original[:16] if flags & netlink.NLM_F_CAPPED else original
    return Message(kind, flags | netlink.NLM_F_ACK_TLVS, 1, head + attributes)


@pytest.mark.parametrize("kind", [netlink.NLMSG_ERROR, netlink.NLMSG_DONE])
@pytest.mark.parametrize("flags", [0, netlink.NLM_F_CAPPED])
def test_extended_acknowledgements_are_found_behind_the_original_message(
    kind: int, flags: int
) -> None:
    assert netlink.parse_error(ext_ack(kind, flags, "no such VF")) == (22, "no such VF")


@given(st.binary(max_size=200))
def test_attributes_of_any_bytes_are_within_them(data: bytes) -> None:
    total = sum(4 + len(value) for _, value in netlink.iterate_attributes(data))
    assert total <= len(data)


@given(st.binary(max_size=200), st.integers(0, 0xFFFF))
def test_messages_of_any_bytes_are_parsed_without_an_error(data: bytes, flags: int) -> None:
    for message in netlink.decode(data):
        netlink.parse_error(message)
        netlink.parse_generic(message)
    netlink.parse_error(Message(netlink.NLMSG_ERROR, flags, 1, data))
    parse_address(data)
    if len(data) >= 16:
        parse_link(data)
        parse_vf_list(data)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_survive_a_round_trip(pairs: list[tuple[int, bytes]]) -> None:
    data = b"".join(netlink.attribute(kind, value) for kind, value in pairs)
    assert list(netlink.iterate_attributes(data)) == pairs


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        netlink.attribute(1, bytes(1 << 16))
    with pytest.raises(ValueError, match="NUL"):
        netlink.string(1, "a\0b")


def test_a_root_that_is_no_running_machine_takes_no_netlink() -> None:
    host = Host(MemoryTree({}, {}), live=False, name="a snapshot")
    with pytest.raises(UsageError, match="snapshot is not the running host"):
        host.send_netlink(set_vf(1, VfSettings(0, trust=True)))


def test_a_fake_kernel_can_stand_in_for_the_kernel() -> None:
    class Fake(MemoryTree):
        def send_netlink(self, request: Request, timeout_s: float) -> list[Message]:
            assert (request.what, timeout_s) == ("set VF 0 of interface 1", 3.0)
            return [Message(1, 2, 3, b"answer")]

    host = Host(Fake({}, {}), live=True, name="fake")
    answers = host.send_netlink(set_vf(1, VfSettings(0, trust=True)), 3.0)
    assert answers == [Message(1, 2, 3, b"answer")]


def harmless(what: str) -> Request:
    """A look at one interface, sent in the way that is meant for changes."""
    return Request(netlink.NETLINK_ROUTE, 18, struct.pack("=BxHiII", 0, 0, 1, 0, 0), what=what)


def test_the_live_write_path_returns_answers_and_errors_across_its_child() -> None:
    host = Host.local()
    (answer,) = host.send_netlink(harmless("look at lo"))
    assert parse_link(answer.payload).name == "lo"
    absent = Request(
        netlink.NETLINK_ROUTE, 18, struct.pack("=BxHiII", 0, 0, 2147483000, 0, 0), what="look"
    )
    with pytest.raises(KernelError, match=r"look: .*ENODEV"):
        host.send_netlink(absent)


def test_the_live_write_path_gives_up_on_a_kernel_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import time

    from vfiotool.netlink import codec

    def hang(request: Request, timeout_s: float) -> list[Message]:
        time.sleep(5)
        raise NotPermitted("never")

    monkeypatch.setattr(codec, "send", hang)
    with pytest.raises(Stuck, match=r"look: no answer after 0\.2 s"):
        Host.local().send_netlink(harmless("look"), 0.2)


def test_an_eswitch_request_is_what_pyroute2_understands() -> None:
    for mode, number in (("legacy", 0), ("switchdev", 1)):
        request = set_eswitch(29, "0000:0a:00.0", mode)
        message = oracle_decode(devlinkcmd, netlink.encode(request.type, 5, 1, request.payload))
        assert (message["cmd"], message["version"]) == (DEVLINK_CMD_ESWITCH_SET, 1)
        assert message.get_attr("DEVLINK_ATTR_BUS_NAME") == "pci"
        assert message.get_attr("DEVLINK_ATTR_DEV_NAME") == "0000:0a:00.0"
        assert message.get_attr("DEVLINK_ATTR_ESWITCH_MODE") == number
    question = get_eswitch(29, "0000:0a:00.0")
    message = oracle_decode(devlinkcmd, netlink.encode(question.type, 5, 1, question.payload))
    assert message["cmd"] == DEVLINK_CMD_ESWITCH_GET
    assert message.get_attr("DEVLINK_ATTR_DEV_NAME") == "0000:0a:00.0"
    with pytest.raises(KernelError, match="is no eswitch mode"):
        set_eswitch(29, "0000:0a:00.0", "both")


@pytest.mark.parametrize(("number", "mode"), [(0, "legacy"), (1, "switchdev"), (2, None)])
def test_an_eswitch_answer_of_pyroute2_is_read(number: int, mode: str | None) -> None:
    message = devlinkcmd()
    message["cmd"], message["version"] = DEVLINK_CMD_ESWITCH_GET, 1
    message["attrs"] = [["DEVLINK_ATTR_ESWITCH_MODE", number]]
    message.encode()
    (parsed,) = netlink.decode(bytes(message.data))
    assert parse_eswitch(parsed) == mode


def test_this_kernel_takes_the_eswitch_question() -> None:
    try:
        # No card stands there: devlink looks it up by bus and name, and says ENODEV.
        assert read_eswitch("ffff:1f:1f.7", 5.0) is None
    except (NotPermitted, Unsupported) as error:
        pytest.skip(error.message)
