"""Open files: which processes hold a node of a device, its PCI resource files or VFIO group."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from vfiotool.devices.parts import is_part_of
from vfiotool.host.host import Host, observed_lines
from vfiotool.host.paths import DEV, DEV_VFIO, OPEN_NODES, PROC_NVIDIA
from vfiotool.usage.blocker import Blocker, Usage


def node_usage(
    host: Host, address: str, path: str, disks: Collection[str], group: int | None
) -> Usage:
    """One blocker for each open node of the device at `path`, naming all who hold it.

    `disks` are the block devices on it, which may lie elsewhere in /sys; `group` its VFIO group,
    whose node stands for the device too.
    """
    lines, unseen = observed_lines(host, OPEN_NODES)
    own = _nodes_outside_sysfs(host, address, group)
    # An NVMe namespace has a second, generic node (drivers/nvme/host/core.c, nvme_cdev_add).
    volumes = {*disks, *(f"ng{name[4:]}" for name in disks if name.startswith("nvme"))}
    holders: dict[str, list[str]] = {}
    for fields in lines:
        if len(fields) != 4:
            continue
        pid, command, node, device = fields
        if node in own or is_part_of(path, device) or device.rpartition("/")[2] in volumes:
            holders.setdefault(node, []).append(f"pid {pid} ({command})")
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
    return Usage(tuple(found), tuple(unseen))


def _nodes_outside_sysfs(host: Host, address: str, group: int | None) -> set[str]:
    """Nodes that sysfs does not show below the device: VFIO's group, NVIDIA's own driver's."""
    nodes = set()
    if group is not None:
        nodes |= {f"{DEV_VFIO}/{group}", f"{DEV_VFIO}/noiommu-{group}"}
    for line in (host.read(f"{PROC_NVIDIA}/{address}/information") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "Device Minor" and value.strip().isdecimal():
            nodes.add(f"{DEV}/nvidia{value.strip()}")
    return nodes
