"""Ethernet frames with the header that virtio-net puts before them: checksums and segments.

Virtual I/O Device 1.2, section 5.1.6. What a guest wrote is checked before it is believed: a header
that does not fit its frame makes the frame worthless, and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag

HEADER = struct.Struct("<BBHHHHH")
ETHERNET = 14
_IP4, _IP6, _TCP = 0x0800, 0x86DD, 6


class NetFeature(IntFlag):
    """Feature bits of section 5.1.3."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16


# Of a header's flags (VIRTIO_NET_HDR_F_). Plain numbers, as it is asked of each frame: an operation
# on an enumeration takes longer than all the rest.
_NEEDS_CSUM, _DATA_VALID = 1, 2
_KNOWN_FLAGS = _NEEDS_CSUM | _DATA_VALID
_TAKES_PARTIAL = int(NetFeature.GUEST_CSUM)


class Gso(IntEnum):
    """How a frame is to be cut (VIRTIO_NET_HDR_GSO_)."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 4


_ECN = 0x80
_KINDS = {int(kind): kind for kind in Gso}


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame and what is still to be done to it. `data` begins with the Ethernet header."""

    data: bytes
    flags: int = 0
    gso: Gso = Gso.NONE
    header_length: int = 0
    segment_size: int = 0
    checksum_start: int = 0
    checksum_offset: int = 0

    @property
    def needs_checksum(self) -> bool:
        return bool(self.flags & _NEEDS_CSUM)

    def header(self, buffers: int = 1) -> bytes:
        """`struct virtio_net_hdr` with `num_buffers`."""
        return HEADER.pack(
            self.flags,
            self.gso,
            self.header_length,
            self.segment_size,
            self.checksum_start,
            self.checksum_offset,
            buffers,
        )


def parse_frame(packet: bytes, header_bytes: int) -> Frame | None:
    """A packet of a driver or a tap: header, then frame. None for one that contradicts itself."""
    if len(packet) < header_bytes + ETHERNET:
        return None
    flags, gso, length, size, start, offset, _ = HEADER.unpack(
        packet[: min(header_bytes, HEADER.size)].ljust(HEADER.size, b"\0")
    )
    data = packet[header_bytes:]
    flags &= _KNOWN_FLAGS
    kind = _KINDS.get(gso & ~_ECN)
    if kind is None:
        return None
    if flags & _NEEDS_CSUM and start + offset + 2 > len(data):
        return None
    if kind is not Gso.NONE and not (size and flags & _NEEDS_CSUM and _is_tcp(data, kind)):
        return None
    return Frame(data, flags, kind, length, size, start, offset)


def _layer3(data: bytes) -> tuple[int, int] | None:
    """Where the network header begins behind at most two VLAN tags, and its type."""
    at = ETHERNET
    kind = int.from_bytes(data[at - 2 : at], "big")
    for _ in range(2):
        if kind not in (0x8100, 0x88A8):
            break
        at += 4
        kind = int.from_bytes(data[at - 2 : at], "big")
    return (at, kind) if len(data) > at else None


def _layer4(data: bytes) -> tuple[int, int] | None:
    """Where the network and the TCP header begin; None for what is not whole TCP over IP."""
    found = _layer3(data)
    if found is None:
        return None
    at, kind = found
    if kind == _IP4 and len(data) >= at + 20 and data[at] >> 4 == 4 and data[at + 9] == _TCP:
        tcp = at + 4 * (data[at] & 15)
    elif kind == _IP6 and len(data) >= at + 40 and data[at + 6] == _TCP:
        tcp = at + 40
    else:
        return None
    if tcp < at + 20 or len(data) < tcp + 20:
        return None
    return at, tcp


def _is_tcp(data: bytes, kind: Gso) -> bool:
    found = _layer4(data)
    if found is None:
        return False
    at, tcp = found
    version = 4 if kind is Gso.TCPV4 else 6
    length = 4 * (data[tcp + 12] >> 4)
    return data[at] >> 4 == version and length >= 20 and len(data) >= tcp + length


def checksum(data: bytes, start: int = 0) -> int:
    """The Internet checksum's sum of 16-bit words (RFC 1071), not complemented."""
    if len(data) % 2:
        data += b"\0"
    total: int = start + sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def with_checksum(frame: Frame) -> Frame:
    """The same frame with its checksum computed; the field holds the pseudo header's sum."""
    if not frame.needs_checksum:
        return frame
    start, at = frame.checksum_start, frame.checksum_start + frame.checksum_offset
    value = ~checksum(frame.data[start:]) & 0xFFFF
    # UDP's 0 means "none" (RFC 768); for TCP both are zero.
    data = frame.data[:at] + (value or 0xFFFF).to_bytes(2, "big") + frame.data[at + 2 :]
    return replace(frame, data=data, flags=frame.flags & ~_NEEDS_CSUM)


def segments(frame: Frame) -> list[Frame]:
    """A TCP frame cut into segments of `segment_size` bytes, checksums computed."""
    found = _layer4(frame.data)
    if frame.gso is Gso.NONE or found is None:
        return [with_checksum(frame)]
    at, tcp = found
    payload_at = tcp + 4 * (frame.data[tcp + 12] >> 4)
    head, payload = frame.data[:payload_at], frame.data[payload_at:]
    sequence = int.from_bytes(head[tcp + 4 : tcp + 8], "big")
    identity = int.from_bytes(head[at + 4 : at + 6], "big")
    pieces = []
    for number, offset in enumerate(range(0, max(len(payload), 1), frame.segment_size)):
        piece = payload[offset : offset + frame.segment_size]
        made = bytearray(head)
        last = offset + frame.segment_size >= len(payload)
        _set(made, tcp + 4, sequence + offset, 4)
        if not last:
            made[tcp + 13] &= ~0x09  # FIN and PSH belong to the last one
        if number:
            made[tcp + 13] &= ~0x80  # CWR to the first (RFC 3168)
        _finish(made, at, tcp, identity + number, piece)
        pieces.append(Frame(bytes(made) + piece))
    return pieces


def _set(data: bytearray, at: int, value: int, size: int) -> None:
    data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "big")


def _finish(head: bytearray, at: int, tcp: int, identity: int, payload: bytes) -> None:
    """Lengths, identification and checksums of one segment."""
    length = len(head) - tcp + len(payload)
    if head[at] >> 4 == 4:
        _set(head, at + 2, len(head) - at + len(payload), 2)
        _set(head, at + 4, identity, 2)
        _set(head, at + 10, 0, 2)
        _set(head, at + 10, ~checksum(bytes(head[at:tcp])), 2)
        addresses = bytes(head[at + 12 : at + 20])
    else:
        _set(head, at + 4, len(head) - at - 40 + len(payload), 2)
        addresses = bytes(head[at + 8 : at + 40])
    _set(head, tcp + 16, 0, 2)
    pseudo = addresses + struct.pack(">IHH", length, 0, _TCP)
    _set(head, tcp + 16, ~checksum(pseudo + bytes(head[tcp:]) + payload), 2)


def suited(frame: Frame, accepted: int) -> list[Frame]:
    """The frame as a receiver that accepted these features can take it, in pieces if need be."""
    if frame.gso is not Gso.NONE:
        wanted = NetFeature.GUEST_TSO4 if frame.gso is Gso.TCPV4 else NetFeature.GUEST_TSO6
        if not accepted & wanted:
            return segments(frame)
    elif frame.needs_checksum and not accepted & _TAKES_PARTIAL:
        return [with_checksum(frame)]
    return [frame]
