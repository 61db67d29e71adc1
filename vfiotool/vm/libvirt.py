"""libvirt's elements (libvirt: formatdomain, "Host device assignment" and "Hard drives")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from vfiotool.errors import Unsupported
from vfiotool.vm.handed import VDPA, Handed
from vfiotool.vm.qemu import guest_functions, slot_of

PROGRAM = "libvirt"
# Guest buses for cards of several functions: libvirt adds the root ports up to them by itself.
_FIRST_BUS = 0x08
SHARED_MEMORY = (
    "<memoryBacking>\n  <source type='memfd' />\n  <access mode='shared' />\n</memoryBacking>\n"
)


def hostdevs(devices: Sequence[Handed], *, iommufd: bool = False) -> str:
    """One element a device, as `virsh attach-device` and `virsh edit` take them.

    PCI functions are `managed='no'`: vfiotool has bound them, and libvirt shall not rebind them.
    A network VF is an `<interface>`, so that libvirt keeps its MAC and VLAN. The functions of one
    card are functions of one device in the guest. Raises Unsupported for vfio-user and for domains
    above ffff, which libvirt gives to QEMU in a form that QEMU refuses.
    """
    return "\n".join(elements(devices, iommufd=iommufd)) + "\n"


def elements(devices: Sequence[Handed], *, iommufd: bool = False) -> list[str]:
    """`hostdevs`, element by element."""
    slots: dict[str, list[Handed]] = {}
    for device in devices:
        slots.setdefault(slot_of(device), []).append(device)
    several = [members for members in slots.values() if len(members) > 1]
    places: dict[str, tuple[int, int]] = {}
    for number, members in enumerate(several):
        for device, function in zip(members, guest_functions(members), strict=True):
            places[device.name] = (_FIRST_BUS + number, function)
    found, disks = [], 0
    for device in devices:
        element = _element(device, iommufd, disks)
        disks += element.tag == "disk"
        if device.name in places:
            bus, function = places[device.name]
            guest = {"type": "pci", "domain": "0x0000", "bus": f"{bus:#04x}", "slot": "0x00"}
            guest["function"] = f"{function:#x}"
            if function == 0:
                guest["multifunction"] = "on"
            SubElement(element, "address", guest)
        indent(element)
        found.append(tostring(element, encoding="unicode"))
    return found


def features_of(devices: Iterable[Handed], *, iommufd: bool) -> set[str]:
    """What of `releases.OLDEST` the elements make use of."""
    found = {"iommufd"} if iommufd else set()
    for device in devices:
        kind = "mdev" if device.is_mdev and device.model == "vfio-pci" else device.model
        found.add("vdpa-net" if (device.model, device.virtio) == (VDPA, "net") else kind)
    return found


def needs_shared_memory(devices: Iterable[Handed]) -> bool:
    """Whether the domain needs SHARED_MEMORY beside its elements."""
    return any(device.shares_memory for device in devices)


def _element(device: Handed, iommufd: bool, disks: int) -> Element:
    if device.model == VDPA:
        return _vdpa(device, disks)
    if device.model == "vhost-user-blk":
        element = _disk("vhostuser", disks)
        SubElement(element, "source", {"type": "unix", "path": device.path})
        return _with_target(element, disks)
    if device.model == "vhost-user-net":
        element = Element("interface", {"type": "vhostuser"})
        SubElement(element, "source", {"type": "unix", "path": device.path, "mode": "client"})
        SubElement(element, "model", {"type": "virtio"})
        return element
    if device.model == "vfio-user":
        raise Unsupported(
            "libvirt has no element for vfio-user",
            hint="vfiotool vm qemu prints what <qemu:commandline> takes",
            device=device.name,
        )
    if device.is_mdev:
        kind = {"mode": "subsystem", "type": "mdev", "managed": "no", "model": device.model}
        element = Element("hostdev", kind)
        SubElement(SubElement(element, "source"), "address", {"uuid": device.name})
        return element
    if device.address.domain > 0xFFFF:
        # qemuBuildPCIHostdevDevProps says host=; QEMU's set_pci_host_devaddr takes 16 bits of it.
        raise Unsupported(
            f"libvirt cannot hand {device.name} to QEMU: its domain is above ffff",
            hint="vfiotool vm qemu prints what <qemu:commandline> takes",
            device=device.name,
        )
    return _interface(device, iommufd) if _is_network_vf(device) else _hostdev(device, iommufd)


def _is_network_vf(device: Handed) -> bool:
    function = device.function
    return (
        function is not None
        and function.physfn is not None
        and (function.class_code or "").startswith("02")
        and device.network is not None
    )


def _hostdev(device: Handed, iommufd: bool) -> Element:
    element = Element("hostdev", {"mode": "subsystem", "type": "pci", "managed": "no"})
    _driver(element, iommufd)
    SubElement(SubElement(element, "source"), "address", _host_address(device))
    return element


def _interface(device: Handed, iommufd: bool) -> Element:
    """A network VF, whose MAC and VLAN libvirt sets again at each start."""
    element = Element("interface", {"type": "hostdev", "managed": "no"})
    settings = device.network
    if settings is not None and settings.mac not in (None, "00:00:00:00:00:00"):
        SubElement(element, "mac", {"address": str(settings.mac)})
    _driver(element, iommufd)
    source = SubElement(element, "source")
    SubElement(source, "address", {"type": "pci", **_host_address(device)})
    if settings is not None and settings.vlan:
        SubElement(SubElement(element, "vlan"), "tag", {"id": str(settings.vlan)})
    return element


def _driver(element: Element, iommufd: bool) -> None:
    attributes = {"name": "vfio"}
    if iommufd:
        attributes["iommufd"] = "yes"
    SubElement(element, "driver", attributes)


def _host_address(device: Handed) -> dict[str, str]:
    place = device.address
    return {
        "domain": f"0x{place.domain:04x}",
        "bus": f"0x{place.bus:02x}",
        "slot": f"0x{place.device:02x}",
        "function": f"0x{place.function}",
    }


def _vdpa(device: Handed, disks: int) -> Element:
    if not device.path:
        raise Unsupported(
            f"{device.name} has no vhost-vdpa node",
            hint=f"vfiotool vdpa bind {device.name} vhost_vdpa",
            device=device.name,
        )
    if device.virtio not in ("net", "block"):
        kind = device.virtio or "of a type that is not known here"
        raise Unsupported(
            f"libvirt takes vDPA networks and disks, and {device.name} is {kind}",
            hint="vfiotool vm qemu takes any; vfiotool vdpa list shows its type",
            device=device.name,
        )
    if device.virtio == "net":
        element = Element("interface", {"type": "vdpa"})
        SubElement(element, "source", {"dev": device.path})
        return element
    element = _disk("vhostvdpa", disks, cache="none")
    SubElement(element, "source", {"dev": device.path})
    return _with_target(element, disks)


def _disk(kind: str, disks: int, **driver: str) -> Element:
    element = Element("disk", {"type": kind, "device": "disk"})
    SubElement(element, "driver", {"name": "qemu", "type": "raw", **driver})
    return element


def _with_target(element: Element, disks: int) -> Element:
    # vda is the domain's own disk.
    SubElement(element, "target", {"dev": f"vd{_letters(disks + 1)}", "bus": "virtio"})
    return element


def _letters(number: int) -> str:
    """a to z, then aa, as the kernel names its disks."""
    name = ""
    while number >= 0:
        name = chr(ord("a") + number % 26) + name
        number = number // 26 - 1
    return name
