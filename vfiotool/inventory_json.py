"""The contract's JSON of functions (`devices`, `show`)."""

from __future__ import annotations

from vfiotool.names import Names
from vfiotool.pci import Link, PciFunction, Region, Sriov


def function_as_json(function: PciFunction, names: Names) -> dict[str, object]:
    """One function in the contract's shape; what the host does not tell is None."""
    known = names.lookup(
        function.vendor,
        function.device,
        function.subsystem_vendor,
        function.subsystem_device,
        function.class_code,
    )
    return {
        "address": function.address,
        "vendor": function.vendor,
        "device": function.device,
        "subsystem_vendor": function.subsystem_vendor,
        "subsystem_device": function.subsystem_device,
        "class": function.class_code,
        "revision": function.revision,
        "vendor_name": known.vendor,
        "device_name": known.device,
        "subsystem_name": known.subsystem,
        "class_name": known.class_name,
        "driver": function.driver,
        "driver_override": function.driver_override,
        "iommu_group": function.iommu_group,
        "iommu": function.iommu,
        "numa_node": function.numa_node,
        "boot_vga": function.boot_vga,
        "sriov": _sriov(function.sriov),
        "physfn": function.physfn,
        "vf_index": function.vf_index,
        "reset_methods": list(function.reset_methods),
        "regions": [_region(region) for region in function.regions],
        "link": _link(function.link),
        "power_state": function.power_state,
        "d3cold_allowed": function.d3cold_allowed,
    }


def _sriov(sriov: Sriov | None) -> dict[str, object] | None:
    if sriov is None:
        return None
    return {
        "total_vfs": sriov.total_vfs,
        "num_vfs": sriov.num_vfs,
        "autoprobe": sriov.autoprobe,
    }


def _region(region: Region) -> dict[str, object]:
    return {
        "index": region.index,
        "start": region.start,
        "size": region.size,
        "kind": region.kind,
        "prefetchable": region.prefetchable,
        "bits": region.bits,
    }


def _link(link: Link | None) -> dict[str, object] | None:
    if link is None:
        return None
    return {
        "speed_gts": link.speed_gts,
        "width": link.width,
        "max_speed_gts": link.max_speed_gts,
        "max_width": link.max_width,
    }
