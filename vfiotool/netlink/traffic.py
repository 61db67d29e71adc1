"""What takes an interface's packets or sends it some without an address: tc rules, bound sockets.

Source: include/uapi/linux/rtnetlink.h, pkt_cls.h, pkt_sched.h, tc_act/tc_mirred.h, inet_diag.h;
net/sched/act_api.c, tc_dump_action; net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vfiotool.errors import KernelError, Unsupported
from vfiotool.netlink.codec import (
    NETLINK_ROUTE,
    Message,
    Socket,
    as_int,
    as_text,
    iterate_attributes,
    nested,
    parse_attributes,
    string,
)

_RTM_GETQDISC, _RTM_GETTFILTER, _RTM_GETACTION = 38, 46, 50
_TCMSG = struct.Struct("=B3xiIII")
_TCAMSG = bytes(4)
_TCA_KIND, _TCA_ACT_TAB, _TCA_ACT_KIND, _TCA_ACT_OPTIONS = 1, 1, 1, 2
_TCA_MIRRED_PARMS = 2
# tc_gen (index, capab, action, refcnt, bindcnt), eaction, ifindex
_MIRRED = struct.Struct("=IIiiiiI")
# pkt_sched.h: TC_H_CLSACT with TC_H_MIN_INGRESS and TC_H_MIN_EGRESS
_HOOKS = (0xFFFFFFF2, 0xFFFFFFF3)
_QDISCS_WITH_HOOKS = ("ingress", "clsact")

NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DIAG_REQUEST = struct.Struct("=BBBxI48x")
_DIAG_PORT = struct.Struct(">H")
_DIAG_IF = struct.Struct("=I")
_PORT_AT, _IF_AT = 4, 40
_AF_INET, _AF_INET6 = 2, 10
_TCP_LISTEN = 1 << 10
_ALL_STATES = 0xFFFFFFFF
# All but listening ones and those in TIME_WAIT, which the kernel alone has.
_CONNECTED = _ALL_STATES & ~(_TCP_LISTEN | 1 << 6)
# A program for the kernel: INET_DIAG_BC_S_COND, where to go on if so and if not; family, bits of
# the prefix, any port, fe80::/10. So that it does not tell all connections of a busy host.
_DIAG_BYTECODE = 1
_LINK_LOCAL = struct.pack("=BBHBBxxi16s", 7, 28, 32, _AF_INET6, 10, -1, b"\xfe\x80" + bytes(14))
_SOCKETS = (("tcp", 6, _TCP_LISTEN), ("udp", 17, _ALL_STATES), ("raw", 255, _ALL_STATES))
# include/uapi/linux/xdp_diag.h: family, protocol, pad; inode, what to show, cookie.
_AF_XDP = 44
_XDP_REQUEST = struct.pack("=BBxxII8x", _AF_XDP, 0, 0, 1)
_XDP_HEAD, _XDP_DIAG_INFO = 16, 1
_XDP_INFO = struct.Struct("=II")
# include/uapi/linux/vm_sockets_diag.h: the states wanted; state, both ends' context and port.
_AF_VSOCK = 40
_ESTABLISHED, _LISTEN = 1, 10
# include/uapi/linux/can/gw.h: family, type, flags; the interfaces of a job.
_RTM_GETROUTE = 26
_AF_CAN = 29
_RTCANMSG = struct.Struct("=BBH")
_CGW_INTERFACES = (9, 10)
_VSOCK_REQUEST = struct.pack("=BBxxI16x", _AF_VSOCK, 0, 1 << _ESTABLISHED | 1 << _LISTEN)
_VSOCK = struct.Struct("=xxBxIIII")
_VSOCK_LOCAL = 1
# What a kernel that was built without the facility answers. rtnetlink.c, rtnetlink_rcv_msg, for
# tc: then there is no such rule. sock_diag.c, __sock_diag_cmd, and inet_diag_lock_handler: the
# protocol's module is not there. EINVAL says that the request was not understood, by no kernel
# that there is nothing: it is an observation that failed.
_NOT_BUILT = {NETLINK_ROUTE: errno.EOPNOTSUPP, NETLINK_SOCK_DIAG: errno.ENOENT}


@dataclass(frozen=True, slots=True)
class BoundSocket:
    """A socket that is bound to an interface: listening TCP, UDP, raw (SO_BINDTODEVICE) or XDP, or
    a TCP connection over a link-local address."""

    index: int
    protocol: str
    port: int


def read_redirected() -> frozenset[int]:
    """The interfaces that tc rules of others send packets to (mirred). Raises KernelError."""
    kind = string(_TCA_ACT_KIND, "mirred")
    payload = _TCAMSG + nested(_TCA_ACT_TAB, nested(1, kind), flag=False)
    answers = _dump(NETLINK_ROUTE, _RTM_GETACTION, payload, "list tc actions")
    return frozenset(index for message in answers for index in parse_redirects(message.payload))


def parse_redirects(payload: bytes) -> Iterator[int]:
    """The targets of one RTM_NEWACTION of mirred actions that a filter is bound to."""
    table = parse_attributes(payload[len(_TCAMSG) :]).get(_TCA_ACT_TAB, b"")
    for _, action in iterate_attributes(table):
        options = parse_attributes(parse_attributes(action).get(_TCA_ACT_OPTIONS, b""))
        parameters = options.get(_TCA_MIRRED_PARMS, b"")
        if len(parameters) >= _MIRRED.size:
            *_, bound, _, index = _MIRRED.unpack_from(parameters)
            if bound > 0:
                yield index


def read_filtered() -> frozenset[int]:
    """The interfaces whose packets tc filters see as they come or go. Raises KernelError."""
    head = _TCMSG.pack(0, 0, 0, 0, 0)
    answers = _dump(NETLINK_ROUTE, _RTM_GETQDISC, head, "list queueing disciplines")
    hooked = {index for message in answers for index in parse_hooked(message.payload)}
    return frozenset(index for index in hooked if any(_has_filter(index, hook) for hook in _HOOKS))


def parse_hooked(payload: bytes) -> Iterable[int]:
    """The interface of one RTM_NEWQDISC that filters can be attached to, or nothing."""
    if len(payload) < _TCMSG.size:
        return ()
    kind = as_text(parse_attributes(payload[_TCMSG.size :]).get(_TCA_KIND))
    return (_TCMSG.unpack_from(payload)[1],) if kind in _QDISCS_WITH_HOOKS else ()


def _has_filter(index: int, hook: int) -> bool:
    head = _TCMSG.pack(0, index, 0, hook, 0)
    return bool(_dump(NETLINK_ROUTE, _RTM_GETTFILTER, head, "list tc filters"))


def read_can_gateway() -> frozenset[int]:
    """The interfaces that the kernel takes CAN frames from and sends them to by itself (can-gw).

    For a kernel that has it: another answers with all its routes. Raises KernelError.
    """
    payload = _RTCANMSG.pack(_AF_CAN, 0, 0)
    answers = _dump(NETLINK_ROUTE, _RTM_GETROUTE, payload, "list CAN routes")
    return frozenset(index for message in answers for index in parse_can_route(message.payload))


def parse_can_route(payload: bytes) -> Iterator[int]:
    """Both interfaces of one job of can-gw."""
    if payload[:1] == bytes([_AF_CAN]):
        attributes = parse_attributes(payload[_RTCANMSG.size :])
        for kind in _CGW_INTERFACES:
            index = as_int(attributes.get(kind))
            if index:
                yield index


def read_bound_sockets() -> Iterator[BoundSocket]:
    """Sockets of this network namespace that are bound to an interface. Raises KernelError."""
    for protocol, number, states in _SOCKETS:
        for family in (_AF_INET, _AF_INET6):
            request = _DIAG_REQUEST.pack(family, number, 0, states)
            for message in _dump(
                NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request, f"list {protocol} sockets"
            ):
                yield from parse_socket(protocol, message.payload)
    request = _DIAG_REQUEST.pack(_AF_INET6, 6, 0, _CONNECTED) + nested(
        _DIAG_BYTECODE, _LINK_LOCAL, flag=False
    )
    for message in _dump(NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request, "list connections"):
        yield from parse_socket("tcp", message.payload)


def parse_socket(protocol: str, payload: bytes) -> Iterable[BoundSocket]:
    """One inet_diag_msg, if its socket is bound to an interface."""
    if len(payload) < _IF_AT + _DIAG_IF.size:
        return ()
    (index,) = _DIAG_IF.unpack_from(payload, _IF_AT)
    (port,) = _DIAG_PORT.unpack_from(payload, _PORT_AT)
    return (BoundSocket(index, protocol, port),) if index else ()


def read_xdp_sockets() -> Iterator[BoundSocket]:
    """Sockets of AF_XDP of this network namespace that are bound. Raises KernelError."""
    for message in _dump(NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _XDP_REQUEST, "list XDP sockets"):
        yield from parse_xdp_socket(message.payload)


def parse_xdp_socket(payload: bytes) -> Iterable[BoundSocket]:
    """One xdp_diag_msg, if its socket is bound: it may send without any XDP program."""
    found = parse_attributes(payload[_XDP_HEAD:]).get(_XDP_DIAG_INFO, b"")
    if len(found) < _XDP_INFO.size:
        return ()
    index, queue = _XDP_INFO.unpack_from(found)
    return (BoundSocket(index, f"xdp queue {queue}", 0),) if index else ()


def read_vsock_sockets() -> Iterator[str]:
    """Sockets of AF_VSOCK that listen or are connected, but for those within this machine, in
    words. Raises KernelError."""
    for message in _dump(
        NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _VSOCK_REQUEST, "list vsock sockets"
    ):
        yield from parse_vsock_socket(message.payload)


def parse_vsock_socket(payload: bytes) -> Iterable[str]:
    """One vsock_diag_msg, unless it stays within this machine."""
    if len(payload) < _VSOCK.size:
        return ()
    state, source, port, target, far = _VSOCK.unpack_from(payload)
    if _VSOCK_LOCAL in (source, target):
        return ()
    if state == _LISTEN:
        return (f"a program listens on port {port}",)
    return (f"a program is connected with port {far} of context {target}",)


def _dump(protocol: int, kind: int, payload: bytes, what: str) -> list[Message]:
    try:
        with Socket(protocol) as channel:
            return channel.dump(kind, payload, what)
    except (Unsupported, KernelError) as error:
        # Such as the socket diagnosis, which a kernel can be built without. One that could not be
        # had for another reason (descriptors, memory, a filter of system calls) says nothing.
        if error.errno in (errno.EPROTONOSUPPORT, _NOT_BUILT[protocol]):
            return []
        raise
