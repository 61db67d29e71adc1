"""Open files: which processes hold a node of a device, its PCI resource files or VFIO group."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection

from vfiotool.devices.attached import is_part_of, owners
from vfiotool.devices.pci import Address
from vfiotool.host.paths import (
    DEV,
    DEV_VFIO,
    OPEN_NODES,
    PROC_NVIDIA,
    SYS_VFIO_GROUPS,
    VFIO_CLAIM,
)
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.display import has_virtio_console
from vfiotool.usage.sight import Sight

# Its driver shows sysfs no device of the node (drivers of NVIDIA's own; devices.txt, 195 char).
_NVIDIA_MAJOR = 195
_NOBODY = Usage(())
# Without a parent in sysfs (drivers/tty/hvc/hvc_console.c): the name of its folder there.
_TERMINAL = re.compile(r"hvc\d+")


def node_usage(
    host: Sight, address: str, path: str, disks: Collection[str], group: int | None
) -> Usage:
    """One blocker for each open node of the device at `path`, naming all who hold it.

    `disks` are the block devices on it, which may lie elsewhere in /sys; `group` its VFIO group,
    whose node stands for the device too.
    """
    lines = read_open_nodes(host)
    if not lines.all:
        return _NOBODY
    own = _nodes_outside_sysfs(host, address, group) | _terminals(host, path, lines)
    # An NVMe namespace has a second, generic node (drivers/nvme/host/core.c, nvme_cdev_add).
    volumes = {*disks, *(f"ng{name[4:]}" for name in disks if name.startswith("nvme"))}
    holders: dict[str, list[str]] = {}
    if group is not None and lines.untold and not any(lines.named.get(name) for name in own):
        holders.update(_held_group(host, group, lines.untold))
    for pid, command, node, device in lines.of(path):
        if is_part_of(path, device):
            holders.setdefault(node, []).append(f"pid {pid} ({command})")
    for name in (*own, *volumes):
        for pid, command, node, _ in lines.named.get(name, []):
            who = f"pid {pid} ({command})"
            if who not in holders.setdefault(node, []):
                holders[node].append(who)
    found = [
        Blocker(
            "open-file",
            address,
            node,
            f"{node} is open in {', '.join(who)}",
            "; ".join(f"{one} has {node} open" for one in who),
            f"fuser --verbose {shlex.quote(node)}",
        )
        for node, who in sorted(holders.items())
    ]
    return Usage(tuple(found))


class OpenNodes:
    """The lines of open nodes by the function that each is part of, and by the node's names."""

    def __init__(self, lines: list[list[str]]) -> None:
        self.all = [fields for fields in lines if len(fields) == 4]
        self.owned: dict[str, list[list[str]]] = {}
        self.named: dict[str, list[list[str]]] = {}
        # Open VFIO devices of which the kernel does not tell which they are.
        self.untold = [f"pid {pid} ({who})" for pid, who, _, device in self.all if device == "?"]
        for fields in self.all:
            for owner in owners(fields[3]):
                self.owned.setdefault(owner, []).append(fields)
            for name in {fields[2], fields[3], fields[3].rpartition("/")[2]}:
                self.named.setdefault(name, []).append(fields)

    def of(self, path: str) -> list[list[str]]:
        """Lines that may be part of the device at `path`; mdevs and vDPA devices have no index."""
        is_function = Address.is_address(path.rpartition("/")[2])
        return self.owned.get(path, []) if is_function else self.all


def _terminals(host: Sight, path: str, lines: OpenNodes) -> set[str]:
    """A virtio console's terminals, which are virtual devices: each of them may be its own."""
    named = {name for name in lines.named if _TERMINAL.fullmatch(name)}
    return named if named and has_virtio_console(host, path) else set()


def _held_group(host: Sight, group: int, who: list[str]) -> dict[str, list[str]]:
    """A group whose file was closed while a device of it is open: it opens once, so ask."""
    node = f"{DEV_VFIO}/{group}"
    answer = host.read(f"{VFIO_CLAIM}/{group}")
    if answer == "claimed":
        return {node: [f"one of {', '.join(who)}" if len(who) > 1 else who[0]]}
    if answer not in ("free", "unknown ENOENT", None) or (answer is None and host.host.live):
        host.miss(node, f"whether somebody has it: {answer}")
    return {}


def read_open_nodes(host: Sight) -> OpenNodes:
    """Who has which node open, read once."""
    return host.once("open nodes by owner", lambda sight: OpenNodes(sight.observed(OPEN_NODES)))


def _nodes_outside_sysfs(host: Sight, address: str, group: int | None) -> set[str]:
    """Nodes that sysfs does not show below the device: VFIO's group, NVIDIA's own driver's."""
    nodes = set()
    if group is not None:
        # By the group's device, whatever its node is called where it is open.
        nodes |= {f"{DEV_VFIO}/{group}", f"{DEV_VFIO}/noiommu-{group}"}
        nodes |= {f"{SYS_VFIO_GROUPS}/{group}", f"{SYS_VFIO_GROUPS}/noiommu-{group}"}
    gpus = host.listdir(PROC_NVIDIA)
    told = host.read(f"{PROC_NVIDIA}/{address}/information") if address in gpus else None
    for line in (told or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "Device Minor" and value.strip().isdecimal():
            nodes |= {f"{DEV}/nvidia{value.strip()}", f"char/{_NVIDIA_MAJOR}:{value.strip()}"}
    return nodes
