"""Interfaces, addresses and routes over rtnetlink, in this network namespace and in all others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping

from vfiotool.errors import VfiotoolError, errno_name
from vfiotool.host.bpf import has_tcx
from vfiotool.host.namespaces import Found, find_namespaces
from vfiotool.host.paths import (
    KERNELS,
    PROC,
    PROC_APPLETALK,
    PROC_GROUPS4,
    PROC_GROUPS6,
    PROC_LLC,
    PROC_MPLS,
    PROC_PACKET_GENERATOR,
    PROC_SOCKET_COUNTS,
    SYS_BUS,
    SYS_CAN_GATEWAY,
    SYS_NET,
    VSOCK,
)
from vfiotool.host.probe import answer_of
from vfiotool.host.processes import counted, enter_namespace, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfiotool.netlink.route import NetLink

_MAIN_TABLE = 254
# A host that carries the Internet's routes has a million: what matters is that there are some.
_ROUTES_TOLD = 16
_SOCKETS_TOLD = 4
# All routers of a site, SSDP, mDNS: the groups of IPv6 beyond the link that say nothing.
_EVERYWHERE = frozenset(n.to_bytes(14, "big") for n in (0x2, 0xC, 0xFB))
# Pairs of interfaces that name each other and carry nothing of one another's.
_PAIRS = frozenset({"veth", "vxcan", "netkit"})
# Kinds that tell what they stand on by its index alone, wherever that is (no get_link_net among
# their rtnl_link_ops: drivers/net/ipvlan/ipvtap.c, drivers/net/ethernet/qualcomm/rmnet).
_NAMESPACE_UNTOLD = frozenset({"ipvtap", "rmnet"})


def addresses() -> str:
    """This network namespace's interface addresses."""
    from vfiotool.netlink.route import read_addresses

    return "".join(f"{plain(name)}\t{cidr}\n" for name, cidr in read_addresses())


def net_kinds() -> str:
    """The virtual interfaces of this network namespace and what they are."""
    from vfiotool.netlink.route import read_links

    return "".join(f"{plain(link.name)}\t{link.kind}\n" for link in read_links() if link.kind)


def net_routes() -> str:
    """The routes of all tables that somebody set, some of each interface's."""
    from vfiotool.netlink.route import read_links
    from vfiotool.netlink.routes import read_routes

    names = {link.index: link.name for link in read_links()}
    told: dict[str, dict[str, None]] = {}
    for route in read_routes(mpls=os.path.isdir(PROC_MPLS)):
        name = plain(names.get(route.index, f"#{route.index}"))
        texts = told.setdefault(name, {})
        if route.automatic or len(texts) >= _ROUTES_TOLD:
            continue
        via = f" via {route.gateway}" if route.gateway else ""
        table = "" if route.table == _MAIN_TABLE else f" table {route.table}"
        texts[f"{route.target}{via}{table}"] = None
    return "".join(f"{name}\t{text}\n" for name, texts in sorted(told.items()) for text in texts)


def net_traffic() -> str:
    """What tc rules and sockets do with the interfaces of this namespace, addresses or none."""
    from vfiotool.netlink.route import read_links
    from vfiotool.netlink.traffic import (
        read_bound_sockets,
        read_filtered,
        read_redirected,
        read_vsock_sockets,
        read_xdp_sockets,
    )

    names = {link.index: plain(link.name) for link in read_links()}
    found = [(index, "redirected") for index in sorted(read_redirected())]
    found += [(index, "filtered") for index in sorted(read_filtered())]
    told: dict[int, dict[str, None]] = {}
    counts = _socket_counts()
    xdp = [*read_xdp_sockets()] if counts.get("XDP") else []
    for item in (*read_bound_sockets(), *xdp):
        texts = told.setdefault(item.index, {})
        if len(texts) < _SOCKETS_TOLD:
            texts[f"{item.protocol} port {item.port}" if item.port else item.protocol] = None
    found += [(index, text) for index, texts in sorted(told.items()) for text in texts]
    lines = [f"{names.get(index, f'#{index}')}\t{text}\n" for index, text in found]
    lines += [f"{plain(name)}\t{KERNELS}{text}\n" for name, text in _kernels_own(names)]
    lines += _programmed(names)
    if counts.get("XDP") and not xdp:
        lines.append("!\tXDP sockets, of which this kernel does not tell where they are bound\n")
    # Asking would load the family's module.
    virtual = [*read_vsock_sockets()] if "AF_VSOCK" in counts else []
    return "".join([*lines, *(f"{VSOCK}\t{text}\n" for text in virtual[:_SOCKETS_TOLD])])


def _programmed(names: Mapping[int, str]) -> Iterator[str]:
    """The interfaces whose packets BPF programs see that no filter of tc's shows."""
    try:
        for index, name in names.items():
            if has_tcx(index):
                yield f"{name}\tprogrammed\n"
    except OSError as error:
        why = errno_name(error.errno)
        yield f"!\twhich interfaces BPF programs are attached to (tcx): {why}\n"


def _kernels_own(names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """What the kernel does with interfaces by itself, or for sockets that are bound to none."""
    from vfiotool.netlink.traffic import read_can_gateway

    if os.path.isdir(SYS_CAN_GATEWAY):
        for index in sorted(read_can_gateway()):
            yield names.get(index, f"#{index}"), "forwards CAN frames"
    groups = (*parse_groups4(_lines(PROC_GROUPS4)), *parse_groups6(_lines(PROC_GROUPS6)))
    for name in sorted(set(groups)):
        yield name, "receives multicasts for a program"
    # Type, flag, the interface's address@SAP (net/llc/llc_proc.c). Unbinding would wait for it.
    stations = {row.split()[2].partition("@")[0] for row in _lines(PROC_LLC)[1:] if row.split()[2:]}
    for name in sorted(names.values()) if stations else ():
        if {*_lines(f"{SYS_NET}/{name}/address")} & stations:
            yield name, "has an LLC socket"
    # Interface, address, networks, status (net/appletalk/atalk_proc.c).
    for line in _lines(PROC_APPLETALK)[1:]:
        yield line.partition(" ")[0], "speaks AppleTalk"
    if os.path.isdir(PROC_PACKET_GENERATOR):
        for name in sorted(os.listdir(PROC_PACKET_GENERATOR)):
            if name != "pgctrl" and not name.startswith("kpktgend_"):
                # A device that has two threads is named eth0@1.
                yield name.partition("@")[0], "sends generated packets (pktgen)"


def _lines(path: str) -> list[str]:
    """A table of the kernel's; none where the facility is not there."""
    try:
        with open(path, encoding="ascii", errors="surrogateescape") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def parse_groups4(lines: Iterable[str]) -> Iterator[str]:
    """The interfaces that a program receives IPv4 multicasts on (net/ipv4/igmp.c,
    igmp_mc_seq_show): an interface's row, then one of each group, in the order of bytes of memory.

    Left out are the groups of the link itself and of service discovery, which daemons join on
    every interface that is up.
    """
    name = ""
    for line in lines:
        words = line.split()
        if line[:1].isdecimal() and len(words) > 1:
            name = words[1]
        elif line[:1].isspace() and words:
            group = int(words[0], 16).to_bytes(4, sys.byteorder)
            if group[:3] != b"\xe0\0\0" and group != b"\xef\xff\xff\xfa":
                yield name


def parse_groups6(lines: Iterable[str]) -> Iterator[str]:
    """The same of IPv6 (net/ipv6/mcast.c, igmp6_mc_seq_show): number, interface, group, users.

    Left out too are the routers' group of a site, which the kernel joins by itself.
    """
    for line in lines:
        words = line.split()
        group = bytes.fromhex(words[2]) if len(words) > 2 else b""
        # RFC 4291, 2.7: the scope; RFC 2375 for the groups.
        if len(group) == 16 and group[1] & 15 > 2 and group[2:] not in _EVERYWHERE:
            yield words[1]


def _socket_counts() -> dict[str, int]:
    """How many sockets of each protocol this network namespace has (net/core/sock.c,
    proto_seq_printf); of some families no number is kept."""
    with open(PROC_SOCKET_COUNTS, encoding="ascii", errors="replace") as file:
        rows = [line.split() for line in file.read().splitlines()[1:]]
    return {row[0]: int(row[2]) for row in rows if len(row) > 2 and row[2].isdecimal()}


def net_links() -> str:
    """Every interface of every network namespace, with what each stands on.

    A namespace that no process is in is entered all the same, where a mount or a descriptor
    leads to it; one that is only known by a number is named as unseen.
    """
    found = find_namespaces("net")
    text = [_own_links(found)]
    others = {number: places for number, places in found.places.items() if number != found.own}
    descriptors: dict[int, int] = {}
    try:
        for number, places in others.items():
            for place in places:
                try:
                    descriptors[number] = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                    break
                except FileNotFoundError:
                    continue
            else:
                if any(place.lasts for place in places):
                    text.append(f"!\tthe network namespace of {places[0].name}\n")
        names = {number: others[number][0].name for number in descriptors}
        text.append(_other_links(found.own, names, descriptors))
        text += [f"!\t{what}\n" for what in _unreached(descriptors)]
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    text += [f"!\t{what}\n" for what in found.unknown]
    if found.hidden:
        text.append(
            f"!\tthe network namespaces of {counted(found.hidden)} that may not be looked into\n"
        )
    return "".join(text)


def _own_links(found: Found) -> str:
    from vfiotool.netlink.route import read_links

    return "".join(_link_lines("self", read_links(), _cidrs(), {}))


def _other_links(own: int, names: Mapping[int, str], descriptors: Mapping[int, int]) -> str:
    """The links of the other namespaces: one child goes through them all."""
    if not descriptors:
        return ""
    home = os.open(f"{PROC}/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def look() -> str:
        return "".join(
            text
            for number in descriptors
            for text in _look_into(number, own, home, names, descriptors)
        )

    try:
        return answer_of(look, keep=(home, *descriptors.values()))
    finally:
        os.close(home)


def _look_into(
    number: int, own: int, home: int, names: Mapping[int, str], descriptors: Mapping[int, int]
) -> Iterator[str]:
    from vfiotool.netlink.route import namespace_id, read_links

    try:
        enter_namespace(descriptors[number])
        links = read_links()
        wanted = {link.lower_namespace for link in links if link.kind not in _PAIRS} - {None}
        lowers: dict[int, str] = {}
        # This namespace first: nearly all that stand on another's interface stand on one of ours.
        for name, descriptor in (("self", home), *((names[n], d) for n, d in descriptors.items())):
            if wanted <= lowers.keys():
                break
            found = namespace_id(descriptor)
            if found is not None:
                lowers.setdefault(found, name)
        yield from _link_lines(names[number], links, _cidrs(), lowers)
    except (OSError, VfiotoolError) as error:
        yield f"!\tthe network namespace of {names[number]}: {plain(str(error))}\n"


def _cidrs() -> dict[str, list[str]]:
    from vfiotool.netlink.route import read_addresses

    found: dict[str, list[str]] = {}
    for name, cidr in read_addresses():
        found.setdefault(name, []).append(cidr)
    return found


def _link_lines(
    where: str,
    links: tuple[NetLink, ...],
    cidrs: Mapping[str, list[str]],
    lowers: Mapping[int, str],
) -> Iterator[str]:
    here = {link.index for link in links}
    for link in links:
        stands = link.kind not in _PAIRS and link.lower is not None
        place = where
        if stands and link.lower_namespace is not None:
            place = lowers.get(link.lower_namespace, "?")
        elif link.lower not in here or link.kind in _NAMESPACE_UNTOLD:
            place = "?"
        fields = (
            where,
            str(link.index),
            plain(link.name),
            plain(link.kind or ""),
            place if stands else "",
            str(link.lower) if stands else "",
            "" if link.master is None else str(link.master),
            _parent_of(link.parent_bus, link.parent_device),
            ",".join(cidrs.get(link.name, [])),
            "xdp" if link.xdp else "",
        )
        yield "\t".join(fields) + "\n"


def _unreached(descriptors: Mapping[int, int]) -> Iterator[str]:
    """Namespaces that this one has a number for and that nothing found leads to."""
    from vfiotool.netlink.route import namespace_id, read_namespace_ids

    numbers = read_namespace_ids()
    if numbers:
        for number in sorted(numbers - {namespace_id(fd) for fd in descriptors.values()}):
            yield f"the network namespace number {number}, which no process or mount leads to"


def _parent_of(bus: str | None, name: str | None) -> str:
    """The path below /sys of an interface's parent device, or an empty string."""
    link = f"{SYS_BUS}/{bus}/devices/{name}"
    try:
        target = os.readlink(link)
    except (OSError, ValueError):
        return ""
    return plain(os.path.normpath(os.path.join(os.path.dirname(link), target)))
