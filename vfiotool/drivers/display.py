"""The kernel's sample displays: mbochs (mode setting, EDID, dma-buf) and mdpy (fixed, a region).

Sources: Linux, samples/vfio-mdev/mbochs.c, mdpy.c and mdpy-defs.h; QEMU docs/specs/standard-vga.rst
(the dispi registers); VESA E-EDID 1.4, section 3. Frame buffers are XRGB8888, little-endian. Both
are drawn to through a mapping alone: their `pwrite` puts bytes at the wrong place (mbochs two
pages further on, mdpy always at the start).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from vfiotool.drivers import Check, DeviceId
from vfiotool.errors import Unsupported, UsageError
from vfiotool.vfio import (
    Device,
    Plane,
    Register,
    RegisterMap,
    plane_kind,
    primary_plane,
    read_plane,
)

MBOCHS, MDPY = DeviceId(0x1234, 0x1111), DeviceId(0x1B36, 0x000F)
DRIVES = {"mbochs": (MBOCHS,), "mdpy": (MDPY,)}
FORMAT = "XR24"
_EDID_TYPE, _EDID_SUBTYPE = 1, 1  # VFIO_REGION_TYPE_GFX, VFIO_REGION_SUBTYPE_GFX_EDID
_LINK_UP, _LINK_DOWN = 1, 2
_BARS = (0xFFFFFF, 0xFFFF00, 0x00FFFF, 0x00FF00, 0xFF00FF, 0xFF0000, 0x0000FF, 0x000000)


class DispiRegisters(RegisterMap):
    """BAR 2 of mbochs from 0x500 on (standard-vga.rst, "bochs dispi interface")."""

    id = Register(0x500, width=2)
    width = Register(0x502, width=2)
    height = Register(0x504, width=2)
    bits_per_pixel = Register(0x506, width=2)
    enable = Register(0x508, width=2, fields={"enabled": (0, 0), "linear": (6, 6)})
    virtual_width = Register(0x50C, width=2)
    virtual_height = Register(0x50E, width=2)
    x_offset = Register(0x510, width=2)
    y_offset = Register(0x512, width=2)
    memory_64k = Register(0x514, width=2, access="ro")


class EdidRegisters(RegisterMap):
    """`struct vfio_region_gfx_edid`."""

    offset = Register(0, access="ro")
    max_size = Register(4, access="ro")
    size = Register(8)
    max_width = Register(12, access="ro")
    max_height = Register(16, access="ro")
    link_state = Register(20)


class Display:
    """A display that draws and shows: `draw` fills its frame buffer, `frame` reads its primary
    plane back the way a viewer would."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.framebuffer = device.region(0).map()

    @property
    def plane(self) -> Plane:
        """The primary plane as it is now."""
        return primary_plane(self.device, plane_kind(self.device))

    def draw(self, pixels: bytes) -> None:
        """Put pixels (XRGB8888, row after row) at the start of the frame buffer."""
        self.framebuffer.write_from(0, pixels)

    def frame(self) -> tuple[Plane, bytes]:
        """The primary plane and its pixels. Raises UsageError for what is not XRGB8888."""
        plane = self.plane
        if plane.format != FORMAT:
            raise UsageError(f"{self.device.name} shows format {plane.format!r}, not {FORMAT}")
        try:
            return plane, read_plane(self.device, plane)
        except Unsupported:
            return plane, self._look(plane)

    def _look(self, plane: Plane) -> bytes:
        """The plane's pixels where they lie in the frame buffer, for a plane that is not to be
        mapped by the processor."""
        buffer = bytearray(plane.stride * plane.height)
        self.framebuffer.read_into(self.start(plane), buffer)
        return bytes(buffer)

    def start(self, plane: Plane) -> int:
        """Where in the frame buffer the plane begins, in bytes."""
        return 0


class Mbochs(Display):
    """mbochs: a Bochs display with a monitor to be told."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._mmio = device.region(2)
        self.registers = DispiRegisters(self._mmio)
        self._edid = next(
            device.region(info.index)
            for info in device.regions
            if info and (info.type, info.subtype) == (_EDID_TYPE, _EDID_SUBTYPE)
        )
        self.monitor = EdidRegisters(self._edid)

    def set_edid(self, blob: bytes) -> None:
        """Plug in a monitor described by `blob`: link down, description, link up. Raises
        UsageError for a blob that the device has no room for."""
        limit = self.monitor.max_size.read()
        if len(blob) > limit:
            raise UsageError(f"an EDID of {len(blob)} bytes; the device takes {limit}")
        self.monitor.link_state.write(_LINK_DOWN)
        self._edid.write_bytes(self.monitor.offset.read(), blob)
        self.monitor.size.write(len(blob))
        self.monitor.link_state.write(_LINK_UP)

    def seen_edid(self, length: int) -> bytes:
        """What the guest's driver reads of the monitor: the start of BAR 2."""
        return self._mmio.read_bytes(0, length)

    def start(self, plane: Plane) -> int:
        """As `Display.start`, from the registers that pan the picture."""
        registers = self.registers
        return registers.x_offset.read() * 4 + registers.y_offset.read() * plane.stride

    def set_mode(self, width: int, height: int) -> None:
        """Show `width` by `height` pixels from the start of the frame buffer. Raises UsageError
        for a mode that the monitor or the memory has no room for."""
        limits = self.monitor.max_width.read(), self.monitor.max_height.read()
        fits = all(
            not limit or size <= limit for size, limit in zip((width, height), limits, strict=True)
        )
        if not fits or min(width, height) < 64 or width * height * 4 > self.framebuffer.size:
            raise UsageError(f"no mode {width}x{height} on {self.device.name}; at most {limits}")
        registers = self.registers
        registers.enable.write(0)
        registers.width.write(width)
        registers.height.write(height)
        registers.bits_per_pixel.write(32)
        registers.virtual_width.write(width)
        registers.x_offset.write(0)
        registers.y_offset.write(0)
        registers.enable.set(enabled=1, linear=1)


class Mdpy(Display):
    """mdpy: one fixed mode, told in configuration space (mdpy-defs.h)."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.width = device.config.read32(0x48)
        self.height = device.config.read32(0x4C)


def open_display(device: Device) -> Mbochs | Mdpy:
    """The display that `device` is. Raises UsageError if it is neither."""
    found = (device.vendor, device.device, device.class_code)
    if MBOCHS.matches(*found):
        return Mbochs(device)
    if MDPY.matches(*found):
        return Mdpy(device)
    raise UsageError(f"{device.name} is neither mbochs nor mdpy", device=device.name)


def edid(width: int, height: int, name: str = "vfiotool") -> bytes:
    """The 128 bytes of a monitor whose preferred mode is `width` by `height` at about 60 Hz."""
    blank_h, blank_v = 160, 30
    clock = (width + blank_h) * (height + blank_v) * 60 // 10_000
    timing = struct.pack("<H", clock) + bytes(
        [
            width & 0xFF,
            blank_h,
            width >> 8 << 4 | blank_h >> 8,
            height & 0xFF,
            blank_v,
            height >> 8 << 4 | blank_v >> 8,
            48,
            32,
            3 << 4 | 5,
            0,
            *(0, 0, 0, 0, 0),
            0x1E,
        ]
    )
    text = b"\0\0\0\xfc\0" + (name[:13] + "\n").encode("ascii")[:13].ljust(13)
    empty = b"\0\0\0\x10\0" + bytes(13)
    head = b"\0\xff\xff\xff\xff\xff\xff\0" + b"\x59\x26\x01\0" + bytes(4)  # manufacturer VIF
    body = head + bytes([1, 34, 1, 4, 0xA5, 0, 0, 120, 6]) + bytes(10) + bytes(3)
    block = body + b"\1\1" * 8 + timing + text + empty * 2 + b"\0"
    return block + bytes([-sum(block) & 0xFF])


def pattern(width: int, height: int) -> bytes:
    """A test picture, XRGB8888: eight colour bars, ramps of red, green, blue and grey below, a
    white frame, and a diagonal whose colour changes from row to row."""
    pack = struct.Struct("<I").pack
    bars = b"".join(pack(_BARS[x * 8 // width]) for x in range(width))
    ramps = []
    for shifts in ((16,), (8,), (0,), (16, 8, 0)):
        levels = (x * 255 // (width - 1) for x in range(width))
        ramps.append(b"".join(pack(sum(level << s for s in shifts)) for level in levels))
    white, rows = pack(0xFFFFFF), []
    split = height * 2 // 3
    for y in range(height):
        row = bytearray(bars if y < split else ramps[(y - split) * 4 // (height - split)])
        x = y * (width - 1) // (height - 1)
        row[4 * x : 4 * x + 4] = white if y % 2 else pack(y * 0x1F1F1F % 0xFFFFFF)
        if y in (0, height - 1):
            row[:] = white * width
        row[:4] = row[-4:] = white
        rows.append(bytes(row))
    return b"".join(rows)


def png(plane: Plane, pixels: bytes) -> bytes:
    """A frame as a PNG file (W3C PNG, sections 5 and 9): 8 bits, RGB, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    lines = bytearray()
    for y in range(plane.height):
        row = pixels[y * plane.stride : y * plane.stride + 4 * plane.width]
        rgb = bytearray(3 * plane.width)
        rgb[0::3], rgb[1::3], rgb[2::3] = row[2::4], row[1::4], row[0::4]
        lines += b"\0" + rgb
    header = struct.pack(">IIBBBBB", plane.width, plane.height, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(lines))) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def show_pattern(display: Mbochs | Mdpy, size: tuple[int, int] | None = None) -> bytes:
    """Set a mode where there is one to set (640x480 unless `size` tells), draw the test picture;
    its pixels."""
    if isinstance(display, Mbochs):
        width, height = size or (640, 480)
        display.set_mode(width, height)
    else:
        width, height = display.width, display.height
    pixels = pattern(width, height)
    display.draw(pixels)
    return pixels


def demo(device: Device) -> Iterator[Check]:
    """Monitor, mode, test picture; the plane read back and compared with what was drawn."""
    display = open_display(device)
    if isinstance(display, Mbochs):
        blob = edid(640, 480)
        display.set_edid(blob)
        seen = display.seen_edid(len(blob))
        yield Check("edid", seen == blob, f"{len(blob)} bytes seen as they were set")
    drawn = show_pattern(display)
    plane, pixels = display.frame()
    size = f"{plane.width}x{plane.height}, {plane.format}, {plane.stride} bytes a line"
    yield Check("plane", plane.stride * plane.height == len(drawn), f"{plane.kind}: {size}")
    yield Check("frame", pixels == drawn, f"{len(pixels)} bytes equal those drawn")
    file = png(plane, pixels)
    yield Check("png", file[:4] == b"\x89PNG", f"{len(file)} bytes; vfiotool device frame saves it")


def registers_of(device: Device) -> DispiRegisters:
    """The registers of mbochs, for `device dump`."""
    return DispiRegisters(device.region(2))
