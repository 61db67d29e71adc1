"""vhost-user's wire format: bytes and descriptors to typed messages, and back.

Nothing here has a meaning yet: sizes, flags and the number of descriptors are checked, and every
descriptor that came is closed on every path that does not hand it on
(QEMU docs/interop/vhost-user.rst, "Message Specification").
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from vfiotool.errors import VfiotoolError
from vfiotool.native.virtqueue import MemoryRegion

# Of a payload; the largest legal ones are a memory table and a configuration space.
LARGEST_PAYLOAD = 4096
# What one message may carry (VHOST_MEMORY_BASELINE_NREGIONS).
MOST_DESCRIPTORS = 8
CONFIG_BYTES = 256
_HEADER = struct.Struct("<III")
_VERSION = 1
_VERSION_MASK = 3
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESSES = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_LOG = struct.Struct("<QQ")
_TABLE = struct.Struct("<II")
_CONFIG = struct.Struct("<III")
_INFLIGHT = struct.Struct("<QQHH4x")
_NO_DESCRIPTOR = 1 << 8


class VhostRequest(IntEnum):
    """Requests of the front end that are known here."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    GET_VRING_BASE_SKIP_DRAIN = 45


class ProtocolFeature(IntEnum):
    """Bit numbers of the protocol features offered here."""

    MQ = 0
    LOG_SHMFD = 1
    REPLY_ACK = 3
    BACKEND_REQ = 5
    CONFIG = 9
    INFLIGHT_SHMFD = 12
    CONFIGURE_MEM_SLOTS = 15
    GET_VRING_BASE_INFLIGHT = 20
    GET_VRING_BASE_SKIP_DRAIN = 23


class BackendRequest(IntEnum):
    """Requests that go the other way, over SET_BACKEND_REQ_FD's socket."""

    CONFIG_CHANGE = 2


class Flag(IntFlag):
    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


class ProtocolError(VfiotoolError):
    """The front end broke the protocol; its connection ends."""

    kind = "protocol"


@dataclass
class VhostMessage:
    """A request as it came. `descriptors` belong to whoever holds the message: take or close."""

    request: VhostRequest
    flags: int
    payload: bytes
    descriptors: list[int] = field(default_factory=list)

    def take(self) -> int:
        """The first descriptor, which the caller closes from now on."""
        return self.descriptors.pop(0)

    def take_eventfd(self) -> int:
        """As `take`; raises ProtocolError for a file, a pipe or a socket: a write to such a thing
        can last as long as its other end likes."""
        if kind := stat.S_IFMT(os.fstat(self.descriptors[0]).st_mode):
            raise ProtocolError(f"{self.request.name}: not an eventfd (file type {kind:#o})")
        return self.take()

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    @property
    def needs_reply(self) -> bool:
        return bool(self.flags & Flag.NEED_REPLY)


@dataclass(frozen=True, slots=True)
class VringAddresses:
    """SET_VRING_ADDR: a ring's places in the front end's own addresses."""

    index: int
    flags: int
    descriptors: int
    used: int
    available: int
    log: int


@dataclass(frozen=True, slots=True)
class InflightArea:
    """GET_INFLIGHT_FD and SET_INFLIGHT_FD: where the logs of all queues lie."""

    size: int
    offset: int
    queues: int
    queue_size: int


# The payload's size, and how many descriptors may come with it (least, most); None: checked later.
_SHAPES: dict[VhostRequest, tuple[int | None, int, int]] = {
    VhostRequest.GET_FEATURES: (0, 0, 0),
    VhostRequest.SET_FEATURES: (8, 0, 0),
    VhostRequest.SET_OWNER: (0, 0, 0),
    VhostRequest.RESET_OWNER: (0, 0, 0),
    VhostRequest.SET_MEM_TABLE: (None, 0, MOST_DESCRIPTORS),
    VhostRequest.SET_LOG_BASE: (16, 1, 1),
    VhostRequest.SET_LOG_FD: (0, 0, 1),
    VhostRequest.SET_VRING_NUM: (8, 0, 0),
    VhostRequest.SET_VRING_ADDR: (40, 0, 0),
    VhostRequest.SET_VRING_BASE: (8, 0, 0),
    VhostRequest.GET_VRING_BASE: (8, 0, 0),
    VhostRequest.SET_VRING_KICK: (8, 0, 1),
    VhostRequest.SET_VRING_CALL: (8, 0, 1),
    VhostRequest.SET_VRING_ERR: (8, 0, 1),
    VhostRequest.GET_PROTOCOL_FEATURES: (0, 0, 0),
    VhostRequest.SET_PROTOCOL_FEATURES: (8, 0, 0),
    VhostRequest.GET_QUEUE_NUM: (0, 0, 0),
    VhostRequest.SET_VRING_ENABLE: (8, 0, 0),
    VhostRequest.SET_BACKEND_REQ_FD: (0, 1, 1),
    VhostRequest.GET_CONFIG: (None, 0, 0),
    VhostRequest.SET_CONFIG: (None, 0, 0),
    VhostRequest.GET_INFLIGHT_FD: (24, 0, 0),
    VhostRequest.SET_INFLIGHT_FD: (24, 1, 1),
    VhostRequest.GET_MAX_MEM_SLOTS: (0, 0, 0),
    VhostRequest.ADD_MEM_REG: (40, 1, 1),
    # QEMU sends the region's descriptor again; the specification lets it come without.
    VhostRequest.REM_MEM_REG: (40, 0, 1),
    VhostRequest.GET_VRING_BASE_SKIP_DRAIN: (8, 0, 0),
}


class Receiver:
    """Takes messages off a connected, non-blocking socket, whatever pieces they come in."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = b""
        self._descriptors: list[int] = []

    @property
    def pending(self) -> tuple[bytes, list[int]]:
        """What has come of a message that is not whole yet."""
        return self._data, self._descriptors

    @pending.setter
    def pending(self, value: tuple[bytes, list[int]]) -> None:
        self._data, self._descriptors = value

    def close(self) -> None:
        """Close the descriptors of a message that never became whole."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def receive(self) -> VhostMessage | None:
        """The next message; None if it is not whole yet.

        Raises ProtocolError for what is no message, EOFError at the end, OSError as recvmsg does.
        """
        while True:
            wanted = self._missing()
            if not wanted:
                return self._whole()
            space = socket.CMSG_SPACE(MOST_DESCRIPTORS * 4)
            try:
                data, ancillary, flags, _ = self._connection.recvmsg(
                    wanted, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return None
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    count = len(content) // 4
                    self._descriptors += struct.unpack(f"={count}i", content[: 4 * count])
            if flags & socket.MSG_CTRUNC and len(self._descriptors) < MOST_DESCRIPTORS:
                raise ProtocolError(
                    "a message's descriptors are lost: this process has as many files open as it "
                    "may (ulimit -n)"
                )
            if flags & socket.MSG_CTRUNC or len(self._descriptors) > MOST_DESCRIPTORS:
                raise ProtocolError("a message carries too many descriptors")
            if not data:
                raise EOFError
            self._data += data

    def _missing(self) -> int:
        """How many bytes the message still lacks, as far as is known."""
        if len(self._data) < _HEADER.size:
            return _HEADER.size - len(self._data)
        _, flags, size = _HEADER.unpack_from(self._data)
        if size > LARGEST_PAYLOAD:
            raise ProtocolError(f"a payload of {size} bytes")
        if flags & _VERSION_MASK != _VERSION:
            raise ProtocolError(f"protocol version {flags & _VERSION_MASK}, not {_VERSION}")
        if flags & Flag.REPLY:
            raise ProtocolError("a reply where a request is due")
        return int(_HEADER.size + size - len(self._data))

    def _whole(self) -> VhostMessage:
        number, flags, _ = _HEADER.unpack_from(self._data)
        payload, self._data = self._data[_HEADER.size :], b""
        descriptors, self._descriptors = self._descriptors, []
        try:
            request = VhostRequest(number)
        except ValueError:
            VhostMessage(VhostRequest.SET_OWNER, 0, b"", descriptors).close()
            raise ProtocolError(f"request {number} is not known") from None
        message = VhostMessage(request, flags, payload, descriptors)
        size, least, most = _SHAPES[request]
        if size is not None and len(payload) != size:
            message.close()
            raise ProtocolError(f"{request.name} with {len(payload)} bytes, not {size}")
        if not least <= len(message.descriptors) <= most:
            count = len(message.descriptors)
            message.close()
            raise ProtocolError(f"{request.name} with {count} descriptors")
        return message


def parse_u64(payload: bytes) -> int:
    value: int = _U64.unpack(payload)[0]
    return value


def parse_state(payload: bytes) -> tuple[int, int]:
    """A vring's index and a number."""
    index, number = _STATE.unpack(payload)
    return index, number


def parse_addresses(payload: bytes) -> VringAddresses:
    return VringAddresses(*_ADDRESSES.unpack(payload))


def parse_vring_descriptor(payload: bytes) -> tuple[int, bool]:
    """SET_VRING_KICK, CALL, ERR: the vring's index, and whether a descriptor comes with it."""
    value = parse_u64(payload)
    return value & 0xFF, not value & _NO_DESCRIPTOR


def parse_memory_table(message: VhostMessage) -> list[MemoryRegion]:
    """SET_MEM_TABLE: one region a descriptor; those stay the message's."""
    payload = message.payload
    if len(payload) < _TABLE.size:
        raise ProtocolError("a memory table without a head")
    count, _ = _TABLE.unpack_from(payload)
    if count != len(message.descriptors) or len(payload) != _TABLE.size + count * _REGION.size:
        raise ProtocolError(
            f"a memory table of {count} regions in {len(payload)} bytes"
            f" with {len(message.descriptors)} descriptors"
        )
    return [
        _region(payload, _TABLE.size + number * _REGION.size, message.descriptors[number])
        for number in range(count)
    ]


def parse_one_region(message: VhostMessage) -> MemoryRegion:
    """ADD_MEM_REG and REM_MEM_REG; the descriptor, if any, stays the message's."""
    descriptor = message.descriptors[0] if message.descriptors else -1
    return _region(message.payload, 8, descriptor)


def _region(payload: bytes, at: int, descriptor: int) -> MemoryRegion:
    guest, size, user, offset = _REGION.unpack_from(payload, at)
    return MemoryRegion(guest, user, size, offset, descriptor)


def parse_config(payload: bytes) -> tuple[int, int, bytes]:
    """GET_CONFIG, SET_CONFIG: offset, size, content. Raises ProtocolError beyond 256 bytes."""
    if len(payload) < _CONFIG.size:
        raise ProtocolError("a configuration request without a head")
    offset, size, _ = _CONFIG.unpack_from(payload)
    content = payload[_CONFIG.size :]
    if offset + size > CONFIG_BYTES or len(content) != size:
        raise ProtocolError(f"a configuration request for {size} bytes at {offset}")
    return offset, size, content


def parse_log(payload: bytes) -> tuple[int, int]:
    """SET_LOG_BASE: the log's bytes, and where they begin in the file."""
    size, offset = _LOG.unpack(payload)
    return size, offset


def parse_inflight(payload: bytes) -> InflightArea:
    return InflightArea(*_INFLIGHT.unpack(payload))


def format_reply(request: VhostRequest, payload: bytes) -> bytes:
    """The reply to a request, ready to be sent."""
    return _HEADER.pack(request, _VERSION | Flag.REPLY, len(payload)) + payload


def format_backend_request(request: BackendRequest) -> bytes:
    """A request to the front end that wants no answer."""
    return _HEADER.pack(request, _VERSION, 0)


def format_u64(value: int) -> bytes:
    return _U64.pack(value)


def format_state(index: int, number: int) -> bytes:
    return _STATE.pack(index, number)


def format_config(offset: int, content: bytes) -> bytes:
    return _CONFIG.pack(offset, len(content), 0) + content


def format_inflight(area: InflightArea) -> bytes:
    return _INFLIGHT.pack(area.size, area.offset, area.queues, area.queue_size)
