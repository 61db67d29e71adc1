"""A codec and a socket for netlink: rtnetlink, generic netlink, and nothing of what they carry.

Source: Documentation/userspace-api/netlink/intro.rst; include/uapi/linux/netlink.h,
genetlink.h. Attributes are `(type, bytes)`: builders make them, `parse_attributes` takes them
apart, and neither interprets a value. Replies are parsed with bounds checked; a malformed tail is
dropped, never followed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from vfiotool.errors import KernelError, NotPermitted, Unsupported, VfiotoolError, errno_name

NETLINK_ROUTE = 0
NETLINK_GENERIC = 16

NLM_F_REQUEST = 0x1
NLM_F_MULTI = 0x2
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
_NLMSGERR_ATTR_MSG = 1

_GENL_ID_CTRL = 0x10
_CTRL_CMD_GETFAMILY = 3
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_GENERIC = struct.Struct("=BBH")
_RECEIVE_BYTES = 1 << 18
_DUMP_TRIES = 8
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message. `payload` is what follows the header (family header included)."""

    type: int
    flags: int
    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is not yet sent: to a `protocol` (NETLINK_ROUTE, NETLINK_GENERIC)."""

    protocol: int
    type: int
    payload: bytes
    flags: int = NLM_F_ACK
    what: str = "netlink request"


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute: header, data, padding to four bytes. Raises ValueError over 65,531 bytes."""
    length = _ATTRIBUTE.size + len(data)
    if length > 0xFFFF:
        raise ValueError(f"netlink attribute {kind}: {len(data)} bytes do not fit")
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=B", value))


def u16(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=H", value))


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def string(kind: int, value: str) -> bytes:
    """A NUL-terminated string (NLA_NUL_STRING). Raises ValueError if it holds a NUL."""
    data = value.encode()
    if b"\0" in data:
        raise ValueError(f"netlink attribute {kind}: a string with a NUL")
    return attribute(kind, data + b"\0")


def nested(kind: int, *children: bytes, flag: bool = True) -> bytes:
    """Attributes within an attribute; `flag` sets NLA_F_NESTED, which strict families demand."""
    return attribute(kind | (NLA_F_NESTED if flag else 0), b"".join(children))


def iterate_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """`(type without flags, data)` in order. Stops at the first that does not fit."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            return
        yield kind & _NLA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """The attributes by type; of several with one type the last (as nla_parse does)."""
    return dict(iterate_attributes(data))


def as_int(data: bytes | None) -> int | None:
    """An unsigned integer of 1, 2, 4 or 8 bytes in host order; None for any other length.

    The width is the sender's: vdpa declares its status u8 and sends it as u16 (FACTS).
    """
    if data is None or len(data) not in (1, 2, 4, 8):
        return None
    return int.from_bytes(data, "little" if _LITTLE else "big")


_LITTLE = struct.pack("=H", 1) == b"\x01\x00"


def as_text(data: bytes | None) -> str | None:
    """A string attribute without its NUL; bytes that are not UTF-8 appear as `\\xNN`."""
    return None if data is None else data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def encode(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    """One message with its header."""
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, sequence, 0) + payload


def decode(data: bytes) -> list[Message]:
    """The messages of one datagram; a malformed tail is dropped."""
    messages = []
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            break
        messages.append(Message(kind, flags, sequence, data[at + _HEADER.size : at + length]))
        at += (length + 3) & ~3
    return messages


def generic(command: int, version: int, *attributes: bytes) -> bytes:
    """The payload of a generic-netlink message: its header and attributes."""
    return _GENERIC.pack(command, version, 0) + b"".join(attributes)


def parse_generic(message: Message) -> tuple[int, dict[int, bytes]]:
    """A generic-netlink message's command and attributes; command -1 if it is too short."""
    if len(message.payload) < _GENERIC.size:
        return -1, {}
    command = message.payload[0]
    return command, parse_attributes(message.payload[_GENERIC.size :])


def parse_error(message: Message) -> tuple[int, str | None]:
    """An NLMSG_ERROR's or NLMSG_DONE's errno (0 is success) and the kernel's own words, if any."""
    if len(message.payload) < 4:
        return 0, None
    (number,) = struct.unpack_from("=i", message.payload)
    if not message.flags & NLM_F_ACK_TLVS:
        return -number, None
    at = 4
    if message.type == NLMSG_ERROR:
        at += _HEADER.size
        if not message.flags & NLM_F_CAPPED and len(message.payload) >= at:
            (length,) = struct.unpack_from("=I", message.payload, 4)
            at = 4 + max(length, _HEADER.size)
    attributes = parse_attributes(message.payload[at:])
    return -number, as_text(attributes.get(_NLMSGERR_ATTR_MSG))


class Socket:
    """An open netlink socket; a context manager. Not for use by several threads at once.

    Raises Unsupported at the start if the kernel has no such protocol.
    """

    def __init__(self, protocol: int, timeout_s: float = TIMEOUT_S) -> None:
        # Not above: the codec alone, which every change imports, needs none of it.
        import socket

        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        try:
            self._socket = socket.socket(socket.AF_NETLINK, kind, protocol)
        except OSError as error:
            raise Unsupported(
                f"open a netlink socket of protocol {protocol}: {error.strerror}",
                errno_name=errno_name(error.errno),
            ) from error
        self._socket.settimeout(timeout_s)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:
                continue  # An old kernel: errors then come without words.
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Socket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, payload: bytes, flags: int, what: str) -> list[Message]:
        """Send one request; returns the answers up to the acknowledgement.

        `what` names the operation in errors. Raises NotPermitted or KernelError with the kernel's
        errno and its own words where it gives them, KernelError when no answer comes in time.
        """
        self._sequence += 1
        message = encode(kind, flags | NLM_F_REQUEST | NLM_F_ACK, self._sequence, payload)
        try:
            self._socket.send(message)
            return self._collect(what)
        except VfiotoolError:
            raise
        except TimeoutError as error:
            raise KernelError(
                f"{what}: no answer from the kernel", errno_name="ETIMEDOUT"
            ) from error
        except OSError as error:
            raise _failure(what, error.errno or 0, None) from error

    def dump(self, kind: int, payload: bytes, what: str) -> list[Message]:
        """All objects; a dump that the kernel reports as torn is taken again.

        Raises as `request`.
        """
        for _ in range(_DUMP_TRIES):
            messages = self.request(kind, payload, NLM_F_DUMP, what)
            if not any(message.flags & NLM_F_DUMP_INTR for message in messages):
                return messages
        raise KernelError(
            f"{what}: it changed while it was read, {_DUMP_TRIES} times over", errno_name="EINTR"
        )

    def _collect(self, what: str) -> list[Message]:
        answers: list[Message] = []
        while True:
            for message in decode(self._socket.recv(_RECEIVE_BYTES)):
                if message.sequence != self._sequence:
                    continue
                if message.type not in (NLMSG_ERROR, NLMSG_DONE):
                    answers.append(message)
                    continue
                number, words = parse_error(message)
                if number:
                    raise _failure(what, number, words)
                return answers


def send(request: Request, timeout_s: float = TIMEOUT_S) -> list[Message]:
    """Send one request on a socket of its own. Raises as `Socket.request`."""
    with Socket(request.protocol, timeout_s) as channel:
        return channel.request(request.type, request.payload, request.flags, request.what)


def family_request(name: str) -> Request:
    """The request that asks for a generic-netlink family's number; `family_of` reads the answer."""
    payload = generic(_CTRL_CMD_GETFAMILY, 1, string(_CTRL_ATTR_FAMILY_NAME, name))
    return Request(NETLINK_GENERIC, _GENL_ID_CTRL, payload, 0, f"look up netlink family {name}")


def family_of(answers: list[Message], name: str) -> int:
    """The number in the answers to `family_request`. Raises Unsupported if there is none."""
    for message in answers:
        number = as_int(parse_generic(message)[1].get(_CTRL_ATTR_FAMILY_ID))
        if number is not None:
            return number
    raise Unsupported(
        f"the kernel has no netlink family {name!r}",
        hint=f"load the module that brings it: modprobe {name}",
        errno_name="ENOENT",
    )


def resolve_family(channel: Socket, name: str) -> int:
    """A generic-netlink family's number. Raises Unsupported if the kernel has no such family."""
    request = family_request(name)
    try:
        answers = channel.request(request.type, request.payload, request.flags, request.what)
    except KernelError as error:
        if error.errno_name != "ENOENT":
            raise
        answers = []
    return family_of(answers, name)


def _failure(what: str, number: int, words: str | None) -> VfiotoolError:
    name = errno_name(number)
    text = f"{what}: {os.strerror(number)} ({name})"
    if words:
        text += f"; the kernel says: {words}"
    branch = NotPermitted if name in ("EPERM", "EACCES") else KernelError
    return branch(text, errno_name=name)
