"""What a hypervisor is told of a device: a PCI function, an mdev, a vDPA device, or a socket."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vfiotool.devices.inventory import Inventory
from vfiotool.devices.pci import Address, PciFunction
from vfiotool.errors import NotFound, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV, SYS_MDEV_DEVICES, SYS_PCI_DEVICES, SYS_VDPA_DEVICES
from vfiotool.netlink.route import VfSettings

VDPA = "vdpa"
# What a selector says before the path of a socket, and what QEMU calls that device.
SOCKETS = ("vhost-user-blk", "vhost-user-net", "vfio-user")
# include/uapi/linux/un.h: UNIX_PATH_MAX is 108, the last byte of which ends the path.
_LONGEST_SOCKET = 107
# These look into the guest's memory from another process or from the kernel.
_SHARE_MEMORY = (VDPA, *SOCKETS)


@dataclass(frozen=True)
class Handed:
    """One device as a hypervisor is told of it.

    `path` is its sysfs path as hypervisors take it (`sysfsdev=`), or the device node of a vDPA
    device, or the socket of another process. `model` is the mdev type's `device_api` (`vfio-pci`,
    `vfio-ccw`, `vfio-ap`), `vfio-pci` for every PCI function, `vdpa`, or one of SOCKETS.
    """

    name: str
    path: str
    model: str
    iommu_group: int | None
    function: PciFunction | None
    # The physical function on a VFIO driver that guards this one with a VF token, itself maybe.
    guard: str | None = None
    # A function of s390x, which has no bus above it that a guest would see (zPCI).
    zpci: bool = False
    # Of a VF, what its physical function's interface was told of it.
    network: VfSettings | None = None
    # Of a network VF, its physical function's interface.
    parent_interface: str | None = None
    # Of a vDPA device, `net` or `block`, where the host tells it.
    virtio: str | None = None
    # How many virtqueues it has, that of its control included, where the host tells it.
    queues: int | None = None
    # Of an mdev: what it is made of, and its type's name for people.
    parent: str | None = None
    type: str | None = None

    @property
    def is_mdev(self) -> bool:
        return self.function is None and self.model not in _SHARE_MEMORY

    @property
    def shares_memory(self) -> bool:
        """Whether the guest's memory has to be shared (`share=on`) for it to work."""
        return self.model in _SHARE_MEMORY

    @property
    def through_vfio(self) -> bool:
        """Whether a VM opens it through the kernel's VFIO, which pins and locks its memory."""
        return self.model not in _SHARE_MEMORY

    @property
    def address(self) -> Address:
        """The PCI address. Raises ValueError for what has none on the host."""
        if self.function is None:
            raise ValueError(f"{self.name} is not a PCI function")
        return Address.parse(self.name)


def handed(inventory: Inventory, name: str) -> Handed:
    """The device of that address or UUID. Raises NotFound if the host has none."""
    function = inventory.by_address.get(name)
    if function is not None:
        path = f"{SYS_PCI_DEVICES}/{name}"
        guard = _guard(inventory, function)
        return Handed(name, path, "vfio-pci", function.iommu_group, function, guard, inventory.zpci)
    for mdev in inventory.mdevs:
        if mdev.uuid != name:
            continue
        kind = next(
            (
                kind
                for kind in inventory.mdev_types
                if (kind.parent, kind.type) == (mdev.parent, mdev.type)
            ),
            None,
        )
        return Handed(
            name,
            f"{SYS_MDEV_DEVICES}/{name}",
            (kind.device_api if kind else None) or "vfio-pci",
            mdev.iommu_group,
            None,
            parent=mdev.parent,
            type=(kind.name if kind else None) or mdev.type,
        )
    raise NotFound(
        f"no device {name} on this host", hint="vfiotool devices lists them", device=name
    )


def handed_vdpa(
    host: Host, name: str, virtio: str | None = None, queues: int | None = None
) -> Handed:
    """The vDPA device of that name. Raises NotFound; `path` is empty off vhost_vdpa."""
    base = f"{SYS_VDPA_DEVICES}/{name}"
    if name in ("", ".", "..") or "/" in name or not host.exists(base):
        raise NotFound(f"no vDPA device {name}", hint="vfiotool vdpa list", device=name)
    node = next((n for n in host.listdir(base) if re.fullmatch(r"vhost-vdpa-\d+", n)), None)
    if virtio is None:
        # virtio_vdpa's child says by its driver what it is; on vhost_vdpa only netlink tells.
        drivers = {
            host.linkname(f"{base}/{child}/driver")
            for child in host.listdir(base)
            if child.startswith("virtio")
        }
        virtio = {"virtio_blk": "block", "virtio_net": "net"}.get(next(iter(drivers), "") or "")
    path = f"{DEV}/{node}" if node else ""
    return Handed(name, path, VDPA, None, None, virtio=virtio, queues=queues)


def handed_socket(model: str, path: str) -> Handed:
    """A device that another process serves on a socket. Raises UsageError for a bad path."""
    hint = f"write {model}:/run/NAME.sock"
    if not path or not path.isprintable():
        raise UsageError(f"{path[:60]!r} is not a socket's path", hint=hint)
    whole = os.path.abspath(path)
    if len(os.fsencode(whole)) > _LONGEST_SOCKET:
        raise UsageError(
            f"a socket's path has {_LONGEST_SOCKET} bytes at most, this one has "
            f"{len(os.fsencode(whole))}",
            hint=hint,
        )
    return Handed(whole, whole, model, None, None)


def _guard(inventory: Inventory, function: PciFunction) -> str | None:
    """Who sets the VF token that opening this function takes: none where the host drives the PF.

    Source: drivers/vfio/pci/vfio_pci_core.c, vfio_pci_validate_vf_token.
    """
    if function.physfn is None:
        makes_vfs = function.sriov is not None and function.sriov.num_vfs
        return function.address if makes_vfs and function.on_vfio else None
    owner = inventory.by_address.get(function.physfn)
    return owner.address if owner is not None and owner.on_vfio else None
