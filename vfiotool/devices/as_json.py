"""The contract's JSON of functions (`devices`, `show`), with all that is known beyond it."""

from __future__ import annotations

from json import JSONEncoder, loads
from json.encoder import encode_basestring_ascii

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

# So many kinds of functions are kept.
_TEXTS_KEPT = 4096
_PLACE = ("iommu", "numa_node", "boot_vga", "sriov")
_OTHERS = (
    ("power_state", "d3cold_allowed", "slot", "label"),
    ("interfaces", "disks", "vfio_driver"),
    ("mdev_parent", "mdevs", "vdpas"),
)

# Vendor, device, those of the subsystem, class code, revision, driver, its override.
_Text = str | None
_Identity = tuple[_Text, _Text, _Text, _Text, _Text, _Text, _Text, _Text]


class FunctionWriter:
    """Writes one function after another as JSON text on one line: the one place that knows the
    shape of a function. What functions have in common is encoded once."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._encode = JSONEncoder().encode
        self._config_text = Once(self._write_config, SPACES_KEPT)
        self._capability_text = Once(self._write_capability, CAPABILITIES_KEPT)
        self._link_text = Once(self._write_link, SPACES_KEPT)
        self._texts: dict[tuple[object, ...], list[str]] = {}

    def text(self, function: PciFunction, details: Details, more: str = "") -> str:
        """All that is known of a function; `more` is text of the same kind that stands before its
        configuration space: `"key": value, `."""
        of, own = function, details
        identity, place, resets, state, attached, children = self._shared(
            (
                *(of.vendor, of.device, of.subsystem_vendor, of.subsystem_device, of.class_code),
                *(of.revision, of.driver, of.driver_override),
            ),
            (of.iommu, of.numa_node, of.boot_vga, of.sriov),
            of.reset_methods,
            (of.power_state, of.d3cold_allowed, own.slot, of.label),
            (own.interfaces, own.disks, own.vfio_driver),
            (own.mdev_parent, own.mdevs, own.vdpas),
        )
        config = "null" if own.config is None else self._config_text(own.config)
        link = "null" if own.link is None else self._link_text(own.link)
        vfs = self._encode(own.vfs) if own.vfs else "[]"
        regions = ", ".join([_region(region) for region in of.regions])
        return (
            f'{{"address": {_string(of.address)}, {identity}, '
            f'"iommu_group": {_number(of.iommu_group)}, {place}, '
            f'"physfn": {_string(of.physfn)}, "vf_index": {_number(of.vf_index)}, {resets}, '
            f'"regions": [{regions}], "link": {link}, {state}, '
            f'"serial": {_string(own.serial)}, {attached}, '
            f'"vfio_group_node": {_string(own.group_node)}, '
            f'"vfio_device_node": {_string(own.device_node)}, "vfs": {vfs}, {children}, '
            f'{more}"config": {config}}}'
        )

    def _shared(
        self,
        identity: _Identity,
        place: tuple[str | None, int | None, bool | None, Sriov | None],
        resets: tuple[str, ...],
        *others: tuple[object, ...],
    ) -> list[str]:
        """The members of the object that functions of one kind have alike, as text, in pieces."""
        key = (identity, place, resets, *others)
        texts = self._texts.get(key)
        if texts is None:
            if len(self._texts) >= _TEXTS_KEPT:
                self._texts.clear()
            pieces: list[dict[str, object]] = [
                self._identity(*identity),
                dict(zip(_PLACE, (*place[:3], _sriov(place[3])), strict=True)),
                {"reset_methods": resets},
                *(
                    dict(zip(names, some, strict=True))
                    for names, some in zip(_OTHERS, others, strict=True)
                ),
            ]
            texts = self._texts[key] = [self._encode(piece)[1:-1] for piece in pieces]
        return texts

    def _identity(
        self,
        vendor: str | None,
        device: str | None,
        subsystem_vendor: str | None,
        subsystem_device: str | None,
        class_code: str | None,
        revision: str | None,
        driver: str | None,
        driver_override: str | None,
    ) -> dict[str, object]:
        known = self._names.lookup(vendor, device, subsystem_vendor, subsystem_device, class_code)
        return {
            "vendor": vendor,
            "device": device,
            "subsystem_vendor": subsystem_vendor,
            "subsystem_device": subsystem_device,
            "class": class_code,
            "revision": revision,
            "vendor_name": known.vendor,
            "device_name": known.device,
            "subsystem_name": known.subsystem,
            "class_name": known.class_name,
            "driver": driver,
            "driver_override": driver_override,
        }

    def _write_link(self, link: Link) -> str:
        return self._encode(_link(link))

    def _write_capability(self, capability: Capability) -> str:
        return self._encode(_capability(capability))

    def _write_config(self, space: ConfigSpace) -> str:
        """`config_as_json` as text: functions that differ share most of their capabilities."""
        whole = self._encode(_config_facts(space))
        capabilities = ", ".join(map(self._capability_text, space.capabilities))
        return f'{whole[:-1]}, "capabilities": [{capabilities}]}}'


def _string(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)


def _number(number: int | None) -> str:
    return "null" if number is None else str(number)


def function_as_json(function: PciFunction, details: Details, names: Names) -> dict[str, object]:
    """One function in the contract's shape and beyond; what the host does not tell is None."""
    shape: dict[str, object] = loads(FunctionWriter(names).text(function, details))
    return shape


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


def _region(region: BarRegion) -> str:
    return (
        f'{{"index": {region.index}, "start": {region.start}, "size": {region.size}, '
        f'"kind": "{region.kind}", "prefetchable": {"true" if region.prefetchable else "false"}, '
        f'"bits": {region.bits}}}'
    )


def _link(link: Link) -> dict[str, object]:
    return {
        "speed_gts": link.speed_gts,
        "width": link.width,
        "max_speed_gts": link.max_speed_gts,
        "max_width": link.max_width,
    }
