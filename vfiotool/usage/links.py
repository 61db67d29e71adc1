"""The interfaces of all network namespaces, and what stands on what across them.

A container's macvlan, VLAN, ipvlan, MACsec or VXLAN interface stands on one of the host's, and
the host's own sysfs does not show it: IFLA_LINK and IFLA_LINK_NETNSID do
(Documentation/networking, net/core/rtnetlink.c, nla_put_iflink).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from vfiotool.devices.attached import owners
from vfiotool.host.paths import NET_LINKS, NET_NAMESPACES, PROC
from vfiotool.usage.sight import Sight

SELF = "self"
# In the place of a namespace: the kernel tells the index of what is below alone.
_UNTOLD = "?"
_FIELDS = 10

# A network namespace as the observation names it, and an interface's index there.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface. `where` is its namespace: SELF, a pid, or a path that leads there.

    `lower` is what it stands on, `device` the path below /sys of the device that it is.
    """

    where: str
    index: int
    name: str
    kind: str
    lower: Key | None
    master: Key | None
    device: str
    addresses: tuple[str, ...]
    has_xdp: bool

    @property
    def key(self) -> Key:
        return self.where, self.index


class Graph:
    """The interfaces of a host, by key, by what they stand on, and by the function they are."""

    def __init__(self, interfaces: tuple[Interface, ...]) -> None:
        self.interfaces = interfaces
        self.by_key = {item.key: item for item in interfaces}
        self.own = {item.name: item for item in interfaces if item.where == SELF}
        self._above: dict[Key, list[Interface]] = {}
        self._owned: dict[str, list[Interface]] = {}
        for item in interfaces:
            if item.lower is not None:
                self._above.setdefault(item.lower, []).append(item)
            if item.device:
                for owner in owners(item.device):
                    self._owned.setdefault(owner, []).append(item)

    @property
    def owners(self) -> Collection[str]:
        """The paths of the functions that have interfaces, in whatever namespace."""
        return self._owned

    def of_function(self, path: str) -> list[Interface]:
        """The interfaces of the PCI function at `path`, in whatever namespace they live."""
        return self._owned.get(path, [])

    def above(self, key: Key) -> Iterator[Interface]:
        """What stands straight on an interface, and what it is a port of.

        So does what stands on one of that index in a namespace that is not told.
        """
        yield from self._above.get(key, [])
        yield from (item for item in self._above.get((_UNTOLD, key[1]), []) if item.key != key)
        item = self.by_key.get(key)
        if item is not None and item.master is not None and item.master in self.by_key:
            yield self.by_key[item.master]

    def elsewhere(self, start: list[Key]) -> list[tuple[Interface, Interface]]:
        """What stands, at last, on the interfaces `start` from another namespace, with what on."""
        found: dict[Key, tuple[Interface, Interface]] = {}
        queue, seen = list(start), set(start)
        while queue:
            key = queue.pop(0)
            for upper in self.above(key):
                if upper.key in seen:
                    continue
                seen.add(upper.key)
                queue.append(upper.key)
                if upper.where != SELF and key in self.by_key:
                    found[upper.key] = (upper, self.by_key[key])
        return list(found.values())


def read_graph(sight: Sight) -> Graph:
    """The interfaces that the host's namespaces have, each once."""
    return sight.once("links", _read_graph)


def _read_graph(sight: Sight) -> Graph:
    lines = sight.observed(NET_LINKS)
    found = [item for item in map(_parse, lines) if item is not None]
    if not lines and not sight.host.live:
        # A snapshot of an earlier version: cards in other namespaces, nothing that stands on them.
        for number, fields in enumerate(sight.observed(NET_NAMESPACES)):
            if len(fields) == 4:
                where, name, device, cidrs = fields
                addresses = tuple(filter(None, cidrs.split(",")))
                found.append(
                    Interface(where, -number, name, "", None, None, device, addresses, False)
                )
    return Graph(tuple(found))


def _parse(fields: list[str]) -> Interface | None:
    if len(fields) != _FIELDS:
        return None
    where, index, name, kind, lower_where, lower, master, device, cidrs, xdp = fields
    try:
        return Interface(
            where=where,
            index=int(index),
            name=name,
            kind=kind,
            lower=(lower_where, int(lower)) if lower else None,
            master=(where, int(master)) if master else None,
            device=device,
            addresses=tuple(filter(None, cidrs.split(","))),
            has_xdp=bool(xdp),
        )
    except ValueError:
        return None


def namespace_text(where: str) -> str:
    """A namespace in words."""
    if where.startswith("/"):
        return f"the network namespace {where}"
    return f"the network namespace of pid {where}"


def in_namespace(where: str) -> str:
    """The words before a command that is to run in a namespace."""
    if where.isdecimal():
        return f"nsenter --target {where} --net"
    path = where if where.startswith("/") else f"{PROC}/{where}/ns/net"
    return f"nsenter --net={shlex.quote(path)}"
