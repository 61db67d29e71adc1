"""Who uses a device: mounts, swap, volumes, networks, displays, open files, enabled VFs.

Losing someone's disk or network is the one unforgivable bug, so this module errs on the side of
finding a user, and says what it could not see. All of it is reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.pci import PciFunction, read_function
from vfiotool.devices.sriov import read_vfs
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_MDEV_DEVICES, SYS_PCI_DEVICES, SYS_VDPA_DEVICES
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.display import display_usage
from vfiotool.usage.layers import own_disks, stack_on
from vfiotool.usage.network import network_usage
from vfiotool.usage.nodes import node_usage
from vfiotool.usage.storage import storage_usage

__all__ = ["Blocker", "Usage", "blockers", "survey"]

_NONE: Mapping[str, PciFunction] = {}


def blockers(
    host: Host, address: str, functions: Mapping[str, PciFunction] = _NONE
) -> tuple[Blocker, ...]:
    """What uses a function, mdev or vDPA device now; empty if nothing does. See `survey`."""
    return survey(host, address, functions).blockers


def survey(host: Host, address: str, functions: Mapping[str, PciFunction] = _NONE) -> Usage:
    """Everything that uses a PCI function (by full address), mdev (UUID) or vDPA device (name).

    A device that is gone has no users. Functions that have been read already (by address) are not
    read again; usage itself is always read anew.
    """
    function = functions.get(address) or read_function(host, address)
    if function is None:
        path = host.realpath(f"{SYS_MDEV_DEVICES}/{address}")
        if path is not None:
            return _mdev_usage(host, address, path)
        path = host.realpath(f"{SYS_VDPA_DEVICES}/{address}")
        return Usage((), ()) if path is None else _vdpa_usage(host, address, path)
    parts = [
        _vf_usage(host, function),
        storage_usage(host, address, function.path),
        network_usage(host, function),
        display_usage(host, function),
        _mdev_children(host, function),
    ]
    disks = own_disks(host, function.path)
    layers = {layer.name for layer in stack_on(host, disks)} if disks else set()
    parts.append(node_usage(host, address, function.path, layers, function.iommu_group))
    return _join(parts)


def _join(parts: list[Usage]) -> Usage:
    found = dict.fromkeys(blocker for part in parts for blocker in part.blockers)
    unseen = dict.fromkeys(text for part in parts for text in part.unseen)
    return Usage(tuple(found), tuple(unseen))


def _mdev_usage(host: Host, uuid: str, path: str) -> Usage:
    group = host.linkname(f"{SYS_MDEV_DEVICES}/{uuid}/iommu_group")
    number = int(group) if group is not None and group.isdecimal() else None
    return node_usage(host, uuid, path, set(), number)


@dataclass(frozen=True)
class _Vdpa:
    address: str
    path: str
    class_code: str | None = None


def _vdpa_usage(host: Host, name: str, path: str) -> Usage:
    """What the host does with the disk or interface of virtio_vdpa, who has vhost_vdpa's node."""
    disks = own_disks(host, path)
    layers = {layer.name for layer in stack_on(host, disks)} if disks else set()
    return _join(
        [
            storage_usage(host, name, path),
            network_usage(host, _Vdpa(name, path)),
            node_usage(host, name, path, layers, None),
        ]
    )


def _vf_usage(host: Host, function: PciFunction) -> Usage:
    """A PF with VFs: unbinding it takes all of them away, and vfio-pci refuses it."""
    vfs = read_vfs(host, function.address)
    if not vfs or function.sriov is None:
        return Usage((), ())
    users = [
        f"{vf.address} ({vf.driver}{', a VM may hold it' if is_vfio_driver(vf.driver) else ''})"
        for vf in vfs
        if vf.driver is not None
    ]
    detail = f"{len(vfs)} VFs are enabled"
    if users:
        detail += f"; on drivers: {', '.join(users)}"
    evidence = f"{SYS_PCI_DEVICES}/{function.address}/sriov_numvfs is {len(vfs)}"
    address = function.address
    remedy = f"vfiotool vf set {address} 0"
    blocker = Blocker("vfs-enabled", address, address, detail, evidence, remedy)
    return Usage((blocker,), ())


def _mdev_children(host: Host, function: PciFunction) -> Usage:
    """Mediated devices made from this function go away with its driver."""
    found = []
    for uuid in host.listdir(SYS_MDEV_DEVICES):
        path = host.realpath(f"{SYS_MDEV_DEVICES}/{uuid}") or ""
        if path.startswith(function.path + "/"):
            detail = f"the mediated device {uuid} is made from it"
            evidence = f"{SYS_MDEV_DEVICES}/{uuid}"
            remedy = f"vfiotool mdev remove {uuid}"
            found.append(Blocker("mdev-children", function.address, uuid, detail, evidence, remedy))
    return Usage(tuple(found), ())
