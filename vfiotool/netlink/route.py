"""Interfaces, addresses and the settings of VFs over rtnetlink.

Source: include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h; Documentation/networking/netdevices.
What reads opens a socket; what changes makes a `Request`, which `Host.netlink` sends: the host's
one way of netlink changes, as `Host.write_attribute` is of attributes.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from vfiotool.errors import KernelError
from vfiotool.netlink.codec import (
    NETLINK_ROUTE,
    Request,
    Socket,
    as_int,
    as_text,
    attribute,
    iterate_attributes,
    nested,
    parse_attributes,
    u32,
)

_RTM_GETLINK = 18
_RTM_SETLINK = 19
_RTM_GETADDR = 22
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFLA_IFNAME = 3
_IFLA_LINK = 5
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_VFINFO_LIST = 22
_IFLA_EXT_MASK = 29
_IFLA_LINK_NETNSID = 37
_IFLA_XDP = 43
_IFLA_PARENT_DEV_NAME = 56
_IFLA_PARENT_DEV_BUS_NAME = 57
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
# The lower interface of the kind that does not tell it as IFLA_LINK (if_link.h).
_IFLA_VXLAN_LINK = 3
_IFLA_XDP_ATTACHED = 2
_RTM_GETNSID = 90
_NETNSA_NSID = 1
_NETNSA_FD = 3
_RTGENMSG = bytes(4)
_RTEXT_FILTER_VF = 1
_IFLA_VF_INFO = 1
_IFLA_VF_MAC = 1
_IFLA_VF_VLAN = 2
_IFLA_VF_SPOOFCHK = 4
_IFLA_VF_LINK_STATE = 5
_IFLA_VF_RATE = 6
_IFLA_VF_TRUST = 9
_MAX_ADDR_LEN = 32
_IFF_UP = 1


@dataclass(frozen=True, slots=True)
class NetLink:
    """One interface. Its parent device by bus and name there: a PCI address, `virtio2`.

    `kind` is what a virtual one is (`bridge`, `team`, `macvlan`); None for a card's own. `lower`
    is the index of the interface that it stands on, `lower_namespace` that one's namespace by this
    namespace's number for it, None for this namespace. `master` is the interface that it is a port
    of. `xdp`: a BPF program sees its packets first.
    """

    index: int
    name: str
    up: bool
    parent_bus: str | None
    parent_device: str | None
    kind: str | None
    lower: int | None = None
    lower_namespace: int | None = None
    master: int | None = None
    xdp: bool = False


@dataclass(frozen=True, slots=True)
class VfSettings:
    """What the PF's driver holds for one VF. Rates in Mbit/s, 0 = unlimited.

    None where the driver does not report it. `link_state`: 0 as the port, 1 always up, 2 down.
    """

    index: int
    mac: str | None = None
    vlan: int | None = None
    qos: int | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    min_rate_mbps: int | None = None
    max_rate_mbps: int | None = None
    link_state: int | None = None


def read_links() -> tuple[NetLink, ...]:
    """All interfaces of this network namespace. Raises KernelError, NotPermitted, Unsupported."""
    with Socket(NETLINK_ROUTE) as channel:
        answers = channel.dump(_RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0), "list interfaces")
    return tuple(parse_link(message.payload) for message in answers)


def parse_link(payload: bytes) -> NetLink:
    """One RTM_NEWLINK. The parent is told since Linux 5.14 (IFLA_PARENT_DEV_NAME)."""
    _, _, index, flags, _ = _IFINFO.unpack_from(payload)
    attributes = parse_attributes(payload[_IFINFO.size :])
    info = parse_attributes(attributes.get(_IFLA_LINKINFO, b""))
    kind = as_text(info.get(_IFLA_INFO_KIND))
    lower = as_int(attributes.get(_IFLA_LINK))
    if kind == "vxlan":
        # Away from its lower interface's namespace it tells its own index as IFLA_LINK: it has no
        # ndo_get_iflink (net/core/rtnetlink.c, nla_put_iflink).
        lower = as_int(parse_attributes(info.get(_IFLA_INFO_DATA, b"")).get(_IFLA_VXLAN_LINK))
    xdp = parse_attributes(attributes.get(_IFLA_XDP, b"")).get(_IFLA_XDP_ATTACHED, b"\0")
    return NetLink(
        index=index,
        name=as_text(attributes.get(_IFLA_IFNAME)) or "",
        up=bool(flags & _IFF_UP),
        parent_bus=as_text(attributes.get(_IFLA_PARENT_DEV_BUS_NAME)),
        parent_device=as_text(attributes.get(_IFLA_PARENT_DEV_NAME)),
        kind=kind,
        lower=lower or None,
        lower_namespace=_namespace_id(attributes.get(_IFLA_LINK_NETNSID)),
        master=as_int(attributes.get(_IFLA_MASTER)),
        xdp=xdp[:1] not in (b"", b"\0"),
    )


def _namespace_id(data: bytes | None) -> int | None:
    """A namespace's number, signed; None for this one, -1 where it has none here."""
    return None if data is None or len(data) < 4 else int(struct.unpack_from("=i", data)[0])


def namespace_id(descriptor: int) -> int | None:
    """The number that this network namespace has for the one behind a descriptor; None if none."""
    with Socket(NETLINK_ROUTE) as channel:
        payload = _RTGENMSG + u32(_NETNSA_FD, descriptor)
        answers = channel.request(_RTM_GETNSID, payload, 0, "number a network namespace")
    found = [_namespace_id(_nsid(message.payload)) for message in answers]
    return next((number for number in found if number is not None and number >= 0), None)


def read_namespace_ids() -> frozenset[int]:
    """The numbers of all network namespaces that this one knows. Raises KernelError."""
    with Socket(NETLINK_ROUTE) as channel:
        answers = channel.dump(_RTM_GETNSID, _RTGENMSG, "list network namespaces")
    found = (_namespace_id(_nsid(message.payload)) for message in answers)
    return frozenset(number for number in found if number is not None and number >= 0)


def _nsid(payload: bytes) -> bytes | None:
    return parse_attributes(payload[len(_RTGENMSG) :]).get(_NETNSA_NSID)


def read_addresses() -> tuple[tuple[str, str], ...]:
    """`(interface, address/prefix)` of this network namespace, IPv4 and IPv6, sorted."""
    with Socket(NETLINK_ROUTE) as channel:
        links = channel.dump(_RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0), "list interfaces")
        answers = channel.dump(_RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, 0), "list addresses")
    names = {link.index: link.name for link in (parse_link(m.payload) for m in links)}
    found = set()
    for message in answers:
        parsed = parse_address(message.payload)
        if parsed is not None and parsed[0] in names:
            found.add((names[parsed[0]], parsed[1]))
    return tuple(sorted(found))


def parse_address(payload: bytes) -> tuple[int, str] | None:
    """One RTM_NEWADDR as `(interface index, address/prefix)`; None for other families."""
    if len(payload) < _IFADDR.size:
        return None
    _, prefix, _, _, index = _IFADDR.unpack_from(payload)
    attributes = parse_attributes(payload[_IFADDR.size :])
    # On a point-to-point link IFA_ADDRESS is the peer's, IFA_LOCAL this end's.
    data = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
    if len(data) not in (4, 16):
        return None
    return index, f"{ipaddress.ip_address(data)}/{prefix}"


def read_vf_settings(ifindex: int) -> tuple[VfSettings, ...]:
    """The VFs of the PF behind an interface, by index. Raises KernelError, NotPermitted."""
    payload = _IFINFO.pack(0, 0, ifindex, 0, 0) + u32(_IFLA_EXT_MASK, _RTEXT_FILTER_VF)
    with Socket(NETLINK_ROUTE) as channel:
        answers = channel.request(_RTM_GETLINK, payload, 0, f"read VFs of interface {ifindex}")
    found = [vf for message in answers for vf in parse_vf_list(message.payload)]
    return tuple(sorted(found, key=lambda vf: vf.index))


def parse_vf_list(payload: bytes) -> list[VfSettings]:
    """The VFs in one RTM_NEWLINK."""
    attributes = parse_attributes(payload[_IFINFO.size :])
    listed = iterate_attributes(attributes.get(_IFLA_VFINFO_LIST, b""))
    return [vf for kind, data in listed if kind == _IFLA_VF_INFO for vf in _parse_vf(data)]


def _parse_vf(data: bytes) -> list[VfSettings]:
    values = parse_attributes(data)
    mac = values.get(_IFLA_VF_MAC, b"")
    if len(mac) < 10:
        return []
    vlan = _words(values.get(_IFLA_VF_VLAN), 3)
    rate = _words(values.get(_IFLA_VF_RATE), 3)
    spoof, trust = _setting(values.get(_IFLA_VF_SPOOFCHK)), _setting(values.get(_IFLA_VF_TRUST))
    return [
        VfSettings(
            index=as_int(mac[:4]) or 0,
            mac=mac[4:10].hex(":"),
            vlan=None if vlan is None else vlan[1],
            qos=None if vlan is None else vlan[2],
            spoof_check=None if spoof is None else bool(spoof),
            trust=None if trust is None else bool(trust),
            min_rate_mbps=None if rate is None else rate[1],
            max_rate_mbps=None if rate is None else rate[2],
            link_state=_setting(values.get(_IFLA_VF_LINK_STATE)),
        )
    ]


def _words(data: bytes | None, count: int) -> tuple[int, ...] | None:
    if data is None or len(data) < 4 * count:
        return None
    return struct.unpack_from(f"={count}I", data)


def _setting(data: bytes | None) -> int | None:
    """The second word of `{vf, setting}`; all ones means that the driver does not report it."""
    words = _words(data, 2)
    return None if words is None or words[1] == 0xFFFFFFFF else words[1]


def set_vf(ifindex: int, settings: VfSettings) -> Request:
    """The request that gives a VF those of `settings` that are not None (RTM_SETLINK).

    `vlan` and `qos` go together, as do the two rates: the one that is None counts as 0. Raises
    KernelError for a MAC address that is not six bytes.
    """
    vf = settings.index
    values = []
    if settings.mac is not None:
        values.append(attribute(_IFLA_VF_MAC, struct.pack("=I", vf) + _mac(settings.mac)))
    if settings.vlan is not None or settings.qos is not None:
        words = (vf, settings.vlan or 0, settings.qos or 0)
        values.append(attribute(_IFLA_VF_VLAN, struct.pack("=3I", *words)))
    if settings.min_rate_mbps is not None or settings.max_rate_mbps is not None:
        words = (vf, settings.min_rate_mbps or 0, settings.max_rate_mbps or 0)
        values.append(attribute(_IFLA_VF_RATE, struct.pack("=3I", *words)))
    for kind, value in (
        (_IFLA_VF_SPOOFCHK, settings.spoof_check),
        (_IFLA_VF_TRUST, settings.trust),
        (_IFLA_VF_LINK_STATE, settings.link_state),
    ):
        if value is not None:
            values.append(attribute(kind, struct.pack("=2I", vf, int(value))))
    # The kernel walks this list by type and takes it without NLA_F_NESTED, as iproute2 sends it.
    listed = nested(_IFLA_VFINFO_LIST, nested(_IFLA_VF_INFO, *values, flag=False), flag=False)
    payload = _IFINFO.pack(0, 0, ifindex, 0, 0) + listed
    return Request(NETLINK_ROUTE, _RTM_SETLINK, payload, what=f"set VF {vf} of interface {ifindex}")


def _mac(text: str) -> bytes:
    try:
        data = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        data = b""
    if len(data) != 6:
        raise KernelError(f"{text[:40]!r} is not a MAC address", errno_name="EINVAL")
    return data + bytes(_MAX_ADDR_LEN - 6)
