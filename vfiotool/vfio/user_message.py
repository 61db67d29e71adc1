"""vfio-user's wire format: bytes and descriptors to typed messages, and back, for both sides.

Nothing here has a meaning yet: sizes and the number of descriptors are checked, and every
descriptor that came is closed on every path that does not hand it on (QEMU
docs/interop/vfio-user.rst, "Protocol Specification"). Numbers are the host's own byte order.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from vfiotool.errors import VfiotoolError

MAJOR, MINOR = 0, 1
# A command's type is 0, a reply's 1.
REPLY, NO_REPLY, ERROR = 1, 1 << 4, 1 << 5
_TYPE = 0xF
HEADER = struct.Struct("=HHIII")
# What a read or write moves at most, unless the peer takes less ("Message sizes").
LARGEST_TRANSFER = 1 << 20
LARGEST_MESSAGE = HEADER.size + 4096 + LARGEST_TRANSFER
# Of one message; the kernel carries 253 (SCM_MAX_FD).
MOST_DESCRIPTORS = 64
MOST_DMA_MAPS = 65535
# Bytes of version data; the capabilities that exist need less than 300.
_MOST_VERSION_DATA = 4096

DEVICE_INFO = struct.Struct("=IIII")
REGION_INFO = struct.Struct("=IIIIQQ")
IRQ_INFO = struct.Struct("=IIII")
IRQ_SET = struct.Struct("=IIIII")
DMA_MAP = struct.Struct("=IIQQQ")
DMA_UNMAP = struct.Struct("=IIQQ")
REGION_ACCESS = struct.Struct("=QII")
DMA_ACCESS = struct.Struct("=QQ")
WRITE_COUNT = struct.Struct("=Q")
ONE_WRITE = struct.Struct("=QIIQ")
_VERSION = struct.Struct("=HH")
_CAPABILITY = struct.Struct("=HHI")
_SPARSE = struct.Struct("=II")
_AREA = struct.Struct("=QQ")

# <linux/vfio.h>.
DEVICE_RESET_FLAG, DEVICE_PCI_FLAG = 1, 2
REGION_READ_FLAG, REGION_WRITE_FLAG, REGION_MMAP_FLAG, REGION_CAPS_FLAG = 1, 2, 4, 8
IRQ_EVENTFD_FLAG, IRQ_MASKABLE_FLAG, IRQ_AUTOMASKED_FLAG, IRQ_NORESIZE_FLAG = 1, 2, 4, 8
DATA_NONE, DATA_BOOL, DATA_EVENTFD = 1, 2, 4
ACTION_MASK, ACTION_UNMASK, ACTION_TRIGGER = 8, 16, 32
DMA_READABLE, DMA_WRITEABLE = 1, 2
UNMAP_ALL_FLAG = 2
_SPARSE_MMAP = 1


class UserCommand(IntEnum):
    """ "Commands"; DMA_READ and DMA_WRITE go from the server to the client."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


_NAMES = {int(command): command.name for command in UserCommand}


def called(command: int) -> str:
    """A command's name, as the specification has it."""
    return _NAMES.get(command, f"command {command}")


class UserProtocolError(VfiotoolError):
    """The peer broke the protocol; its connection ends."""

    kind = "protocol"


@dataclass(slots=True)
class UserMessage:
    """A message as it came. `descriptors` belong to whoever holds the message: take or close."""

    number: int
    command: int
    flags: int
    error: int
    payload: bytes
    descriptors: list[int] = field(default_factory=list)
    # What errors call the peer, followed by a colon, or nothing.
    sender: str = ""

    @property
    def is_reply(self) -> bool:
        return self.flags & _TYPE == REPLY

    @property
    def wants_reply(self) -> bool:
        return not self.flags & NO_REPLY

    @property
    def failed(self) -> bool:
        return bool(self.flags & ERROR)

    def take(self) -> list[int]:
        """Its descriptors, which the caller closes from now on."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The fixed head of its payload. Raises UserProtocolError where it is cut short."""
        if len(self.payload) < layout.size:
            raise UserProtocolError(
                f"{self.sender}{called(self.command)} with {len(self.payload)} bytes, "
                f"not {layout.size}"
            )
        return layout.unpack_from(self.payload)


def _received(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly `size` bytes. Raises EOFError, UserProtocolError when they do not come in time."""
    parts: list[bytes] = []
    left = size
    while left:
        try:
            more = connection.recv(left)
        except BlockingIOError:
            more = None
        # Bytes that come one by one keep the socket's own limit from passing.
        if more is None or (parts and time.monotonic() > deadline):
            raise UserProtocolError("a message was not sent whole in time")
        if not more:
            raise EOFError
        parts.append(more)
        left -= len(more)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def receive(connection: socket.socket, limit_s: float = 10.0) -> UserMessage:
    """The next message from a blocking socket, which is there `limit_s` seconds after it began.

    Raises BlockingIOError when the socket's time limit passed before it began, EOFError at the
    end, UserProtocolError for what is no message, OSError as recv does.
    """
    data, ancillary, flags, _ = connection.recvmsg(
        HEADER.size, socket.CMSG_SPACE(4 * MOST_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
    )
    deadline = time.monotonic() + limit_s
    descriptors: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(content) // 4
            descriptors += struct.unpack(f"={count}i", content[: 4 * count])
    try:
        if not data:
            raise EOFError
        if flags & socket.MSG_CTRUNC:
            # Also where this process can open no more.
            raise UserProtocolError(
                "a message carries too many descriptors"
                if len(descriptors) >= MOST_DESCRIPTORS
                else "a message's descriptors are lost: this process has as many files open as it "
                "may (ulimit -n)"
            )
        if len(data) < HEADER.size:
            data += _received(connection, HEADER.size - len(data), deadline)
        number, command, size, flags, error = HEADER.unpack(data)
        if not HEADER.size <= size <= LARGEST_MESSAGE:
            raise UserProtocolError(f"a message of {size} bytes")
        if flags & _TYPE > REPLY:
            raise UserProtocolError(f"a message of type {flags & _TYPE}")
        left = size - HEADER.size
        payload = _received(connection, left, deadline) if left else b""
        return UserMessage(number, command, flags, error, payload, descriptors)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def format_message(number: int, command: int, flags: int, payload: bytes, error: int = 0) -> bytes:
    """A message, ready to be sent."""
    return HEADER.pack(number, command, HEADER.size + len(payload), flags, error) + payload


@dataclass(frozen=True, slots=True)
class UserCapabilities:
    """What a side can take ("VFIO_USER_VERSION", "Capabilities"); the defaults are the
    specification's for what a peer does not say."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = LARGEST_TRANSFER
    max_dma_maps: int = MOST_DMA_MAPS
    pgsizes: int = 4096
    write_multiple: bool = False
    twin_socket: bool = False
    twin_index: int | None = None


# QEMU 11.1 takes a peer that says more than 16 descriptors for broken (hw/vfio-user/proxy.c).
OURS = UserCapabilities(max_msg_fds=16, write_multiple=True, twin_socket=True)


def format_version(capabilities: UserCapabilities, minor: int = MINOR) -> bytes:
    """The payload of VFIO_USER_VERSION, either way; a server's `minor` is no larger than what the
    client proposed."""
    told: dict[str, object] = {
        "max_msg_fds": capabilities.max_msg_fds,
        "max_data_xfer_size": capabilities.max_data_xfer_size,
        "max_dma_maps": capabilities.max_dma_maps,
        "pgsizes": capabilities.pgsizes,
        "write_multiple": capabilities.write_multiple,
    }
    if capabilities.twin_socket:
        twin: dict[str, object] = {"supported": True}
        if capabilities.twin_index is not None:
            twin["fd_index"] = capabilities.twin_index
        told["twin_socket"] = twin
    text = json.dumps({"capabilities": told}, separators=(",", ":"))
    return _VERSION.pack(MAJOR, min(minor, MINOR)) + text.encode() + b"\0"


def parse_version(message: UserMessage) -> tuple[int, int, UserCapabilities]:
    """(major, minor, what the sender can take). Raises UserProtocolError for what is neither."""
    major, minor = message.unpack(_VERSION)
    data = message.payload[_VERSION.size :].rstrip(b"\0")
    if len(data) > _MOST_VERSION_DATA:
        raise UserProtocolError(f"{message.sender}{len(data)} bytes of version data")
    try:
        told = json.loads(data.decode()) if data else {}
    except (ValueError, RecursionError) as error:
        raise UserProtocolError(
            f"{message.sender}the version data is not JSON: {str(error)[:80]}"
        ) from None
    given = told.get("capabilities", {}) if isinstance(told, dict) else None
    if not isinstance(given, dict):
        raise UserProtocolError(f"{message.sender}the version data has no object of capabilities")
    twin = given.get("twin_socket")
    twin = twin if isinstance(twin, dict) else {}
    index = twin.get("fd_index")
    return major, minor, UserCapabilities(
        max_msg_fds=_number(given, "max_msg_fds", 1),
        max_data_xfer_size=_number(given, "max_data_xfer_size", LARGEST_TRANSFER),
        max_dma_maps=_number(given, "max_dma_maps", MOST_DMA_MAPS),
        pgsizes=_number(given, "pgsizes", 4096),
        write_multiple=given.get("write_multiple") is True,
        twin_socket=twin.get("supported") is True,
        twin_index=index if type(index) is int else None,
    )  # fmt: skip


def _number(given: dict[str, object], name: str, default: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or value < 0:
        raise UserProtocolError(f"capability {name} is not a number")
    return value


def format_region(
    index: int, flags: int, size: int, areas: tuple[tuple[int, int], ...], argsz: int
) -> bytes:
    """The payload of DEVICE_GET_REGION_INFO's reply, at most `argsz` bytes of it: with a capability
    for sparse `areas` (offset, size) where there are any."""
    capability = b""
    if areas:
        flags |= REGION_CAPS_FLAG
        capability = _CAPABILITY.pack(_SPARSE_MMAP, 1, 0) + _SPARSE.pack(len(areas), 0)
        capability += b"".join(_AREA.pack(*area) for area in areas)
    needed = REGION_INFO.size + len(capability)
    whole = argsz >= needed
    offset = REGION_INFO.size if areas and whole else 0
    head = REGION_INFO.pack(needed, flags, index, offset, size, 0)
    return head + capability if whole else head
