"""Mediated devices as a host shows them: parents, types, instances (reading only).

Source: Documentation/driver-api/vfio-mediated-device.rst,
Documentation/ABI/testing/sysfs-bus-vfio-mdev.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.host.host import Host
from vfiotool.host.paths import (
    SYS_MDEV_DEVICES,
    SYS_MDEV_PARENTS,
    SYS_MODULE,
    SYS_PCI_DEVICES,
)


@dataclass(frozen=True, slots=True)
class MdevType:
    """A type that a parent can make. `available_instances` is advisory."""

    parent: str
    type: str
    name: str | None
    device_api: str | None
    available_instances: int | None
    description: str | None


@dataclass(frozen=True, slots=True)
class Mdev:
    """An instance. `parent` and `type` are None if it vanished while it was read."""

    uuid: str
    parent: str | None
    type: str | None
    iommu_group: int | None


def read_mdev_types(host: Host) -> tuple[MdevType, ...]:
    """All types of all parents, by parent and type."""
    types = []
    for parent in host.listdir(SYS_MDEV_PARENTS):
        base = f"{SYS_MDEV_PARENTS}/{parent}/mdev_supported_types"
        for name in host.listdir(base):
            types.append(
                MdevType(
                    parent=parent,
                    type=name,
                    name=host.read(f"{base}/{name}/name"),
                    device_api=host.read(f"{base}/{name}/device_api"),
                    available_instances=host.read_int(f"{base}/{name}/available_instances"),
                    description=host.read(f"{base}/{name}/description"),
                )
            )
    return tuple(types)


def read_reason_for_none(host: Host) -> str:
    """Why a host without types has none, as far as it shows, and what may bring them."""
    gvt = host.read(f"{SYS_MODULE}/i915/parameters/enable_gvt")
    if gvt in ("N", "0"):
        # drivers/gpu/drm/i915/intel_gvt.c; Broadwell to Comet Lake have it.
        return (
            f"i915 has enable_gvt={gvt}: boot with i915.enable_gvt=1 and load the module kvmgt "
            "(Intel graphics of the generations that have GVT-g: Core of the 6th to the 10th)"
        )
    for address in host.listdir(SYS_PCI_DEVICES):
        if host.exists(f"{SYS_PCI_DEVICES}/{address}/nvidia/current_vgpu_type"):
            return (
                "NVIDIA's vGPUs are types of virtual functions on this kernel: "
                f"vfiotool why {address} shows those of {address}"
            )
    return (
        "their host driver makes them: a vendor's vGPU driver, kvmgt, vfio_ap or vfio_ccw has to "
        "be loaded"
    )


def read_mdevs(host: Host) -> tuple[Mdev, ...]:
    """All instances, by UUID."""
    return tuple(_read_mdev(host, uuid) for uuid in host.listdir(SYS_MDEV_DEVICES))


def _read_mdev(host: Host, uuid: str) -> Mdev:
    base = f"{SYS_MDEV_DEVICES}/{uuid}"
    path = host.realpath(base)
    group = host.linkname(f"{base}/iommu_group")
    return Mdev(
        uuid=uuid,
        parent=None if path is None else path.split("/")[-2],
        type=host.linkname(f"{base}/mdev_type"),
        iommu_group=int(group) if group is not None and group.isdecimal() else None,
    )
