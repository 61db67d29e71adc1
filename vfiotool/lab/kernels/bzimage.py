"""What is inside a bzImage: its release, and the ELF file (kernel: arch/x86/boot.rst)."""

from __future__ import annotations

import ctypes
import lzma
import struct
import zlib
from pathlib import Path

from vfiotool.errors import Unsupported

_MAX_KERNEL = 1 << 28


def image_release(image: Path) -> str:
    """The release that a bzImage names itself (kernel: arch/x86/boot.rst, `kernel_version`)."""
    with open(image, "rb") as handle:
        head = handle.read(0x10000)
    if head[0x202:0x206] != b"HdrS":
        raise Unsupported(
            f"{image} is no bzImage", hint="give the file that /boot holds as vmlinuz-…"
        )
    start = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
    return head[start : head.index(b"\0", start)].split()[0].decode()


def uncompressed(image: bytes) -> bytes | None:
    """The ELF file inside a bzImage, None where its compression is unknown here.

    QEMU boots it directly through the PVH entry, which saves the guest from decompressing itself:
    under TCG that takes seconds (kernel: arch/x86/boot.rst, `payload_offset`).
    """
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        # The kernel's build appends the size (scripts/Makefile.lib, size_append).
        return _unzstd(payload, int.from_bytes(payload[-4:], "little"))
    return None


def _unzstd(data: bytes, size: int) -> bytes | None:
    """The first frame of `data`, None without libzstd (which dpkg needs, so Debian has it).

    Python's own decompressor came with 3.14. Calls as in zstd.h, all of them stable.
    """
    try:
        zstd = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return None
    pointer, length = ctypes.c_char_p, ctypes.c_size_t
    zstd.ZSTD_findFrameCompressedSize.argtypes = [pointer, length]
    zstd.ZSTD_findFrameCompressedSize.restype = length
    zstd.ZSTD_decompress.argtypes = [pointer, length, pointer, length]
    zstd.ZSTD_decompress.restype = length
    zstd.ZSTD_isError.argtypes = [length]
    frame = zstd.ZSTD_findFrameCompressedSize(data, len(data))
    if zstd.ZSTD_isError(frame) or size > _MAX_KERNEL:
        return None
    room = ctypes.create_string_buffer(size)
    written = zstd.ZSTD_decompress(room, size, data, frame)
    return room.raw[:written] if written == size else None
