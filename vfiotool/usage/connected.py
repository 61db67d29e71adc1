"""What is reached through a function, or runs on it, and is no device node, disk or interface.

An IOMMU that is a PCI function translates for all that stands behind it; memory of a CXL card may
be the host's own; a USB device may be exported to another machine by the kernel, a radio or a
Thunderbolt port may have devices connected.
Source: drivers/iommu/iommu-sysfs.c; Documentation/ABI/testing/sysfs-bus-cxl, sysfs-bus-thunderbolt;
drivers/usb/usbip/stub_dev.c; net/bluetooth/hci_sysfs.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from vfiotool.devices.attached import is_part_of
from vfiotool.devices.pci import IOMMU_CLASS, PciFunction
from vfiotool.host.paths import (
    PROC_IOMEM,
    SYS_BLUETOOTH,
    SYS_CXL,
    SYS_DAX,
    SYS_DEVICE_LINKS,
    SYS_IOMMU,
    SYS_PCI_DEVICES,
    SYS_THUNDERBOLT,
    SYS_USBIP_HOST,
    VSOCK,
)
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.sight import Sight
from vfiotool.usage.traffic import read_traffic

# PCI Code and ID Assignment: CXL memory devices.
CXL_CLASS = "0502"
# drivers/usb/usbip/usbip_common.h, SDEV_ST_USED: a machine has it.
_EXPORTED = 2
# net/vmw_vsock/virtio_transport.c
_VSOCK_DRIVER = "vmw_vsock_virtio_transport"
# drivers/dax/kmem.c: it gives what it drives to the kernel as memory.
_DAX_MEMORY = "kmem"


def connected_usage(sight: Sight, function: PciFunction) -> Usage:
    """IOMMUs, the host's memory, and what is connected through the function."""
    found = (
        *_iommus(sight, function),
        *_memory(sight, function),
        *_dependants(sight, function),
        *_exported(sight, function),
        *_radios(sight, function),
        *_tunnels(sight, function),
        *_virtual_sockets(sight, function),
    )
    return Usage(found)


def places(sight: Sight) -> Iterator[str]:
    """Where in sysfs the things lie that this looks at, for the table in `occupied.py`."""
    for folder in (SYS_IOMMU, SYS_BLUETOOTH, SYS_THUNDERBOLT, SYS_USBIP_HOST, SYS_DAX):
        for name in sight.listdir(folder):
            yield sight.realpath(f"{folder}/{name}") or ""
    for name in sight.listdir(SYS_DEVICE_LINKS):
        address = name.removeprefix("pci:").partition("--")[0]
        yield sight.realpath(f"{SYS_PCI_DEVICES}/{address}") or ""


def _parts(sight: Sight, function: PciFunction, folder: str) -> Iterator[str]:
    for name in sight.listdir(folder):
        if is_part_of(function.path, sight.realpath(f"{folder}/{name}") or ""):
            yield name


def _iommus(sight: Sight, function: PciFunction) -> Iterator[Blocker]:
    units = [*_parts(sight, function, SYS_IOMMU)]
    if not units and not (function.class_code or "").startswith(IOMMU_CLASS):
        return
    name = units[0] if units else function.address
    detail = f"it is an IOMMU of this host ({name})" if units else "it is an IOMMU of this host"
    evidence = f"{SYS_IOMMU}/{name}" if units else f"its class is {function.class_code}"
    yield Blocker(
        "platform",
        function.address,
        name,
        detail,
        evidence,
        vital=f"{function.address} is an IOMMU of this host: what stands behind it depends on it",
    )


def _memory(sight: Sight, function: PciFunction) -> Iterator[Blocker]:
    """Memory that the host has online goes with the device.

    Which cards a CXL region is made of is told by its decoders alone, and which of several
    virtio-mem devices has memory by none: each of them counts.
    """
    regions: list[tuple[str, str]] = []
    if (function.class_code or "").startswith(CXL_CLASS) and function.driver is not None:
        names = [name for name in sight.listdir(SYS_CXL) if name.startswith("region")]
        regions += [(name, f"{SYS_CXL}/{name}") for name in names]
    for name in _parts(sight, function, SYS_DAX):
        if sight.linkname(f"{SYS_DAX}/{name}/driver") == _DAX_MEMORY:
            regions.append((name, f"{SYS_DAX}/{name}/driver is {_DAX_MEMORY}"))
    gives = "virtio_mem" in _virtio_drivers(sight, function)
    if gives and "(virtio_mem)" in (sight.read(PROC_IOMEM) or ""):
        regions.append(("virtio_mem", f"{PROC_IOMEM} names it"))
    for name, evidence in regions:
        detail = f"memory of this host may lie on it ({name})"
        yield Blocker("platform", function.address, name, detail, evidence)


def _dependants(sight: Sight, function: PciFunction) -> Iterator[Blocker]:
    """Devices that the kernel unbinds from their drivers before this one (device links), such as
    the USB controller of a Thunderbolt port (drivers/base/core.c, device_links_unbind_consumers).
    """
    own = f"pci:{function.address}--"
    for name in sight.listdir(SYS_DEVICE_LINKS):
        base = f"{SYS_DEVICE_LINKS}/{name}"
        if name.startswith(own) and sight.read(f"{base}/status") == "active":
            other = name.removeprefix(own).partition(":")[2] or name
            detail = f"{other} depends on it, and loses its driver with it"
            yield Blocker("connected", function.address, other, detail, f"{base}/status is active")


def _virtio_drivers(sight: Sight, function: PciFunction) -> list[str | None]:
    names = sight.listdir(function.path) if function.driver == "virtio-pci" else ()
    found = [name for name in names if name.startswith("virtio")]
    return [sight.linkname(f"{function.path}/{name}/driver") for name in found]


def _exported(sight: Sight, function: PciFunction) -> Iterator[Blocker]:
    for name in _parts(sight, function, SYS_USBIP_HOST):
        if sight.read_int(f"{SYS_USBIP_HOST}/{name}/usbip_status") == _EXPORTED:
            detail = f"another machine has its USB device {name} (USB/IP)"
            evidence = f"{SYS_USBIP_HOST}/{name}/usbip_status is {_EXPORTED}"
            remedy = f"usbip unbind --busid={name}"
            yield Blocker("connected", function.address, name, detail, evidence, remedy)


def _radios(sight: Sight, function: PciFunction) -> Iterator[Blocker]:
    """Connections are devices of the adapter's, such as hci0:12."""
    for name in _parts(sight, function, SYS_BLUETOOTH):
        if ":" in name:
            detail = f"a Bluetooth device is connected to its adapter {name.partition(':')[0]}"
            evidence = f"{SYS_BLUETOOTH}/{name}"
            yield Blocker("connected", function.address, name, detail, evidence)


def _tunnels(sight: Sight, function: PciFunction) -> Iterator[Blocker]:
    """Devices behind a Thunderbolt port that the host has let in; the host's own router is not."""
    for name in _parts(sight, function, SYS_THUNDERBOLT):
        base = f"{SYS_THUNDERBOLT}/{name}"
        if name.endswith("-0") or not sight.read_int(f"{base}/authorized"):
            continue
        called = sight.read(f"{base}/device_name") or name
        detail = f"the Thunderbolt device {called} is connected through it"
        evidence = f"{base}/authorized is not 0"
        remedy = f"echo 0 > {base}/authorized"
        yield Blocker("connected", function.address, name, detail, evidence, remedy)


def _virtual_sockets(sight: Sight, function: PciFunction) -> Iterator[Blocker]:
    """Programs that speak with the host of this virtual machine over its virtio socket device."""
    drivers = _virtio_drivers(sight, function)
    facts = read_traffic(sight).get(VSOCK, []) if _VSOCK_DRIVER in drivers else []
    if facts:
        detail = f"{', '.join(facts)} over it (vsock)"
        yield Blocker("connected", function.address, "vsock", detail, "ss --all --vsock")
