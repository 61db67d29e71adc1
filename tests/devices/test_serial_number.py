"""The serial number of a PCI Express function, by which a device is known again."""

from __future__ import annotations

import pytest

from vfiotool.devices.config.decode import parse_config
from vfiotool.devices.serial import read_serial_number as read_serial
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree

NVME = "0000:01:00.0"


@pytest.mark.parametrize("where", [0x100, 0x140])
def test_the_serial_number_is_found_wherever_its_capability_stands(where: int) -> None:
    """Source: PCI Express Base Specification, Device Serial Number Extended Capability."""
    config = bytearray(4096)
    if where != 0x100:
        config[0x100:0x104] = (0x0001 | 1 << 16 | where << 20).to_bytes(4, "little")
    config[where : where + 4] = (0x0003 | 1 << 16).to_bytes(4, "little")
    config[where + 4 : where + 12] = bytes(range(8))
    files: dict[str, bytes | int] = {f"/sys/bus/pci/devices/{NVME}/config": bytes(config)}
    host = Host(MemoryTree(files, {}), live=True, name="live")
    assert read_serial(host, NVME) == "0706050403020100"
    config[where] = 4
    files[f"/sys/bus/pci/devices/{NVME}/config"] = bytes(config)
    assert read_serial(Host(MemoryTree(files, {}), live=True, name="live"), NVME) is None


def test_a_device_that_does_not_answer_tells_no_serial_number() -> None:
    """All ones would be the number of every device that is in its reset, or was never given one."""
    config = bytearray(4096)
    config[:8] = bytes.fromhex("8680721506041000")
    config[0x34], config[0x40] = 0x40, 0x10  # a PCI Express capability
    config[0x100:0x104] = (0x0003 | 1 << 16).to_bytes(4, "little")
    config[0x104:0x10C] = b"\xff" * 8
    path = f"/sys/bus/pci/devices/{NVME}/config"
    host = Host(MemoryTree({path: bytes(config)}, {}), live=True, name="live")
    assert read_serial(host, NVME) is None
    assert parse_config(bytes(config)).find("dsn") is not None
    assert parse_config(bytes(config)).serial is None
    config[0x104] = 0xFE
    assert parse_config(bytes(config)).serial == "ff-ff-ff-ff-ff-ff-ff-fe"
