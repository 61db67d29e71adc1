"""What a display device shows: its planes, as a region or as a dma-buf.

Source: <linux/vfio.h>, VFIO_DEVICE_QUERY_GFX_PLANE, VFIO_DEVICE_GET_GFX_DMABUF.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vfiotool.errors import KernelError, Unsupported, errno_name
from vfiotool.native import library as native
from vfiotool.native.library import ffi, lib
from vfiotool.vfio.device import Device

PlaneKind = Literal["dmabuf", "region"]
_KINDS: dict[PlaneKind, int] = {"dmabuf": 2, "region": 4}
_PROBE = 1
_PRIMARY = 1  # DRM_PLANE_TYPE_PRIMARY, <drm/drm_mode.h>


@dataclass(frozen=True, slots=True)
class Plane:
    """A plane: `where` is the index of a region, or the id of a dma-buf. `format` is a DRM
    fourcc; `stride` and `size` are bytes. `width` 0 is a display that shows nothing."""

    kind: PlaneKind
    format: str
    width: int
    height: int
    stride: int
    size: int
    where: int


def plane_kind(device: Device) -> PlaneKind:
    """How the device hands its planes out. Raises Unsupported for one that has none."""
    plane = ffi.new("struct vt_gfx_plane *")
    with device.use() as fd:
        for kind, flag in _KINDS.items():
            if lib.vt_gfx_plane(fd, flag | _PROBE, _PRIMARY, plane) >= 0:
                return kind
    raise Unsupported(f"{device.name} shows nothing: it has no display planes", device=device.name)


def primary_plane(device: Device, kind: PlaneKind) -> Plane:
    """The primary plane as it is now."""
    plane = ffi.new("struct vt_gfx_plane *")
    operation = f"VFIO_DEVICE_QUERY_GFX_PLANE of {device.name}"
    with device.use() as fd:
        result = lib.vt_gfx_plane(fd, _KINDS[kind], _PRIMARY, plane)
        if result == -errno.ENOMEM:
            # mbochs makes the dma-buf of a new mode and answers ENOMEM; the next time it finds it
            # (mbochs_query_gfx_plane, Linux 6.1 to 6.12).
            result = lib.vt_gfx_plane(fd, _KINDS[kind], _PRIMARY, plane)
    native.check(result, operation, device=device.name)
    return Plane(
        kind=kind,
        format=int(plane.drm_format).to_bytes(4, "little").decode("ascii", "replace"),
        width=plane.width,
        height=plane.height,
        stride=plane.stride,
        size=plane.size,
        where=plane.where,
    )


def read_plane(device: Device, plane: Plane) -> bytes:
    """The bytes of a plane: `stride` times `height`. Raises KernelError for a plane whose numbers
    do not fit each other, Unsupported for a dma-buf that is for other devices only."""
    length = plane.stride * plane.height
    if not length or length > plane.size:
        raise KernelError(
            f"{device.name} shows {plane.height} lines of {plane.stride} bytes in {plane.size}"
        )
    if plane.kind == "dmabuf":
        return _read_dmabuf(device, plane.where, length)
    region = device.region(plane.where)
    buffer = bytearray(-(-length // 4) * 4)
    with region.map(0, len(buffer)) as mapping:
        mapping.read_into(0, buffer)
    return bytes(buffer[:length])


@contextlib.contextmanager
def open_dmabuf(device: Device, number: int) -> Iterator[int]:
    """A descriptor of the dma-buf `number`, for the time of the block."""
    operation = f"VFIO_DEVICE_GET_GFX_DMABUF of {device.name}"
    with device.use() as fd:
        descriptor = native.check(lib.vt_gfx_dmabuf(fd, number), operation)
    try:
        yield descriptor
    finally:
        native.close(descriptor)


def _read_dmabuf(device: Device, number: int, length: int) -> bytes:
    with open_dmabuf(device, number) as descriptor:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size < length:
            raise KernelError(f"the dma-buf of {device.name} has {size} bytes, not {length}")
        try:
            memory = mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            # mbochs exports it read-only and refuses to map what cannot be written.
            raise Unsupported(
                f"the dma-buf of {device.name} cannot be mapped: {error.strerror}",
                errno_name=errno_name(error.errno),
            ) from error
        with memory:
            native.check(lib.vt_dmabuf_read_sync(descriptor, 1), "DMA_BUF_IOCTL_SYNC")
            data = memory[:length]
            native.check(lib.vt_dmabuf_read_sync(descriptor, 0), "DMA_BUF_IOCTL_SYNC")
            return data
