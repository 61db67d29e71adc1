"""Displays: the boot VGA device, lit connectors, the console's frame buffer.

Source: Documentation/fb/fbcon.rst, Documentation/gpu/drm-kms.rst; drivers/gpu/drm/drm_sysfs.c.
"""

from __future__ import annotations

import re

from vfiotool.devices.attached import is_part_of
from vfiotool.devices.pci import PciFunction
from vfiotool.host.paths import (
    PROC_IOMEM,
    SYS_DRM,
    SYS_GRAPHICS,
    SYS_PCI_DEVICES,
    SYS_TTY_CONSOLE,
    SYS_VTCONSOLE,
)
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.sight import Sight

# Frame buffers that the firmware set up and a platform driver draws on: their memory is a BAR of
# the card, but their device is not the card's (drivers/firmware/sysfb.c).
_FIRMWARE_BUFFER = re.compile(
    r"\s*([0-9a-f]+)-([0-9a-f]+) : "
    r"(BOOTFB|efifb|vesafb|simplefb|simple-framebuffer|efidrm|vesadrm|simpledrm)\b.*"
)


def display_usage(host: Sight, function: PciFunction) -> Usage:
    """What the host shows through this function, and a kernel console that runs over it."""
    found = _boot_vga(host, function)
    found += _connectors(host, function)
    found += _frame_buffers(host, function)
    found += _firmware_buffers(host, function)
    found += _serial_console(host, function)
    return Usage(tuple(found))


def _boot_vga(host: Sight, function: PciFunction) -> list[Blocker]:
    if not (function.class_code or "").startswith("03") or function.on_vfio:
        return []
    # Asked anew: who read the function may have taken a failure for an absent attribute.
    evidence = f"{SYS_PCI_DEVICES}/{function.address}/boot_vga"
    if not function.boot_vga and not host.read_int(evidence):
        return []
    detail = "the firmware's display: the host's console is shown there"
    text_mode = bound_console(host, "VGA")
    if text_mode is not None:
        detail += f", now in text mode ({text_mode})"
    evidence = f"{SYS_PCI_DEVICES}/{function.address}/boot_vga is 1"
    return [Blocker("boot-vga", function.address, function.address, detail, evidence)]


def bound_console(host: Sight, kind: str) -> str | None:
    """The vtconsole of that kind (`VGA`, `frame buffer`) that is bound, as a sysfs path."""
    for name in host.listdir(SYS_VTCONSOLE):
        base = f"{SYS_VTCONSOLE}/{name}"
        if kind in (host.read(f"{base}/name") or "") and host.read_int(f"{base}/bind"):
            return base
    return None


def _connectors(host: Sight, function: PciFunction) -> list[Blocker]:
    found = []
    for name in host.listdir(SYS_DRM):
        base = f"{SYS_DRM}/{name}"
        path = host.realpath(base) if "-" in name else None
        if path is None or not is_part_of(function.path, path):
            continue
        if host.read(f"{base}/enabled") == "enabled":
            detail = f"the connector {name} shows a picture"
            status = host.read(f"{base}/status")
            if status is not None:
                detail += f" (status {status})"
            evidence = f"{base}/enabled is enabled"
            found.append(Blocker("display", function.address, name, detail, evidence))
    return found


def _frame_buffers(host: Sight, function: PciFunction) -> list[Blocker]:
    """The frame buffers of the function, if the kernel's console draws on frame buffers."""
    console = bound_console(host, "frame buffer")
    found = []
    for name in host.listdir(SYS_GRAPHICS) if console is not None else []:
        path = host.realpath(f"{SYS_GRAPHICS}/{name}")
        if path is None or name == "fbcon" or not is_part_of(function.path, path):
            continue
        detail = f"the kernel's console may draw on its frame buffer {name}"
        evidence = f"{SYS_GRAPHICS}/{name}, {console}/bind is 1"
        remedy = f"echo 0 > {console}/bind"
        found.append(Blocker("display", function.address, name, detail, evidence, remedy))
    return found


def _firmware_buffers(host: Sight, function: PciFunction) -> list[Blocker]:
    if not (function.class_code or "").startswith("03"):
        return []
    found = []
    for line in (host.read(PROC_IOMEM) or "").splitlines():
        match = _FIRMWARE_BUFFER.fullmatch(line)
        if match is None:
            continue
        start = int(match[1], 16)
        for region in function.regions:
            if region.kind == "mem" and region.start <= start < region.start + region.size:
                detail = f"{match[3]} draws on its memory (BAR {region.index})"
                evidence = f"{PROC_IOMEM}: {line.strip()}"
                found.append(Blocker("display", function.address, match[3], detail, evidence))
    return found


def _serial_console(host: Sight, function: PciFunction) -> list[Blocker]:
    """A kernel console on a serial port of this function."""
    found = []
    for name in (host.read(SYS_TTY_CONSOLE) or "").split():
        base = SYS_TTY_CONSOLE.replace("console/active", name)
        path = host.realpath(base)
        # A virtio console's terminal is a virtual device: its function is told by the driver.
        own = name.startswith("hvc") and has_virtio_console(host, function.path)
        if own or (path is not None and is_part_of(function.path, path)):
            detail = f"the kernel's console runs over {name}"
            evidence = f"{SYS_TTY_CONSOLE} names {name}"
            found.append(Blocker("console", function.address, name, detail, evidence))
    return found


def has_virtio_console(host: Sight, path: str) -> bool:
    """Whether a virtio console is part of the device at `path`."""
    return any(
        host.linkname(f"{path}/{name}/driver") == "virtio_console"
        for name in host.listdir(path)
        if name.startswith("virtio")
    )
