"""The serial numbers by which a PCI function can be told from its twins."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vfiotool.devices.config.decode import read_config
from vfiotool.devices.config.vpd import parse_vpd
from vfiotool.devices.pci import PciFunction
from vfiotool.host.host import READ_DEADLINE_S, Host
from vfiotool.host.paths import SYS_PCI_DEVICES

# PCIe Base Specification 7.9.3, Device Serial Number extended capability.
_CAP_SERIAL = 0x0003
_EXTENDED_AT = 0x100
# A header, and what follows it in the Device Serial Number's capability.
_SERIAL = struct.Struct("<IQ")
# What a device reads as that does not answer, and one whose maker has written no number.
_NO_SERIAL = 0xFFFFFFFFFFFFFFFF
_MAX_CAPABILITIES = 960


def serials_of(host: Host, address: str) -> tuple[str, ...]:
    """A function's serial numbers: Device Serial Number, VPD's SN, its drives' own.

    The Device Serial Number is written as lspci does, `00-1b-21-ff-ff-aa-bb-cc`. Configuration
    space beyond 64 bytes and VPD need root; what cannot be read is left out.
    """
    config = read_config(host, address)
    found = [
        None if config is None else config.serial,
        *_vpd_serials(host, address),
        *_drive_serials(host, f"{SYS_PCI_DEVICES}/{address}"),
    ]
    return tuple(dict.fromkeys(serial for serial in found if serial))


def read_serial_number(host: Host, address: str) -> str | None:
    """The Device Serial Number as 16 hexadecimal digits; None if there is none or it needs root.

    Nothing is read but the headers on the way to it: it is asked for before every step, and each
    word of configuration space is a question to the device. Raises Stuck where that gives no
    answer, as while the device is reset.
    """
    path = f"{SYS_PCI_DEVICES}/{address}/config"
    at = _EXTENDED_AT
    for _ in range(_MAX_CAPABILITIES):
        if at < _EXTENDED_AT:
            return None
        try:
            found = host.read_at(path, at, _SERIAL.size, READ_DEADLINE_S)
        except OSError:
            return None
        if len(found) < _SERIAL.size:
            return None
        header, serial = _SERIAL.unpack(found)
        if header & 0xFFFF == _CAP_SERIAL:
            return None if serial == _NO_SERIAL else f"{serial:016x}"
        at = header >> 20
    return None


def serial_of(host: Host, function: PciFunction, own: str | None) -> str | None:
    """A function's one serial number: its Device Serial Number, which is `own`, or its drive's."""
    if own is not None:
        return own
    if not (function.class_code or "").startswith("01"):
        return None
    return next((text for text in _drive_serials(host, function.path) if text), None)


def drive_serials(host: Host, address: str) -> tuple[str, ...]:
    """The serial numbers that a function's drives tell: only while the host's driver has it."""
    found = _drive_serials(host, f"{SYS_PCI_DEVICES}/{address}")
    return tuple(dict.fromkeys(serial for serial in found if serial))


def same_serial(serial: str, wanted: str) -> bool:
    """A Device Serial Number is a number: with or without dashes, in either case."""
    if serial == wanted:
        return True
    plain = wanted.replace("-", "").replace(":", "").lower()
    return len(serial) == 23 and serial[2] == "-" and serial.replace("-", "") == plain


def _vpd_serials(host: Host, address: str) -> list[str]:
    path = f"{SYS_PCI_DEVICES}/{address}/vpd"
    if not host.exists(path):
        return []
    try:
        vpd = parse_vpd(host.read_bytes(path))
    except OSError:
        return []
    return [text for keyword, text in vpd.fields if keyword == "SN"]


def _drive_serials(host: Host, base: str) -> Iterator[str | None]:
    # An NVMe controller is a child of its function (drivers/nvme/host/sysfs.c); virtio disks show
    # a serial below block/ (drivers/block/virtio_blk.c, serial_show).
    for name in host.listdir(f"{base}/nvme"):
        yield host.read(f"{base}/nvme/{name}/serial")
    for child in host.listdir(base):
        if child.startswith("virtio"):
            for disk in host.listdir(f"{base}/{child}/block"):
                yield host.read(f"{base}/{child}/block/{disk}/serial")
