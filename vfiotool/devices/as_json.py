"""The contract's JSON of functions (`devices`, `show`), with all that is known beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from json import JSONEncoder

from vfiotool.devices.config.decode import (
    CAPABILITIES_KEPT,
    SPACES_KEPT,
    Capability,
    ConfigSpace,
    Once,
)
from vfiotool.devices.config.header import Header
from vfiotool.devices.config.vpd import Vpd
from vfiotool.devices.details import Details
from vfiotool.devices.names import Names
from vfiotool.devices.pci import BarRegion, Link, PciFunction, Sriov


class FunctionWriter:
    """Writes one function after another as JSON text, encoding equal configuration spaces once."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._encode = JSONEncoder().encode
        self._config_text = Once(self._write_config, SPACES_KEPT)
        self._capability_text = Once(self._write_capability, CAPABILITIES_KEPT)

    def text(self, function: PciFunction, details: Details, more: Mapping[str, object]) -> str:
        """`function_as_json` and `more` as text on one line."""
        whole = self._encode({**_facts(function, details, self._names), **more})
        config = "null" if details.config is None else self._config_text(details.config)
        return f'{whole[:-1]}, "config": {config}}}'

    def _write_capability(self, capability: Capability) -> str:
        return self._encode(_capability(capability))

    def _write_config(self, space: ConfigSpace) -> str:
        """`config_as_json` as text: functions that differ share most of their capabilities."""
        whole = self._encode(_config_facts(space))
        capabilities = ", ".join(map(self._capability_text, space.capabilities))
        return f'{whole[:-1]}, "capabilities": [{capabilities}]}}'


def function_as_json(function: PciFunction, details: Details, names: Names) -> dict[str, object]:
    """One function in the contract's shape and beyond; what the host does not tell is None."""
    config = None if details.config is None else config_as_json(details.config)
    return {**_facts(function, details, names), "config": config}


def _facts(function: PciFunction, details: Details, names: Names) -> dict[str, object]:
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
        "link": _link(details.link),
        "power_state": function.power_state,
        "d3cold_allowed": function.d3cold_allowed,
        "slot": details.slot,
        "label": function.label,
        "serial": details.serial,
        "interfaces": list(details.interfaces),
        "disks": list(details.disks),
        "vfio_driver": details.vfio_driver,
        "vfio_group_node": details.group_node,
        "vfio_device_node": details.device_node,
        "vfs": list(details.vfs),
        "mdev_parent": details.mdev_parent,
        "mdevs": list(details.mdevs),
        "vdpas": list(details.vdpas),
    }


def config_as_json(space: ConfigSpace) -> dict[str, object]:
    """Configuration space: `complete` is false where the reader was shown the header alone."""
    capabilities = [_capability(capability) for capability in space.capabilities]
    return {**_config_facts(space), "capabilities": capabilities}


def _config_facts(space: ConfigSpace) -> dict[str, object]:
    return {
        "size": space.size,
        "complete": space.complete,
        "problems": list(space.problems),
        "header": None if space.header is None else _header(space.header),
    }


def vpd_as_json(vpd: Vpd) -> dict[str, object]:
    """Vital Product Data: the fields by keyword."""
    return {
        "name": vpd.name,
        "fields": dict(vpd.fields),
        "checksum_ok": vpd.checksum_ok,
        "problems": list(vpd.problems),
    }


def _header(header: Header) -> dict[str, object]:
    return {
        "layout": header.layout,
        "multi_function": header.multi_function,
        "command": header.command,
        "status": header.status,
        "cache_line_bytes": header.cache_line_bytes,
        "latency_timer": header.latency_timer,
        "interrupt_pin": header.interrupt_pin,
        "interrupt_line": header.interrupt_line,
        "bus": header.bus,
        "bridge_control": header.bridge_control,
    }


def _capability(capability: Capability) -> dict[str, object]:
    return {
        "name": capability.name,
        "id": f"{capability.id:04x}" if capability.extended else f"{capability.id:02x}",
        "offset": capability.offset,
        "extended": capability.extended,
        "version": capability.version,
        "fields": capability.fields,
    }


def _sriov(sriov: Sriov | None) -> dict[str, object] | None:
    if sriov is None:
        return None
    return {
        "total_vfs": sriov.total_vfs,
        "num_vfs": sriov.num_vfs,
        "autoprobe": sriov.autoprobe,
    }


def _region(region: BarRegion) -> dict[str, object]:
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
