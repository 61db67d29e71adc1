"""The routes of all tables over rtnetlink.

Source: include/uapi/linux/rtnetlink.h; Documentation/networking/fib_trie.rst.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vfiotool.netlink.codec import (
    NETLINK_ROUTE,
    Socket,
    as_int,
    parse_attributes,
)

_RTM_GETROUTE = 26
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
_AF_INET, _AF_INET6 = 2, 10


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


def read_routes() -> Iterator[Route]:
    """The routes of all tables, IPv4 and IPv6. Raises KernelError, NotPermitted."""
    for family in (_AF_INET, _AF_INET6):
        head = _RTMSG.pack(family, *[0] * 7, 0)
        with Socket(NETLINK_ROUTE) as channel:
            answers = channel.dump(_RTM_GETROUTE, head, "list routes")
        for message in answers:
            yield from parse_route(message.payload)


def parse_route(payload: bytes) -> list[Route]:
    """One RTM_NEWROUTE: a route for each interface; none for local, rejecting and other kinds."""
    if len(payload) < _RTMSG.size:
        return []
    family, prefix, _, _, table, protocol, _, kind, _ = _RTMSG.unpack_from(payload)
    if kind != _RTN_UNICAST or family not in (_AF_INET, _AF_INET6):
        return []
    attributes = parse_attributes(payload[_RTMSG.size :])
    table = as_int(attributes.get(_RTA_TABLE)) or table
    target = _address(attributes.get(_RTA_DST))
    text = "default" if prefix == 0 and target is None else f"{target}/{prefix}"
    if prefix == 0 and family == _AF_INET6:
        text = "default ::/0"
    link_local = target is not None and ipaddress.ip_address(target).is_link_local
    automatic = protocol == _RTPROT_KERNEL and family == _AF_INET6 and link_local
    hops = [(as_int(attributes.get(_RTA_OIF)), _gateway(attributes))]
    hops += _nexthops(attributes.get(_RTA_MULTIPATH, b""))
    return [Route(index, text, gateway, table, automatic) for index, gateway in hops if index]


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
