"""Which disks and interfaces belong to a function: those that go when its driver goes.

Source: Documentation/ABI/stable/sysfs-block, testing/sysfs-class-net;
drivers/nvme/host/multipath.c for the names of native multipath.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

from vfiotool.devices.pci import Address
from vfiotool.host.paths import SYS_BLOCK, SYS_NET, SYS_PCI_DEVICES

_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_HIDDEN_PATH = re.compile(r"nvme(\d+)c\d+n(\d+)")


class Links(Protocol):
    """What is asked here of a `Host`, or of what looks at one on behalf of `usage`."""

    def listdir(self, path: str) -> list[str]: ...
    def readlink(self, path: str) -> str | None: ...
    def realpath(self, path: str) -> str | None: ...


def is_part_of(path: str, device: str) -> bool:
    """Whether the device at `device` belongs to the function at `path` itself.

    Both are paths below /sys. A bridge's subtree holds other functions: those are not its parts,
    they stay when its driver goes. A function that is a host bridge of a PCI domain of its own
    (Intel's VMD) takes all of that domain with it (drivers/pci/controller/vmd.c, vmd_remove).
    """
    if device == path:
        return True
    if not device.startswith(path + "/"):
        return False
    rest = device[len(path) + 1 :].split("/")
    if _HOST_BRIDGE.fullmatch(rest[0]):
        return True
    return not any(Address.is_address(piece) for piece in rest)


def owners(device: str) -> tuple[str, ...]:
    """The paths of the PCI functions that the device at `device` is part of, innermost first."""
    pieces = device.split("/")
    found: list[str] = []
    for end in range(len(pieces), 0, -1):
        if not Address.is_address(pieces[end - 1]):
            continue
        inner = end < len(pieces) and _HOST_BRIDGE.fullmatch(pieces[end]) is not None
        if not found or inner:
            found.append("/".join(pieces[:end]))
    return tuple(found)


def functions_behind(host: Links, address: str) -> tuple[str, ...]:
    """The PCI functions behind a bridge, or in the domain that a function is the host bridge of."""
    start = host.realpath(f"{SYS_PCI_DEVICES}/{address}")
    found, pending = [], [] if start is None else [start]
    while pending:
        path = pending.pop()
        for name in host.listdir(path):
            if Address.is_address(name):
                found.append(name)
            if Address.is_address(name) or _HOST_BRIDGE.fullmatch(name):
                pending.append(f"{path}/{name}")
    return tuple(sorted(found))


def block_paths(host: Links) -> dict[str, str]:
    """All block devices, partitions included: kernel name -> path below /sys."""
    return _class_paths(host, SYS_BLOCK)


def net_paths(host: Links) -> dict[str, str]:
    """The interfaces of this network namespace: name -> path below /sys."""
    return _class_paths(host, SYS_NET)


def _class_paths(host: Links, folder: str) -> dict[str, str]:
    links = ((name, host.readlink(f"{folder}/{name}")) for name in host.listdir(folder))
    found = ((name, host.realpath(f"{folder}/{name}")) for name, link in links if link)
    return {name: path for name, path in found if path is not None}


class Attached:
    """The block devices and interfaces of one host by what they are part of, each read once."""

    def __init__(self, host: Links) -> None:
        self._host = host

    def interfaces(self, path: str) -> tuple[str, ...]:
        """The interfaces of the device at `path` that this network namespace shows, sorted."""
        own = _parts(path, self.net, self._nets)
        return tuple(sorted(own)) if own else ()

    def disks(self, path: str) -> tuple[str, ...]:
        """The whole disks of the device at `path`, sorted."""
        own = self.blocks(path)
        if not own:
            return ()
        paths = self.block
        inside = {name for name in own if any(paths[name].startswith(paths[o] + "/") for o in own)}
        return tuple(
            name for name in own if name not in inside and not _HIDDEN_PATH.fullmatch(name)
        )

    def blocks(self, path: str) -> tuple[str, ...]:
        """The block devices of the device at `path`, partitions included, sorted.

        A namespace under native NVMe multipath is not below its controller: the hidden path
        device `nvme0c1n2` is, and names it.
        """
        own = set(_parts(path, self.block, self._blocks))
        if not own:
            return ()
        for name in tuple(own):
            match = _HIDDEN_PATH.fullmatch(name)
            head = None if match is None else f"nvme{match[1]}n{match[2]}"
            if head in self.block:
                own.discard(name)
                below = self.block[head] + "/"
                own |= {head, *(n for n, where in self.block.items() if where.startswith(below))}
        return tuple(sorted(own))

    @property
    def owners(self) -> frozenset[str]:
        """The paths of the functions that have block devices or interfaces."""
        return frozenset((*self._blocks, *self._nets))

    @cached_property
    def block(self) -> dict[str, str]:
        """`block_paths`."""
        return block_paths(self._host)

    @cached_property
    def net(self) -> dict[str, str]:
        """`net_paths`."""
        return net_paths(self._host)

    @cached_property
    def _blocks(self) -> dict[str, list[str]]:
        return _by_owner(self.block)

    @cached_property
    def _nets(self) -> dict[str, list[str]]:
        return _by_owner(self.net)


def _by_owner(paths: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, path in paths.items():
        for owner in owners(path):
            found.setdefault(owner, []).append(name)
    return found


def _parts(path: str, paths: Mapping[str, str], index: Mapping[str, list[str]]) -> list[str]:
    """The names of what is part of the device at `path`: mdevs and vDPA devices have no index."""
    own = index.get(path)
    if own is not None:
        return own
    if not paths or Address.is_address(path.rpartition("/")[2]):
        return []
    return [name for name, where in paths.items() if is_part_of(path, where)]
