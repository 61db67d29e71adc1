"""Whether the host runs from what it reaches over a network: a file system, or a disk below one.

Source: Documentation/ABI/testing/sysfs-nvme and drivers/nvme/host/multipath.c,
drivers/scsi/scsi_transport_iscsi.c (sessions stand in a disk's path), drivers/block/nbd.c.
"""

from __future__ import annotations

import re

from vfiotool.host.paths import SYS_BLOCK, SYS_NVME
from vfiotool.usage.layers import by_number
from vfiotool.usage.mounts import Mount, vital_mounts
from vfiotool.usage.sight import Sight

_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs"}
_ISCSI = re.compile(r"/session\d+/")
_NVME = re.compile(r"nvme(\d+)(?:c(\d+))?n\d+")
_NVME_OVER_NETWORK = ("tcp", "rdma")
_BY_NAME = {"nbd": "nbd", "rbd": "RBD", "drbd": "DRBD", "etherd": "ATA over Ethernet"}
_MAX_LAYERS = 256


def vital_over_network(sight: Sight) -> str | None:
    """Why no network may be taken lightly, where the host runs from one; None where it does not.

    Which interface leads there is not told by what is mounted.
    """
    return sight.once("vital over network", _vital)


def _vital(sight: Sight) -> str | None:
    for mount in vital_mounts(sight):
        what = mount.type if mount.type in _FILE_SYSTEMS else _far_disk(sight, mount)
        if what is not None:
            return (
                f"{mount.point} is mounted over the network ({what} from {mount.source}), "
                "perhaps by this interface: the host runs from it"
            )
    return None


def _far_disk(sight: Sight, mount: Mount) -> str | None:
    """By what a disk below a mount is reached over the network; None if all are here."""
    first = by_number(sight).get(mount.number)
    first = first or mount.source.rpartition("/")[2]
    pending, seen = [first], {first}
    while pending and len(seen) < _MAX_LAYERS:
        name = pending.pop()
        how = _reached_by(sight, name)
        if how is not None:
            return how
        for lower in _below(sight, name):
            if lower not in seen:
                seen.add(lower)
                pending.append(lower)
    return None


def _below(sight: Sight, name: str) -> list[str]:
    """The disk of a partition, and what a volume is made of."""
    paths = sight.attached.block
    disk = paths.get(name, "").rpartition("/")[0].rpartition("/")[2]
    lowers = sight.listdir(f"{SYS_BLOCK}/{name}/slaves")
    return [*lowers, *([disk] if disk in paths else [])]


def _reached_by(sight: Sight, name: str) -> str | None:
    path = sight.attached.block.get(name, "")
    if _ISCSI.search(path):
        return "iSCSI"
    nvme = _NVME.fullmatch(name)
    if nvme is not None:
        return _nvme_transport(sight, name, nvme[1])
    prefix = re.match(r"[a-z]+", name)
    return _BY_NAME.get(prefix[0]) if prefix is not None else None


def _nvme_transport(sight: Sight, name: str, number: str) -> str | None:
    """How an NVMe disk is reached: its controller's transport, or that of any of its paths."""
    shared = "/nvme-subsystem/" in sight.attached.block.get(name, "")
    controllers = set() if shared else {number}
    namespace = name.rpartition("n")[2]
    for other in sight.attached.block:
        path = _NVME.fullmatch(other)
        if (
            path is not None
            and path[2]
            and (path[1], other.rpartition("n")[2])
            == (
                number,
                namespace,
            )
        ):
            controllers.add(path[2])
    for controller in sorted(controllers):
        transport = sight.read(f"{SYS_NVME}/nvme{controller}/transport")
        if transport in _NVME_OVER_NETWORK:
            return f"NVMe over {'TCP' if transport == 'tcp' else 'RDMA'}"
    return None
