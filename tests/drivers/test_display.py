"""What the display driver makes by itself: pictures, PNG files, descriptions of monitors."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.drivers.display import edid, pattern, png
from vfiotool.vfio.gfx import Plane


def decode(file: bytes) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of a PNG; every chunk's checksum is held."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(file):
        length, kind = struct.unpack_from(">I4s", file, at)
        body = file[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", file, at + 8 + length) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    lines = zlib.decompress(chunks[1][1])
    assert len(lines) == height * (3 * width + 1)
    rows = [lines[y * (3 * width + 1) :][: 3 * width + 1] for y in range(height)]
    assert all(row[0] == 0 for row in rows)
    return width, height, b"".join(row[1:] for row in rows)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.randoms())
def test_a_png_holds_the_pixels(width: int, height: int, spare: int, source: object) -> None:
    stride = 4 * (width + spare)
    pixels = source.randbytes(stride * height)  # type: ignore[attr-defined]
    plane = Plane("region", "XR24", width, height, stride, len(pixels), 0)
    expected = b""
    for y in range(height):
        for x in range(width):
            blue, green, red, _ = pixels[y * stride + 4 * x : y * stride + 4 * x + 4]
            expected += bytes((red, green, blue))
    assert decode(png(plane, pixels)) == (width, height, expected)


@pytest.mark.parametrize("size", [(64, 64), (322, 201), (640, 480)])
def test_the_picture_tells_rows_and_columns_apart(size: tuple[int, int]) -> None:
    width, height = size
    picture = pattern(width, height)
    assert len(picture) == 4 * width * height
    rows = [picture[4 * width * y :][: 4 * width] for y in range(height)]
    # A picture shifted or mirrored by any row is another picture.
    assert all(rows[y] != rows[y + 1] for y in range(1, height - 2))
    assert picture != b"".join(reversed(rows))
    assert rows[0] == b"\xff\xff\xff\0" * width
    # The second of eight bars is yellow: red and green, no blue.
    x = width * 3 // 16
    assert rows[2][4 * x : 4 * x + 4] == b"\0\xff\xff\0"


@pytest.mark.parametrize("size", [(640, 480), (800, 600), (1920, 1080)])
def test_an_edid_is_sound(size: tuple[int, int]) -> None:
    blob = edid(*size)
    assert len(blob) == 128 and sum(blob) % 256 == 0
    assert blob[:8] == b"\0\xff\xff\xff\xff\xff\xff\0"
    timing = blob[54:72]
    width = timing[2] | (timing[4] >> 4) << 8
    height = timing[5] | (timing[7] >> 4) << 8
    assert (width, height) == size
    clock = struct.unpack_from("<H", timing)[0] * 10_000
    blank = timing[3] | (timing[4] & 15) << 8, timing[6] | (timing[7] & 15) << 8
    assert 59 < clock / ((width + blank[0]) * (height + blank[1])) < 61
    assert blob[72:90].startswith(b"\0\0\0\xfc\0vfiotool\n")
