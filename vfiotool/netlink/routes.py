"""The routes of all tables, and next hops that routes share, over rtnetlink.

Source: include/uapi/linux/rtnetlink.h, nexthop.h, mpls.h; Documentation/networking/fib_trie.rst.
"""

from __future__ import annotations

import errno
import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vfiotool.errors import KernelError, Unsupported
from vfiotool.netlink.codec import (
    NETLINK_ROUTE,
    Socket,
    as_int,
    parse_attributes,
)

_RTM_GETROUTE = 26
_RTM_GETNEXTHOP = 106
_NHMSG = struct.Struct("=BBBBI")
_NHA_ID, _NHA_OIF, _NHA_GATEWAY = 1, 5, 6
_RTMSG = struct.Struct("=8BI")
_RTA_DST = 1
_RTA_OIF = 4
_RTA_GATEWAY = 5
_RTA_MULTIPATH = 9
_RTA_TABLE = 15
_RTA_VIA = 18
_RTN_UNICAST = 1
_RTPROT_KERNEL = 2
_NEXTHOP = struct.Struct("=HBBi")
_AF_INET, _AF_INET6, _AF_MPLS = 2, 10, 28
_MAIN_TABLE = 254
# RFC 3032, 2.1: a label stack entry begins with the label, of 20 bits.
_LABEL_STACK_ENTRY = struct.Struct(">I")


# What the targets begin with that are no network.
LABEL, NEXT_HOP = "label", "nexthop"


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route over one interface. `gateway` is None for what is on the link.

    `automatic`: the kernel made it by itself for link-local addresses.
    """

    index: int
    target: str
    gateway: str | None
    table: int
    automatic: bool


def read_routes(*, mpls: bool = False) -> Iterator[Route]:
    """The routes of all tables, IPv4 and IPv6, with `mpls` also those of labels, and next hops.

    `mpls` is for a kernel that routes labels: another answers with all its other routes again.
    Raises KernelError, NotPermitted.
    """
    for family in (_AF_INET, _AF_INET6, *([_AF_MPLS] if mpls else [])):
        head = _RTMSG.pack(family, *[0] * 7, 0)
        with Socket(NETLINK_ROUTE) as channel:
            answers = channel.dump(_RTM_GETROUTE, head, "list routes")
        for message in answers:
            if message.payload[:1] == bytes([family]):
                yield from parse_route(message.payload)
    try:
        with Socket(NETLINK_ROUTE) as channel:
            hops = channel.dump(_RTM_GETNEXTHOP, _NHMSG.pack(0, 0, 0, 0, 0), "list next hops")
    except (Unsupported, KernelError) as error:
        # Before Linux 5.3 there is none.
        if error.errno != errno.EOPNOTSUPP:
            raise
        return
    for message in hops:
        yield from parse_next_hop(message.payload)


def parse_next_hop(payload: bytes) -> list[Route]:
    """One RTM_NEWNEXTHOP that leads over an interface.

    With net.ipv4.nexthop_compat_mode=0 a route that uses it tells its number alone.
    """
    attributes = parse_attributes(payload[_NHMSG.size :])
    index = as_int(attributes.get(_NHA_OIF))
    number = as_int(attributes.get(_NHA_ID))
    if not index:
        return []
    gateway = _address(attributes.get(_NHA_GATEWAY))
    return [Route(index, f"{NEXT_HOP} {number}", gateway, _MAIN_TABLE, automatic=False)]


def parse_route(payload: bytes) -> list[Route]:
    """One RTM_NEWROUTE: a route for each interface; none for local, rejecting and other kinds."""
    if len(payload) < _RTMSG.size:
        return []
    family, prefix, _, _, table, protocol, _, kind, _ = _RTMSG.unpack_from(payload)
    if kind != _RTN_UNICAST or family not in (_AF_INET, _AF_INET6, _AF_MPLS):
        return []
    attributes = parse_attributes(payload[_RTMSG.size :])
    hops = [(as_int(attributes.get(_RTA_OIF)), _gateway(attributes))]
    hops += _nexthops(attributes.get(_RTA_MULTIPATH, b""))
    if family == _AF_MPLS:
        text = _label(attributes.get(_RTA_DST, b""))
        return [Route(i, text, gateway, _MAIN_TABLE, automatic=False) for i, gateway in hops if i]
    table = as_int(attributes.get(_RTA_TABLE)) or table
    target = _address(attributes.get(_RTA_DST))
    text = "default" if prefix == 0 and target is None else f"{target}/{prefix}"
    if prefix == 0 and family == _AF_INET6:
        text = "default ::/0"
    link_local = target is not None and ipaddress.ip_address(target).is_link_local
    automatic = protocol == _RTPROT_KERNEL and family == _AF_INET6 and link_local
    return [Route(index, text, gateway, table, automatic) for index, gateway in hops if index]


def _label(data: bytes) -> str:
    if len(data) < _LABEL_STACK_ENTRY.size:
        return LABEL
    return f"{LABEL} {_LABEL_STACK_ENTRY.unpack_from(data)[0] >> 12}"


def _nexthops(data: bytes) -> list[tuple[int | None, str | None]]:
    found: list[tuple[int | None, str | None]] = []
    while len(data) >= _NEXTHOP.size:
        length, _, _, index = _NEXTHOP.unpack_from(data)
        if length < _NEXTHOP.size:
            break
        found.append((index, _gateway(parse_attributes(data[_NEXTHOP.size : length]))))
        data = data[(length + 3) & ~3 :]
    return found


def _gateway(attributes: dict[int, bytes]) -> str | None:
    via = attributes.get(_RTA_VIA, b"")
    return _address(attributes.get(_RTA_GATEWAY) or via[2:])


def _address(data: bytes | None) -> str | None:
    return str(ipaddress.ip_address(data)) if data is not None and len(data) in (4, 16) else None
