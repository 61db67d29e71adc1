"""Who uses a device: mounts, swap, volumes, networks, displays, open files, enabled VFs.

Losing someone's disk or network is the one unforgivable bug, so this module errs on the side of
finding a user, and what it could not look at is a blocker too. All of it is reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vfiotool.devices.identity import role_of
from vfiotool.devices.pci import PciFunction, read_function
from vfiotool.devices.sriov import read_vfs
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    NET_ADDRESSES,
    NO_CONFIGFS,
    SYS_BLOCK,
    SYS_CONFIG,
    SYS_MDEV_DEVICES,
    SYS_NET,
    SYS_PCI_DEVICES,
    SYS_VDPA_DEVICES,
    SYS_VDUSE,
)
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.connected import connected_usage
from vfiotool.usage.display import display_usage
from vfiotool.usage.layers import stack_on
from vfiotool.usage.network import interfaces_above, network_usage
from vfiotool.usage.nodes import node_usage
from vfiotool.usage.occupied import may_be_used
from vfiotool.usage.parts import netconsoles, parts_usage
from vfiotool.usage.sight import Sight, Unseen
from vfiotool.usage.storage import storage_usage

__all__ = ["Blocker", "Usage", "blockers", "look", "survey"]

_NONE: Mapping[str, PciFunction] = {}
_NOTHING = Usage(())
# What a storage or network driver makes of a function, when it is neither a disk nor an
# interface: a SCSI host, an NVMe controller, a port; a domain of its own; an RDMA device.
_CLASSES = {"01": SYS_BLOCK, "02": SYS_NET}
_ADAPTER = re.compile(
    r"^((ata|host)\d+|nvme|mmc_host|pci[0-9a-f]+:[0-9a-f]+|infiniband|ieee80211|uio)$",
    re.MULTILINE,
)
_VIRTIO = re.compile(r"^virtio.*$", re.MULTILINE)


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
    return look(Sight(host, functions), address, functions.get(address))


def look(sight: Sight, address: str, function: PciFunction | None = None) -> Usage:
    """`survey` of one device after another by one sight, which reads each thing once."""
    found, unseen = sight.noted(lambda: _look(sight, address, function))
    if not unseen:
        return found
    failed = dict.fromkeys(_unseen(address, item) for item in unseen)
    return Usage((*found.blockers, *failed), found.unknown)


def _unseen(address: str, item: Unseen) -> Blocker:
    detail = f"it may be in use: {item.what} could not be looked at: {item.why}"
    if item.what == address:
        detail = f"it may be in use: {item.why}"
    evidence = f"{item.what}: {item.why}"
    remedy = f"mount -t configfs none {SYS_CONFIG}" if NO_CONFIGFS in item.why else None
    return Blocker("unseen", address, item.what, detail, evidence, remedy)


def _look(sight: Sight, address: str, function: PciFunction | None) -> Usage:
    for name in () if function is None else function.unread:
        sight.miss(f"{SYS_PCI_DEVICES}/{address}/{name}", "it is there, and cannot be read")
    function = function or read_function(sight.host, address)
    if function is None:
        path = sight.realpath(f"{SYS_MDEV_DEVICES}/{address}")
        if path is not None:
            return _mdev_usage(sight, address, path)
        path = sight.realpath(f"{SYS_VDPA_DEVICES}/{address}")
        if path is None and sight.readlink(f"{SYS_PCI_DEVICES}/{address}") is not None:
            sight.miss(address, "it is there, and cannot be read")
        return Usage(()) if path is None else _vdpa_usage(sight, address, path)
    path = function.path
    # What the table of `occupied.py` does not tell of is asked of every function.
    told = may_be_used(sight, function)
    virtio = function.driver == "virtio-pci"
    parts = [
        _vf_usage(sight, function),
        storage_usage(sight, address, path, virtio=virtio) if told else _NOTHING,
        network_usage(sight, function) if told else _NOTHING,
        display_usage(sight, function) if told else _NOTHING,
        parts_usage(sight, function, interfaces_above(sight, path)) if told else _NOTHING,
        connected_usage(sight, function) if told else _NOTHING,
        _children(sight, function) if told else _NOTHING,
        _open_nodes(sight, address, path, function.iommu_group),
    ]
    parts += _out_of_sight(sight, function, parts)
    own_net = sight.attached.interfaces(function.path)
    if own_net and not sight.host.live and not sight.exists(NET_ADDRESSES):
        parts.append(Usage((), ("the addresses of the interfaces",)))
    return _join(parts)


def _out_of_sight(sight: Sight, function: PciFunction, parts: Iterable[Usage]) -> list[Usage]:
    """What cannot be known of a function of which nothing can be seen; noted where it could be."""
    if any(part.blockers for part in parts) or not _is_out_of_sight(sight, function):
        return []
    # A tree that has no such class at all was never asked for it.
    if sight.host.live or sight.exists(_CLASSES[(function.class_code or "")[:2]]):
        why = f"{function.driver} has it, and no interface, disk or adapter of it can be seen"
        sight.miss(function.address, why)
        return []
    return [Usage((), (f"what {function.driver} makes of {function.address}",))]


def _join(parts: Iterable[Usage]) -> Usage:
    parts = tuple(part for part in parts if part.blockers or part.unknown)
    if len(parts) < 2:
        return parts[0] if parts else _NOTHING
    found = dict.fromkeys(blocker for part in parts for blocker in part.blockers)
    unknown = dict.fromkeys(text for part in parts for text in part.unknown)
    return Usage(tuple(found), tuple(unknown))


def _open_nodes(sight: Sight, address: str, path: str, group: int | None) -> Usage:
    disks = sight.attached.blocks(path)
    layers = {layer.name for layer in stack_on(sight, disks)} if disks else set()
    return node_usage(sight, address, path, layers, group)


def _is_out_of_sight(sight: Sight, function: PciFunction) -> bool:
    """A network or storage function that a host driver has, and of which nothing can be seen.

    Its disk or interface is somewhere, such as in a network namespace that nobody can enter.
    """
    code = (function.class_code or "")[:2]
    if code not in _CLASSES or function.on_vfio or role_of(function.driver) != "host":
        return False
    attached = sight.attached
    if attached.interfaces(function.path) or attached.blocks(function.path):
        return False
    # Not kept by the sight: hosts have thousands of these, and each is looked at once.
    names = sight.host.listdir(function.path)
    for name in _VIRTIO.findall("\n".join(names)):
        if sight.readlink(f"{function.path}/{name}/driver") is None:
            return False
        names = [*names, *sight.listdir(f"{function.path}/{name}")]
    return _ADAPTER.search("\n".join(names)) is None


def _mdev_usage(sight: Sight, uuid: str, path: str) -> Usage:
    group = sight.linkname(f"{SYS_MDEV_DEVICES}/{uuid}/iommu_group")
    number = int(group) if group is not None and group.isdecimal() else None
    return node_usage(sight, uuid, path, set(), number)


@dataclass(frozen=True)
class _Vdpa:
    address: str
    path: str


def _vdpa_usage(sight: Sight, name: str, path: str) -> Usage:
    """What the host does with the disk or interface of virtio_vdpa, who has vhost_vdpa's node."""
    return _join(
        [
            storage_usage(sight, name, path),
            network_usage(sight, _Vdpa(name, path)),
            Usage(tuple(netconsoles(sight, name, interfaces_above(sight, path)))),
            _open_nodes(sight, name, path, None),
            _server_usage(sight, name),
        ]
    )


def _server_usage(sight: Sight, name: str) -> Usage:
    """A VDUSE device with a driver and no server: letting go waits for an answer, for ever with
    requests in flight, and holds the lock of all of vDPA meanwhile."""
    from vfiotool.devices.vduse import read_vduse

    devices = sight.once("vduse devices", lambda at: read_vduse(at.host))
    device = next((item for item in devices if item.name == name and item.waits), None)
    if device is None:
        return Usage(())
    if device.state == "mute":
        detail = f"its server, pid {device.pid} ({device.command}), does not answer"
    else:
        detail = "its server is gone"
    if device.in_flight:
        detail += f", with {device.in_flight} requests in flight"
    evidence = f"{SYS_VDUSE}/{name} is {device.state}"
    remedy = f"vfiotool vduse rescue {name}"
    return Usage((Blocker("no-server", name, name, detail, evidence, remedy),))


def _vf_usage(sight: Sight, function: PciFunction) -> Usage:
    """A PF with VFs: unbinding it takes all of them away, and vfio-pci refuses it."""
    # Asked anew: who read the function may have taken a failure for an absent attribute.
    total = f"{SYS_PCI_DEVICES}/{function.address}/sriov_totalvfs"
    if function.physfn is not None or (function.sriov is None and sight.read(total) is None):
        return Usage(())
    vfs = read_vfs(sight.host, function.address, sight.functions)
    if not vfs:
        return Usage(())
    users = [
        f"{vf.address} ({vf.driver}{', a VM may hold it' if role_of(vf.driver) == 'vfio' else ''})"
        for vf in vfs
        if vf.driver is not None
    ]
    detail = f"{len(vfs)} VFs are enabled" if len(vfs) > 1 else "1 VF is enabled"
    if users:
        detail += f"; on drivers: {', '.join(users)}"
    evidence = f"{SYS_PCI_DEVICES}/{function.address}/sriov_numvfs is {len(vfs)}"
    address = function.address
    remedy = f"vfiotool vf set {address} 0"
    return Usage((Blocker("vfs-enabled", address, address, detail, evidence, remedy),))


def _children(sight: Sight, function: PciFunction) -> Usage:
    """Mediated and vDPA devices made from this function go away with its driver."""
    found = []
    for kind, folder, what, remove in (
        ("mdev-children", SYS_MDEV_DEVICES, "mediated device", "vfiotool mdev remove"),
        ("vdpa-children", SYS_VDPA_DEVICES, "vDPA device", "vfiotool vdpa remove"),
    ):
        for name in sight.listdir(folder):
            path = sight.realpath(f"{folder}/{name}") or ""
            if not path.startswith(function.path + "/"):
                continue
            detail = f"the {what} {name} is made from it"
            driver = sight.linkname(f"{folder}/{name}/driver")
            if kind == "vdpa-children" and driver is not None:
                detail += f", on {driver}"
            evidence = f"{folder}/{name}"
            found.append(
                Blocker(kind, function.address, name, detail, evidence, f"{remove} {name}")
            )
    return Usage(tuple(found))
