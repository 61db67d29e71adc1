"""libvirt's `<hostdev>` elements (libvirt: formatdomain, "Host device assignment")."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from vfiotool.vm.handed import Handed


def hostdevs(devices: Sequence[Handed]) -> str:
    """One `<hostdev>` a device, as `virsh attach-device` and `virsh edit` take it.

    PCI functions are `managed='no'`: vfiotool has bound them, and libvirt shall not rebind them.
    """
    return "\n".join(_hostdev(device) for device in devices) + "\n"


def _hostdev(device: Handed) -> str:
    if device.is_mdev:
        kind = {"mode": "subsystem", "type": "mdev", "managed": "no", "model": device.model}
        element = Element("hostdev", kind)
        SubElement(SubElement(element, "source"), "address", {"uuid": device.name})
    else:
        element = Element("hostdev", {"mode": "subsystem", "type": "pci", "managed": "no"})
        SubElement(element, "driver", {"name": "vfio"})
        place = device.address
        source = {
            "domain": f"0x{place.domain:04x}",
            "bus": f"0x{place.bus:02x}",
            "slot": f"0x{place.device:02x}",
            "function": f"0x{place.function}",
        }
        SubElement(SubElement(element, "source"), "address", source)
    indent(element)
    return tostring(element, encoding="unicode")
