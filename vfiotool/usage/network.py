"""Networks: the interfaces of a function, what stands on them, and what they carry.

An interface is in use if it or anything stacked on it has an address or a route, belongs to a
bridge, bond or the like, or lives in another network namespace. One that is merely up is not;
nor is one with nothing but a link-local address that was made by itself.
Source: Documentation/ABI/testing/sysfs-class-net, net/ipv4/fib_trie.c, net/ipv6/route.c for the
columns of the route tables.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from vfiotool.devices.attached import is_part_of
from vfiotool.devices.pci import Address, parse_uevent
from vfiotool.host.paths import (
    NET_ADDRESSES,
    NET_CALLER,
    NET_KINDS,
    NET_ROUTES,
    PROC,
    PROC_PPPOE,
    PROC_ROUTE,
    PROC_ROUTE6,
    SYS_NET,
)
from vfiotool.netlink.routes import LABEL, NEXT_HOP
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.far_disks import vital_over_network
from vfiotool.usage.links import SELF, Graph, Interface, in_namespace, namespace_text, read_graph
from vfiotool.usage.sight import Sight
from vfiotool.usage.traffic import traffic_usage

# include/uapi/linux/route.h, ipv6_route.h
_RTF_UP = 0x1
_RTF_GATEWAY = 0x2
_RTF_REJECT = 0x200
_RTF_ANYCAST = 0x00100000
_RTF_LOCAL = 0x80000000
_MAX_UPPERS = 1024
# What shows and ends routes of other kinds than IP's, by how they begin.
_OTHER_ROUTES = {LABEL: "ip -family mpls route", NEXT_HOP: "ip nexthop"}


class Placed(Protocol):
    """A device and its place in sysfs: a PCI function, or a vDPA device."""

    @property
    def address(self) -> str: ...
    @property
    def path(self) -> str: ...


def network_usage(host: Sight, function: Placed) -> Usage:
    """The interfaces of the function that are in use, each with what it carries."""
    own = host.attached.interfaces(function.path)
    graph = read_graph(host)
    found: list[Blocker] = []
    carriers: dict[str, tuple[str, ...]] = {}
    if own:
        stacks = {name: _stack_on(host, name) for name in own}
        carriers = {upper: chain for stack in stacks.values() for upper, chain in stack.items()}
        routes = _routes(host, function.address, carriers)
        vital = {
            piece: route.vital
            for route in routes
            if route.vital
            for piece in carriers[route.subject]
        }
        found += [
            blocker
            for name, stack in stacks.items()
            for blocker in _memberships(host, function.address, name, stack, vital)
        ]
        found += routes
        found += _pppoe(host, function.address, carriers)
        found += traffic_usage(host, function.address, carriers)
    found += _other_namespaces(graph, function, carriers)
    return Usage(tuple(found))


def interfaces_above(host: Sight, path: str) -> frozenset[str]:
    """The interfaces of the function at `path` and all that stands on them here."""
    own = host.attached.interfaces(path)
    return frozenset(name for start in own for name in _stack_on(host, start))


def _stack_on(host: Sight, name: str) -> dict[str, tuple[str, ...]]:
    """The interface and all that stands on it, each with the chain that leads there."""
    found: dict[str, tuple[str, ...]] = {name: (name,)}
    queue = [name]
    while queue and len(found) < _MAX_UPPERS:
        lower = queue.pop(0)
        for upper in _uppers(host, lower):
            if upper not in found:
                found[upper] = (*found[lower], upper)
                queue.append(upper)
    return found


def _uppers(host: Sight, name: str) -> list[str]:
    entries = host.listdir(f"{SYS_NET}/{name}")
    uppers = [entry.removeprefix("upper_") for entry in entries if entry.startswith("upper_")]
    master = host.linkname(f"{SYS_NET}/{name}/master")
    graph = read_graph(host)
    # A VXLAN or tunnel is no upper one to sysfs.
    known = graph.own.get(name)
    told = [item.name for item in graph.above(known.key) if item.where == SELF] if known else []
    return sorted({*uppers, *told, *([master] if master else [])})


def _memberships(
    host: Sight, address: str, name: str, stack: dict[str, tuple[str, ...]], vital: dict[str, str]
) -> list[Blocker]:
    """What the interface belongs to or carries; `vital`: which the host cannot do without."""
    master = host.linkname(f"{SYS_NET}/{name}/master")
    found = []
    for upper, chain in stack.items():
        if len(chain) != 2:
            continue
        kind = _kind_of(host, upper)
        if upper == master:
            detail = f"{name} is a port of the {kind} {upper}"
            evidence = f"{SYS_NET}/{name}/master leads to {upper}"
            remedy = f"ip link set {shlex.quote(name)} nomaster"
        else:
            detail = f"the {kind} {upper} stands on {name}"
            evidence = f"{SYS_NET}/{name}/upper_{upper}"
            if not host.exists(evidence):
                evidence = f"ip -details link show {shlex.quote(upper)}"
            remedy = f"ip link delete {shlex.quote(upper)}"
        ends = None if upper in vital else remedy
        found.append(
            Blocker("bridge-or-bond", address, upper, detail, evidence, ends, vital.get(upper))
        )
    return found


def _kind_of(host: Sight, name: str) -> str:
    base = f"{SYS_NET}/{name}"
    if host.isdir(f"{base}/bridge"):
        return "bridge"
    if host.isdir(f"{base}/bonding"):
        return "bond"
    if name == "ovs-system":
        return "Open vSwitch datapath"
    told = parse_uevent(host.read(f"{base}/uevent") or "").get("DEVTYPE")
    # Teams and macvlans have no DEVTYPE.
    kinds = {} if told else dict(f for f in host.observed(NET_KINDS) if len(f) == 2)
    return told or kinds.get(name, "interface")


def _routes(host: Sight, address: str, carriers: dict[str, tuple[str, ...]]) -> list[Blocker]:
    addresses = _addresses(host)
    caller = _caller(host)
    routes = read_routes(host)
    over_network = vital_over_network(host)
    found = []
    for name, chain in sorted(carriers.items()):
        cidrs = [cidr for cidr in addresses.get(name, []) if not _is_automatic(cidr)]
        own_routes = routes.get(name, [])
        facts, evidence = [], []
        if cidrs:
            facts.append(f"has {', '.join(cidrs)}")
            evidence.append(f"ip address show dev {shlex.quote(name)}")
        defaults = [route for route in own_routes if route.startswith("default")]
        if defaults:
            facts.append(f"carries the default route ({'; '.join(defaults)})")
        others = [route for route in own_routes if route not in defaults]
        if others and not cidrs:
            facts.append(f"carries routes ({', '.join(others[:4])}{' …' * (len(others) > 4)})")
        evidence += _shown_by(name, own_routes)
        hosts = {cidr.partition("/")[0] for cidr in addresses.get(name, [])}
        vital = over_network if cidrs or own_routes else None
        if defaults:
            vital = (
                f"{name} on {address} carries the default route: ending it would cut this host "
                "off from its network; give it another way in first"
            )
        if caller is not None and caller[0] in hosts:
            vital = f"you are logged in over {name} on {address}: log in by another way first"
            facts.append(f"carries your SSH session from {caller[1]} to {caller[0]}")
            evidence.append("SSH_CONNECTION")
        if facts:
            through = "" if len(chain) == 1 else f" (over {' > '.join(chain[:-1])})"
            detail = f"{name}{through} {', '.join(facts)}"
            # The end of the host's only way out is nothing to type blindly.
            remedy = None if vital else f"ip address flush dev {shlex.quote(name)}"
            if remedy is not None and not cidrs:
                # Routes that no address made stay when the addresses go.
                remedy = _ended_by(name, own_routes)
            where = "; ".join(evidence)
            found.append(Blocker("route", address, name, detail, where, remedy, vital))
    return found


def _shown_by(name: str, routes: Collection[str]) -> list[str]:
    """What shows these routes of an interface."""
    kinds = {_OTHER_ROUTES.get(route.partition(" ")[0], "") for route in routes}
    shown = [f"{kind} show dev {shlex.quote(name)}" for kind in sorted(kinds - {""})]
    plain = [route for route in routes if route.partition(" ")[0] not in _OTHER_ROUTES]
    if any(" table " in route for route in plain):
        shown.append(f"ip route show table all dev {shlex.quote(name)}")
    elif plain:
        tables = {PROC_ROUTE6 if ":" in route else PROC_ROUTE for route in plain}
        shown.append(f"{', '.join(sorted(tables))} name {name}")
    return shown


def _ended_by(name: str, routes: Iterable[str]) -> str:
    """What ends these routes of an interface."""
    kinds = {_OTHER_ROUTES.get(route.partition(" ")[0], "ip route") for route in routes}
    return "; ".join(
        f"{kind} flush{' table all' * (kind == 'ip route')} dev {shlex.quote(name)}"
        for kind in sorted(kinds)
    )


def _pppoe(host: Sight, address: str, carriers: dict[str, tuple[str, ...]]) -> list[Blocker]:
    """PPPoE sessions, whose interface carries no address and has no upper one."""
    found = []
    for line in (host.read(PROC_PPPOE) or "").splitlines()[1:]:
        words = line.split()
        if len(words) == 3 and words[2] in carriers:
            detail = f"a PPPoE session with {words[1]} runs over {words[2]}"
            evidence = f"{PROC_PPPOE} names {words[2]}"
            found.append(Blocker("route", address, words[2], detail, evidence))
    return found


def _addresses(host: Sight) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fields in host.observed(NET_ADDRESSES):
        if len(fields) == 2:
            found.setdefault(fields[0], []).append(fields[1])
    return found


def _caller(host: Sight) -> tuple[str, str] | None:
    """The server's and the client's address of the SSH session that this command runs in."""
    lines = host.observed(NET_CALLER)
    if not lines or len(lines[0]) != 2:
        return None
    return lines[0][0].partition("%")[0], lines[0][1]


def _is_automatic(cidr: str) -> bool:
    from ipaddress import ip_interface

    try:
        interface = ip_interface(cidr)
    except ValueError:
        return False
    # RFC 4291, 2.5.6; RFC 7217: an interface identifier that is made by itself has 64 bits of a MAC
    # address or at random. fe80::1 was given by hand: others have it as their router.
    made = int(interface.ip) & (1 << 64) - 1
    return interface.version == 6 and interface.is_link_local and made >> 32 != 0


def read_routes(host: Sight) -> dict[str, list[str]]:
    """By interface, the routes of all tables that somebody set: `default via 10.0.2.2`.

    Left out: rejecting routes, those to the interface's own addresses, and the link-local and
    multicast ones that the kernel makes by itself.
    """
    found: dict[str, list[str]] = {}
    if host.host.live or host.exists(NET_ROUTES):
        for fields in host.observed(NET_ROUTES):
            if len(fields) == 2:
                found.setdefault(fields[0], []).append(fields[1])
        return found
    # A tree of files, or a snapshot of an earlier version: the main table alone.
    for name, text in (
        *_parse_routes4((host.read(PROC_ROUTE) or "").splitlines()[1:]),
        *_parse_routes6((host.read(PROC_ROUTE6) or "").splitlines()),
    ):
        found.setdefault(name, []).append(text)
    return found


def _parse_routes4(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    from ipaddress import IPv4Address

    for line in lines:
        words = line.split()
        try:
            flags = int(words[3], 16)
            target, gateway, mask = (
                # Network byte order, printed as a number of the host's.
                IPv4Address(bytes.fromhex(words[column])[::-1])
                for column in (1, 2, 7)
            )
        except (ValueError, IndexError):
            continue
        if not flags & _RTF_UP or flags & _RTF_REJECT:
            continue
        prefix = f"{int(mask):b}".count("1")
        yield words[0], _route_text(str(target), prefix, str(gateway), flags)


def _parse_routes6(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    from ipaddress import IPv6Address

    for line in lines:
        words = line.split()
        try:
            target, gateway = (IPv6Address(bytes.fromhex(words[column])) for column in (0, 4))
            prefix, flags = int(words[1], 16), int(words[8], 16)
            name = words[9]
        except (ValueError, IndexError):
            continue
        if not flags & _RTF_UP or flags & (_RTF_REJECT | _RTF_LOCAL | _RTF_ANYCAST):
            continue
        if target.is_multicast or (target.is_link_local and not flags & _RTF_GATEWAY):
            continue
        yield name, _route_text(str(target), prefix, str(gateway), flags)


def _route_text(target: str, prefix: int, gateway: str, flags: int) -> str:
    if prefix == 0:
        text = "default" if ":" not in target else "default ::/0"
    else:
        text = f"{target}/{prefix}"
    return f"{text} via {gateway}" if flags & _RTF_GATEWAY else text


def _other_namespaces(
    graph: Graph, function: Placed, carriers: Mapping[str, tuple[str, ...]]
) -> list[Blocker]:
    """The function's interfaces in other namespaces, and what stands on any of them from there."""
    found = []
    start = [graph.own[name].key for name in carriers if name in graph.own]
    for item in _interfaces_of(graph, function):
        start.append(item.key)
        if item.where == SELF:
            continue
        detail = f"{item.name} lives in {namespace_text(item.where)}"
        if item.addresses:
            detail += f" with {', '.join(item.addresses)}"
        remedy = f"{in_namespace(item.where)} ip link set {shlex.quote(item.name)} netns 1"
        evidence = _evidence(item.where)
        found.append(Blocker("route", function.address, item.name, detail, evidence, remedy))
    for upper, lower in graph.elsewhere(start):
        detail = f"the {upper.kind or 'interface'} {upper.name} in {namespace_text(upper.where)} "
        detail += f"stands on {lower.name}"
        if upper.addresses:
            detail += f", with {', '.join(upper.addresses)}"
        remedy = f"{in_namespace(upper.where)} ip link delete {shlex.quote(upper.name)}"
        evidence = f"{_evidence(upper.where)}: ip -details link show {shlex.quote(upper.name)}"
        found.append(
            Blocker("bridge-or-bond", function.address, upper.name, detail, evidence, remedy)
        )
    return found


def _interfaces_of(graph: Graph, function: Placed) -> list[Interface]:
    if Address.is_address(function.path.rpartition("/")[2]):
        return graph.of_function(function.path)
    return [item for item in graph.interfaces if is_part_of(function.path, item.device)]


def _evidence(where: str) -> str:
    return where if where.startswith("/") else f"{PROC}/{where}/ns/net"
