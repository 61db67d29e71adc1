"""The choice between the kernel's two interfaces and vfio-user, made once for an address space.

`iommufd` where the kernel has it and the device has a character device, else `type1` (container and
group). `noiommu` is taken only when asked for by name: it gives a device the whole memory, needs
CAP_SYS_RAWIO and taints the kernel. `vfio-user` is for a device that a process serves, and for no
other.
"""

from __future__ import annotations

from typing import Literal, get_args

from vfiotool.errors import Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_IOMMU
from vfiotool.vfio.iommufd import IommufdSpace
from vfiotool.vfio.space import CONTAINER_NODE, AddressSpace
from vfiotool.vfio.target import Target, not_on_vfio
from vfiotool.vfio.type1 import Type1Space
from vfiotool.vfio.vfio_user import VfioUserSpace

Backend = Literal["auto", "iommufd", "type1", "noiommu", "vfio-user"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def backend_named(text: str) -> Backend:
    """`text` as the name of a backend. Raises UsageError, listing them, for what is none."""
    for name in BACKENDS:
        if text == name:
            return name
    raise UsageError(f"{text!r} is not a backend", hint=f"one of: {', '.join(BACKENDS)}")


def open_space(target: Target, backend: Backend = "auto", host: Host | None = None) -> AddressSpace:
    """A new, empty address space over the interface `backend` (one of `BACKENDS`) that suits
    `target`, which is not opened yet.

    Raises UsageError for an unknown name, Refused where the device is not on a VFIO driver,
    Unsupported where the kernel or the device lacks the interface.
    """
    host = host or Host.local()
    backend = backend_named(backend)
    if (target.bus == "vfio-user") != (backend == "vfio-user") and backend != "auto":
        raise UsageError(
            f"{target.name} cannot be opened over {backend}",
            hint="leave out --backend",
            device=target.name,
        )
    if target.bus == "vfio-user":
        return VfioUserSpace(host)
    if not host.live:
        raise UsageError(
            f"{host.name} is not the running host: no device can be opened there",
            hint="leave out --root",
        )
    if target.group_node is None and target.cdev_node is None:
        raise not_on_vfio(target)
    if target.noiommu and backend != "noiommu":
        raise Unsupported(
            f"{target.name} is in a no-IOMMU group: its DMA would reach all of memory",
            hint="turn the IOMMU on (vfiotool doctor), or ask for --backend noiommu by name",
            device=target.name,
        )
    has_iommufd = host.exists(DEV_IOMMU) and target.cdev_node is not None
    if backend == "iommufd" and not has_iommufd:
        raise Unsupported(
            f"{target.name} has no character device for iommufd",
            hint="needs a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
            device=target.name,
        )
    if backend == "iommufd" or (backend == "auto" and has_iommufd):
        return IommufdSpace(host)
    if target.group_node is None or not host.exists(CONTAINER_NODE):
        raise Unsupported(
            f"{target.name} has no VFIO group to open",
            hint="needs a kernel with CONFIG_VFIO_GROUP and the module vfio_iommu_type1",
            device=target.name,
        )
    return Type1Space(host, noiommu=backend == "noiommu")
