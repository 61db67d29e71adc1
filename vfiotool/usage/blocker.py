"""What a user of a device is called, and which parts of a host belong to one function."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.devices.pci import Address
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_BLOCK, SYS_NET

_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")

# Every kind of blocker, and what it says.
KINDS = {
    "mounted": "a file system on it is mounted",
    "swap": "it holds swap space in use",
    "storage-member": "it is part of a volume, an array, a pool, or exported",
    "route": "an interface of it has addresses or routes, or lives in another namespace",
    "bridge-or-bond": "an interface of it belongs to a bridge, a bond or the like",
    "display": "it shows a picture",
    "boot-vga": "the firmware's display, where the console is",
    "console": "the kernel's console runs over it",
    "open-file": "a process has a node of it open",
    "vfs-enabled": "it has virtual functions enabled",
    "mdev-children": "mediated devices are made from it",
    "no-iommu": "no IOMMU translates for it",
    "no-interrupt-remapping": "its interrupts are not isolated",
    "reserved-direct": "the firmware demands direct memory access for it",
    "group-member": "another device of its group is on a driver of the host",
    "no-driver": "no VFIO driver takes it",
}


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason why a device cannot be handed over.

    `kind` is one of KINDS; `device` the PCI address or mdev UUID that has the problem;
    `subject` what exactly is in use (a mount point, a swap area, an interface, a node), by which
    a policy can allow it; `detail` a sentence; `evidence` where one can check it; `remedy` a
    command that ends the use, where there is one. `vital`: without it the host or the caller is
    cut off at once, so no command that ends it is offered.
    """

    kind: str
    device: str
    subject: str
    detail: str
    evidence: str
    remedy: str | None = None
    vital: bool = False

    def as_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "device": self.device,
            "subject": self.subject,
            "detail": self.detail,
            "evidence": self.evidence,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Everything that uses a device, and what could not be seen while looking."""

    blockers: tuple[Blocker, ...]
    unseen: tuple[str, ...]


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


def observed_lines(host: Host, name: str) -> tuple[list[list[str]], list[str]]:
    """An observation's lines, split at tabs, and what it says could not be seen."""
    lines = []
    unseen = []
    for line in (host.read(name) or "").splitlines():
        fields = line.split("\t")
        if fields[0] == "!":
            unseen.append(" ".join(fields[1:]))
        else:
            lines.append(fields)
    return lines, unseen
