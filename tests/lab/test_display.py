"""The sample displays: a monitor plugged in, modes set, a picture drawn and seen, saved as PNG."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, mdev, open_descriptors
from vfiotool.drivers import demo
from vfiotool.drivers.display import Mbochs, Mdpy, edid, open_display, pattern, png, show_pattern
from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio import Device
from vfiotool.vfio.gfx import open_dmabuf

MACHINE = "mdev"
KERNELS = ("6.1", "6.12", "iommufd")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bochs(backend: str) -> Iterator[Mbochs]:
    with mdev("mbochs", "mbochs-small") as name, Device.open(name, backend=backend) as device:
        display = open_display(device)
        assert isinstance(display, Mbochs)
        yield display


def pixels_of(file: bytes) -> tuple[int, int, bytes]:
    """Width, height and XRGB8888 pixels of a PNG such as ours, decoded from its chunks."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, header = 8, b"", b""
    while at < len(file):
        length, kind = struct.unpack_from(">I4s", file, at)
        body = file[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", file, at + 8 + length)
        assert checksum == zlib.crc32(kind + body)
        header, data = (body, data) if kind == b"IHDR" else (header, data)
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", header)
    assert rest == [8, 2, 0, 0, 0]
    lines = zlib.decompress(data)
    out = bytearray(4 * width * height)
    for y in range(height):
        row = lines[y * (3 * width + 1) :][: 3 * width + 1]
        assert row[0] == 0
        place = slice(4 * width * y, 4 * width * (y + 1))
        line = bytearray(4 * width)
        line[2::4], line[1::4], line[0::4] = row[1::3], row[2::3], row[3::3]
        out[place] = line
    return width, height, bytes(out)


def test_a_monitor_is_seen_by_the_guest_s_side(bochs: Mbochs) -> None:
    assert bochs.seen_edid(128) == bytes(128)
    blob = edid(800, 600)
    bochs.set_edid(blob)
    assert bochs.seen_edid(128) == blob
    assert (bochs.monitor.max_width.read(), bochs.monitor.max_height.read()) == (800, 600)
    with pytest.raises(UsageError, match="takes 1024"):
        bochs.set_edid(bytes(1028))


@pytest.mark.parametrize("size", [(640, 480), (800, 600), (64, 64), (322, 201)])
def test_what_is_drawn_on_mbochs_is_shown(bochs: Mbochs, size: tuple[int, int]) -> None:
    drawn = show_pattern(bochs, size)
    before = open_descriptors()
    plane, pixels = bochs.frame()
    assert (plane.kind, plane.format) == ("dmabuf", "XR24")
    assert (plane.width, plane.height, plane.stride) == (*size, 4 * size[0])
    assert pixels == drawn == pattern(*size)
    assert pixels_of(png(plane, pixels)) == (*size, drawn)
    assert len(open_descriptors()) == len(before)


def test_the_dmabuf_has_the_size_of_the_picture(bochs: Mbochs) -> None:
    show_pattern(bochs, (640, 480))
    plane = bochs.plane
    assert plane.kind == "dmabuf"
    with open_dmabuf(bochs.device, plane.where) as descriptor:
        assert os.lseek(descriptor, 0, os.SEEK_END) == 640 * 480 * 4
        assert not os.get_inheritable(descriptor)
    with pytest.raises(KernelError, match="ENOENT"), open_dmabuf(bochs.device, 12345):
        pass


def test_a_panned_picture_is_shown_from_where_it_begins(bochs: Mbochs) -> None:
    show_pattern(bochs, (256, 128))
    # 16 lines of 1024 bytes: a multiple of the page, as the dma-buf needs.
    bochs.registers.y_offset.write(16)
    plane, pixels = bochs.frame()
    assert pixels[: 112 * plane.stride] == pattern(256, 128)[16 * plane.stride :]


def test_a_new_mode_shows_a_new_picture(bochs: Mbochs) -> None:
    show_pattern(bochs, (640, 480))
    assert bochs.frame()[0].width == 640
    drawn = show_pattern(bochs, (320, 240))
    plane, pixels = bochs.frame()
    assert (plane.width, plane.height) == (320, 240)
    assert pixels == drawn
    bochs.draw(bytes(len(drawn)))
    assert bochs.frame()[1] == bytes(len(drawn))


def test_modes_that_cannot_be_are_refused(bochs: Mbochs) -> None:
    for size in ((1024, 768), (63, 480), (640, 0), (801, 600)):
        with pytest.raises(UsageError, match="no mode"):
            bochs.set_mode(*size)
    # A display that is off shows nothing, and says so.
    with pytest.raises((UsageError, KernelError)):
        bochs.frame()


@pytest.mark.parametrize(("kind", "size"), [("mdpy-vga", (640, 480)), ("mdpy-xga", (1024, 768))])
def test_mdpy_shows_its_region(backend: str, kind: str, size: tuple[int, int]) -> None:
    with mdev("mdpy", kind) as name, Device.open(name, backend=backend) as device:
        display = open_display(device)
        assert isinstance(display, Mdpy)
        assert (display.width, display.height) == size
        # What the device itself draws at its birth: grey, darker above.
        plane, born = display.frame()
        assert born[:4] == bytes(4) and born[-4] > 200
        drawn = show_pattern(display)
        plane, pixels = display.frame()
        assert (plane.kind, plane.format, plane.where) == ("region", "XR24", 16)
        assert pixels == drawn
        assert pixels_of(png(plane, pixels)) == (*size, drawn)


@pytest.mark.parametrize(("parent", "checks"), [("mbochs", 4), ("mdpy", 3)])
def test_the_demos_pass(backend: str, parent: str, checks: int) -> None:
    kind = {"mbochs": "mbochs-medium", "mdpy": "mdpy-vga"}[parent]
    with mdev(parent, kind) as name, Device.open(name, backend=backend) as device:
        found = list(demo(parent)(device))
    assert len(found) == checks
    assert [check for check in found if not check.passed] == []


def test_other_devices_are_no_displays(backend: str) -> None:
    with (
        mdev("mtty", "mtty-1") as name,
        Device.open(name, backend=backend) as device,
        pytest.raises(UsageError, match="neither mbochs nor mdpy"),
    ):
        open_display(device)


def test_the_command_saves_a_picture(backend: str, tmp_path: Path) -> None:
    file = tmp_path / "frame.png"
    with mdev("mbochs", "mbochs-small") as name:
        command = [sys.executable, "-m", "vfiotool", "device", "frame", name]
        options = ["--pattern", "--mode", "320x200", "--output", str(file), "--backend", backend]
        done = subprocess.run(
            [*command, *options, "--json"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["width"], told["height"], told["equals_pattern"]) == (320, 200, True)
    assert pixels_of(file.read_bytes()) == (320, 200, pattern(320, 200))
