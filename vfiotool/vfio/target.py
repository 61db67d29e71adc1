"""From a device's name to what opens it: its group, its character device, its driver.

Source: Documentation/driver-api/vfio.rst ("VFIO Usage Example", "IOMMUFD and VFIO cdev").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.devices.pci import Address
from vfiotool.errors import NotFound, Refused, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_VFIO, SYS_BUS, SYS_MDEV_DEVICES, SYS_PCI_DEVICES

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
# The other buses whose devices VFIO drivers take (drivers/vfio/{platform,fsl-mc,cdx}); those of AP
# and CCW are mediated devices.
OTHER_BUSES = ("platform", "amba", "fsl-mc", "cdx")
# A device that a process serves: this and the path of its socket (`vfio_user.py`).
SERVED = "vfio-user:"
_HEX = re.compile(r"0x[0-9a-f]{1,16}")
_IORESOURCE_MEM = 0x200
# What a device on one of them is called there: no path, no dots alone.
_BUS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """A device as the host names it.

    `name` is what VFIO_GROUP_GET_DEVICE_FD takes. `group_node` and `cdev_node` are device nodes,
    None where the host shows none. `noiommu` tells a group that has no IOMMU behind it.
    """

    name: str
    bus: str
    path: str
    driver: str | None
    group: str | None
    group_node: str | None
    cdev_node: str | None
    noiommu: bool


def find(name: str, host: Host) -> Target:
    """The device called `name`: a PCI address (`0000:00:02.0`, `00:02.0`), an mdev's UUID, the
    name of a device on one of `OTHER_BUSES` (`fff51000.ethernet`), or `vfio-user:` and the path of
    a socket.

    Raises UsageError for what is none of them, NotFound where the host has no such PCI or mediated
    device.
    """
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is not the name of a device", hint="0000:05:01.0, or a UUID")
    if name.startswith(SERVED):
        path = name.removeprefix(SERVED)
        if not path:
            raise UsageError(f"{name!r} names no socket", hint="vfio-user:/run/card.sock")
        return Target(name, SERVED[:-1], path, None, None, None, None, noiommu=False)
    if Address.is_address(name):
        official = str(Address.parse(name))
        return _target(official, "pci", f"{SYS_PCI_DEVICES}/{official}", host)
    if _UUID.fullmatch(name):
        official = name.lower()
        return _target(official, "mdev", f"{SYS_MDEV_DEVICES}/{official}", host)
    if _BUS_NAME.fullmatch(name):
        for bus in OTHER_BUSES:
            if host.exists(path := f"{SYS_BUS}/{bus}/devices/{name}"):
                return _target(name, bus, path, host)
    raise UsageError(
        f"{name[:80]!r} is neither a PCI address nor the UUID of a mediated device",
        hint="write it as 0000:05:01.0 or as 36 characters; vfiotool devices lists them",
    )


def _target(name: str, bus: str, path: str, host: Host) -> Target:
    if not host.exists(path):
        raise NotFound(
            f"{name}: there is no such {bus} device",
            hint="vfiotool devices" if bus == "pci" else "vfiotool mdev list",
            device=name,
        )
    group = host.linkname(f"{path}/iommu_group")
    node = f"{DEV_VFIO}/{group}"
    # The group's name does not tell: the kernel calls mdevs' groups "vfio-noiommu" too.
    noiommu = not host.exists(node) and host.exists(f"{DEV_VFIO}/noiommu-{group}")
    if noiommu:
        node = f"{DEV_VFIO}/noiommu-{group}"
    cdevs = [entry for entry in host.listdir(f"{path}/vfio-dev") if _BUS_NAME.fullmatch(entry)]
    cdev = f"{DEV_VFIO}/devices/{cdevs[0]}" if cdevs else None
    return Target(
        name=name,
        bus=bus,
        path=path,
        driver=host.linkname(f"{path}/driver"),
        group=group,
        group_node=node if group is not None and host.exists(node) else None,
        cdev_node=cdev if cdev and host.exists(cdev) else None,
        noiommu=noiommu,
    )


def bus_windows(target: Target, host: Host) -> list[tuple[int, int]]:
    """Addresses, (start, last), that a PCI device's own bus may take for a BAR: its own and what
    the bridges above it forward. DMA to such an I/O address may never reach the IOMMU: a switch
    without ACS hands it to the BAR's owner, and QEMU's NVMe refuses its own (the kernel's DMA API
    keeps away as well: iova_reserve_pci_windows in drivers/iommu/dma-iommu.c)."""
    found = []
    path = host.realpath(target.path) if target.bus == "pci" else None
    while path is not None and Address.is_address(path.rpartition("/")[2]):
        for line in (host.read(f"{path}/resource") or "").splitlines():
            words = line.split()
            if len(words) == 3 and all(_HEX.fullmatch(word) for word in words):
                start, last, flags = (int(word, 16) for word in words)
                if flags & _IORESOURCE_MEM and start < last:
                    found.append((start, last))
        path = path.rpartition("/")[0]
    return found


def not_on_vfio(target: Target) -> VfiotoolError:
    """Why a device without a VFIO node cannot be opened, and the command that changes it.

    Always `Refused` (exit code 4): to drive a device from here while the host does would hurt.
    """
    if target.driver is None:
        reason = f"{target.name} is on no driver"
    else:
        reason = f"{target.name} is on driver {target.driver}, which is not a VFIO driver"
    if target.group is None:
        return Refused(
            f"{reason} and in no IOMMU group",
            hint="vfiotool doctor",
            device=target.name,
        )
    return Refused(reason, hint=f"vfiotool bind {target.name}", device=target.name)
