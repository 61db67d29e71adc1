"""VDUSE's ioctls and messages (linux/vduse.h; kernel Documentation/userspace-api/vduse.rst).

API version 0, which every kernel with VDUSE speaks, and 1, which has groups of queues and address
spaces; we have one of each. What 1 offers on demand (SUSPEND, QUEUE_READY) is not asked for.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from enum import IntEnum

from vfiotool.errors import KernelError, UsageError, from_oserror

# Newest first: a kernel refuses those that it does not know.
API_VERSIONS = (1, 0)
_NAME = 256
_CONFIG = struct.Struct("<256sIIQIIII44xI")
_VQ_CONFIG = struct.Struct("<IH26x")
_VQ_INFO = struct.Struct("<IIQQQHHHHB7x")
_VQ_EVENTFD = struct.Struct("<Ii")
_IOTLB = struct.Struct("<QQQB7x")
_CONFIG_DATA = struct.Struct("<II")
_REQUEST = struct.Struct("<II16x128s")
_RESPONSE = struct.Struct("<II16x")
_RESPONSE_BYTES = 152
_READ_WRITE = 3


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | 0x81 << 8 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | 0x81 << 8 | number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | 0x81 << 8 | number


_SET_API_VERSION = _iow(0x01, 8)
_CREATE_DEV = _iow(0x02, _CONFIG.size)
_DESTROY_DEV = _iow(0x03, _NAME)
_IOTLB_GET_FD = _iowr(0x10, _IOTLB.size)
_GET_FEATURES = _ior(0x11, 8)
_SET_CONFIG = _iow(0x12, _CONFIG_DATA.size)
_INJECT_CONFIG_IRQ = 0x81 << 8 | 0x13
_VQ_SETUP = _iow(0x14, _VQ_CONFIG.size)
_VQ_GET_INFO = _iowr(0x15, _VQ_INFO.size)
_VQ_SETUP_KICKFD = _iow(0x16, _VQ_EVENTFD.size)


class VduseRequestType(IntEnum):
    """What the kernel asks for (enum vduse_req_type)."""

    GET_VQ_STATE = 0
    SET_STATUS = 1
    UPDATE_IOTLB = 2
    SET_VQ_GROUP_ASID = 3


@dataclass(frozen=True)
class VduseRequest:
    """A control request; `number` is the queue's index, its group's, or the device's status;
    `space` the address space that a group is to have (API version 1)."""

    type: VduseRequestType | None
    id: int
    number: int = 0
    space: int = 0


@dataclass(frozen=True)
class VduseQueue:
    """A virtqueue as the driver has set it up."""

    size: int
    descriptors: int
    available: int
    used: int
    base: int
    ready: bool


@dataclass(frozen=True)
class IovaRegion:
    """I/O virtual addresses `start` to `last` are the bytes from `offset` on of the file `fd`."""

    start: int
    last: int
    offset: int
    fd: int
    writable: bool


def parse_request(data: bytes) -> VduseRequest:
    """A struct vduse_dev_request. One of a kind that is not known has no type."""
    kind, number, body = _REQUEST.unpack(data[: _REQUEST.size].ljust(_REQUEST.size, b"\0"))
    try:
        found = VduseRequestType(kind)
    except ValueError:
        return VduseRequest(None, number)
    width = 1 if found is VduseRequestType.SET_STATUS else 4
    first = int.from_bytes(body[:width], "little")
    if found is VduseRequestType.SET_VQ_GROUP_ASID:
        return VduseRequest(found, number, first, int.from_bytes(body[4:8], "little"))
    return VduseRequest(found, number, first)


def format_response(request: VduseRequest, ok: bool, base: int = 0) -> bytes:
    """A struct vduse_dev_response; `base` is the next available entry of the queue asked about."""
    head = _RESPONSE.pack(request.id, 0 if ok else 1)
    return (head + struct.pack("<IHxx", request.number, base)).ljust(_RESPONSE_BYTES, b"\0")


def _ioctl(fd: int, number: int, data: bytearray | bytes, what: str) -> int:
    try:
        return int(fcntl.ioctl(fd, number, bytearray(data) if isinstance(data, bytes) else data))
    except OSError as error:
        raise from_oserror(what, error) from error


def set_api_version(control: int) -> int:
    """Agree on the newest version that both sides speak; before anything else on
    /dev/vduse/control. Returns it."""
    for version in API_VERSIONS:
        try:
            _ioctl(
                control, _SET_API_VERSION, struct.pack("<Q", version), "agree on VDUSE's version"
            )
        except KernelError as error:
            # Linux before 7.0 answers so to 1 (drivers/vdpa/vdpa_user/vduse_dev.c).
            if error.errno != errno.EINVAL or version == API_VERSIONS[-1]:
                raise
        else:
            return version
    raise AssertionError("no version was tried")


def create(
    control: int,
    name: str,
    device_id: int,
    features: int,
    queues: int,
    config: bytes,
    *,
    version: int,
) -> None:
    """Make the device /dev/vduse/NAME; `version` is what `set_api_version` returned. Raises
    UsageError for a name that is none, KernelError (EEXIST if it is there)."""
    raw = os.fsencode(name)
    if not raw or len(raw) >= _NAME or b"/" in raw or name in (".", "..", "control"):
        raise UsageError(f"{name!r} cannot be a VDUSE device's name")
    # Reserved in version 0; one group of queues and one address space in version 1.
    groups = spaces = 1 if version else 0
    head = _CONFIG.pack(raw, 0, device_id, features, queues, 4096, groups, spaces, len(config))
    _ioctl(control, _CREATE_DEV, bytearray(head + config), f"create the VDUSE device {name}")


def destroy(control: int, name: str) -> None:
    """Remove a device that nobody has open and that is not on the vDPA bus (EBUSY otherwise)."""
    raw = os.fsencode(name).ljust(_NAME, b"\0")
    _ioctl(control, _DESTROY_DEV, bytearray(raw), f"destroy the VDUSE device {name}")


def setup_queue(device: int, index: int, largest: int) -> None:
    """Say how large a queue may be; for each, before the device is on the vDPA bus."""
    _ioctl(device, _VQ_SETUP, _VQ_CONFIG.pack(index, largest), f"set up queue {index}")


def queue_info(device: int, index: int) -> VduseQueue:
    """A queue as the driver has it now."""
    data = bytearray(_VQ_INFO.pack(index, *(0,) * 9))
    _ioctl(device, _VQ_GET_INFO, data, f"look at queue {index}")
    _, size, descriptors, available, used, base, _, _, _, ready = _VQ_INFO.unpack(data)
    return VduseQueue(size, descriptors, available, used, base, bool(ready))


def set_kick(device: int, index: int, kick: int) -> None:
    """Have the kernel write this eventfd when the driver kicks; -1: none."""
    _ioctl(device, _VQ_SETUP_KICKFD, _VQ_EVENTFD.pack(index, kick), f"set queue {index}'s kick")


def negotiated(device: int) -> int:
    """The feature bits that the driver accepted."""
    data = bytearray(8)
    _ioctl(device, _GET_FEATURES, data, "read the negotiated features")
    return int.from_bytes(data, "little")


def set_config(device: int, config: bytes) -> None:
    """Change the configuration space and tell the driver."""
    data = bytearray(_CONFIG_DATA.pack(0, len(config)) + config)
    _ioctl(device, _SET_CONFIG, data, "change the configuration")
    _ioctl(device, _INJECT_CONFIG_IRQ, b"", "tell the driver of the configuration")


def regions(device: int) -> list[IovaRegion]:
    """All that is mapped, by address. The descriptors are the caller's."""
    found: list[IovaRegion] = []
    start = 0
    try:
        while start < 1 << 64:
            data = bytearray(_IOTLB.pack(0, start, (1 << 64) - 1, 0))
            try:
                fd = _ioctl(device, _IOTLB_GET_FD, data, "look for mapped memory")
            except KernelError as error:
                if error.errno == errno.EINVAL:
                    break
                raise
            offset, first, last, access = _IOTLB.unpack(data)
            found.append(IovaRegion(first, last, offset, fd, access == _READ_WRITE))
            start = last + 1
    except BaseException:
        for region in found:
            os.close(region.fd)
        raise
    return found
