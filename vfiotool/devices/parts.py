"""Which parts of a host belong to one function: disks and interfaces, by their place in sysfs."""

from __future__ import annotations

import re

from vfiotool.devices.pci import Address
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_BLOCK, SYS_NET

_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")


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


def block_paths(host: Host) -> dict[str, str]:
    """All block devices, partitions included: kernel name -> path below /sys."""
    return _class_paths(host, SYS_BLOCK)


def net_paths(host: Host) -> dict[str, str]:
    """The interfaces of this network namespace: name -> path below /sys."""
    return _class_paths(host, SYS_NET)


def _class_paths(host: Host, folder: str) -> dict[str, str]:
    links = ((name, host.readlink(f"{folder}/{name}")) for name in host.listdir(folder))
    found = ((name, host.realpath(f"{folder}/{name}")) for name, link in links if link)
    return {name: path for name, path in found if path is not None}
