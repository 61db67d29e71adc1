"""The serial numbers by which a PCI function can be told from its twins."""

from __future__ import annotations

from collections.abc import Iterator

from vfiotool.host import SYS_PCI_DEVICES, Host

_CAP_DSN = 0x0003
_EXTENDED_BEGIN = 0x100
# Extended capabilities are at least 4 bytes long, within 4096 - 256.
_MAX_HOPS = 960


def serials_of(host: Host, address: str) -> tuple[str, ...]:
    """A function's serial numbers: Device Serial Number, VPD's SN, its drives' own.

    The Device Serial Number is written as lspci does, `00-1b-21-ff-ff-aa-bb-cc`. Configuration
    space beyond 64 bytes and VPD need root; what cannot be read is left out.
    """
    base = f"{SYS_PCI_DEVICES}/{address}"
    found = [
        parse_device_serial_number(_read(host, f"{base}/config")),
        parse_vpd_serial(_read(host, f"{base}/vpd")) if host.exists(f"{base}/vpd") else None,
        *_drive_serials(host, base),
    ]
    return tuple(dict.fromkeys(serial for serial in found if serial))


def _read(host: Host, path: str) -> bytes:
    try:
        return host.read_bytes(path)
    except OSError:
        return b""


def _drive_serials(host: Host, base: str) -> Iterator[str | None]:
    # An NVMe controller is a child of its function (drivers/nvme/host/sysfs.c); virtio and SCSI
    # disks show a serial below block/ (drivers/block/virtio_blk.c, serial_show).
    for name in host.listdir(f"{base}/nvme"):
        yield host.read(f"{base}/nvme/{name}/serial")
    for child in host.listdir(base):
        if child.startswith("virtio"):
            for disk in host.listdir(f"{base}/{child}/block"):
                yield host.read(f"{base}/{child}/block/{disk}/serial")


def parse_device_serial_number(config: bytes) -> str | None:
    """The Device Serial Number in a configuration space of 4096 bytes, if it has one.

    Source: PCI Express Base Specification, 7.9.3. A looping list ends the search.
    """
    offset, hops = _EXTENDED_BEGIN, 0
    while _EXTENDED_BEGIN <= offset <= len(config) - 12 and hops < _MAX_HOPS:
        head = int.from_bytes(config[offset : offset + 4], "little")
        if head & 0xFFFF == _CAP_DSN:
            return config[offset + 4 : offset + 12][::-1].hex("-")
        offset, hops = head >> 20 & 0xFFC, hops + 1
    return None


def parse_vpd_serial(vpd: bytes) -> str | None:
    """The field SN of the read-only VPD resource (PCI Local Bus Specification 3.0, I.3)."""
    at = 0
    while at + 3 <= len(vpd) and vpd[at] in (0x82, 0x90):
        end = min(at + 3 + int.from_bytes(vpd[at + 1 : at + 3], "little"), len(vpd))
        field = at + 3
        while vpd[at] == 0x90 and field + 3 <= end:
            value = vpd[field + 3 : min(field + 3 + vpd[field + 2], end)]
            if vpd[field : field + 2] == b"SN":
                text = value.decode("ascii", "replace").strip("\0 ")
                return text if text and text.isprintable() else None
            field += 3 + vpd[field + 2]
        at = end
    return None
