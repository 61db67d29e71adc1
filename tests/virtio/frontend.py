"""A front end and driver of our own: memory by memfd, split rings, vhost-user messages.

It is at once the tests' driver and the body of what attacks the server.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from vfiotool.virtio.message import Flag, VhostRequest

SIZE = 64
_DESCRIPTOR = struct.Struct("<QIHH")
NEXT, WRITE, INDIRECT = 1, 2, 4
GUEST, USER = 0x4000_0000, 0x7F00_0000_0000
AREA = 0x4000  # of one queue: its ring
DATA = 0x10_0000
TIMEOUT_S = 20.0

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_ZEROES = 0, 1, 4, 8, 11, 13


class Closed(Exception):
    """The back end ended the connection."""


@dataclass
class Ring:
    """One queue as the driver has it; offsets are into the memory."""

    at: int
    kick: int
    call: int
    added: int = 0
    seen: int = 0


class Frontend:
    """One connection with `queues` rings in one region of shared memory."""

    def __init__(self, path: str, *, queues: int = 1, memory: int = 8 << 20) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(path)
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, memory)
        self.size = memory
        self.memory = mmap.mmap(self.fd, memory)
        self.rings = [
            Ring(AREA * number, os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
            for number in range(queues)
        ]
        self.features = self.protocol = 0
        # Taking a lock is a full barrier: used_event is stored before the used index is loaded
        # (Virtual I/O Device 1.2, section 2.7.7.1); without it a signal can be lost.
        self._fence = threading.Lock()

    def close(self) -> None:
        self.socket.close()
        self.memory.close()
        os.close(self.fd)
        for ring in self.rings:
            os.close(ring.kick)
            os.close(ring.call)

    # Messages

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1
    ) -> None:
        header = struct.pack("<III", request, flags, len(payload))
        try:
            socket.send_fds(self.socket, [header + payload], list(fds))
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def receive(self) -> tuple[int, bytes, list[int]]:
        head, fds = self._exactly(12)
        request, flags, size = struct.unpack("<III", head)
        assert flags & Flag.REPLY and flags & 3 == 1
        payload, more = self._exactly(size)
        return request, payload, fds + more

    def _exactly(self, size: int) -> tuple[bytes, list[int]]:
        data, fds = b"", []
        while len(data) < size:
            try:
                piece, got, _, _ = socket.recv_fds(self.socket, size - len(data), 8)
            except ConnectionResetError:
                raise Closed from None
            if not piece:
                raise Closed
            data += piece
            fds += got
        return data, fds

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        number, answer, fds = self.receive()
        assert number == request and not fds
        return answer

    def acknowledged(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request that wants to be acknowledged; returns 0 or what was wrong."""
        self.send(request, payload, fds, 1 | Flag.NEED_REPLY)
        number, answer, _ = self.receive()
        assert number == request
        return int(struct.unpack("<Q", answer)[0])

    def negotiate(self, without: int = 0) -> None:
        offered = struct.unpack("<Q", self.ask(VhostRequest.GET_FEATURES))[0]
        # The front end turns logging on itself, when a migration begins; its rings are split.
        self.features = offered & ~(without | 1 << 26 | 1 << 34)
        protocol = struct.unpack("<Q", self.ask(VhostRequest.GET_PROTOCOL_FEATURES))[0]
        self.protocol = protocol
        self.send(VhostRequest.SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        self.send(VhostRequest.SET_OWNER)
        assert self.acknowledged(VhostRequest.SET_FEATURES, struct.pack("<Q", self.features)) == 0

    def table(self) -> bytes:
        return struct.pack("<IIQQQQ", 1, 0, GUEST, self.size, USER, 0)

    def share(self) -> None:
        assert self.acknowledged(VhostRequest.SET_MEM_TABLE, self.table(), [self.fd]) == 0

    def addresses(self, index: int) -> bytes:
        at = USER + self.rings[index].at
        return struct.pack("<IIQQQQ", index, 0, at, at + 0x2000, at + 0x1000, 0)

    def set_up(self, index: int, base: int = 0) -> None:
        """All of a queue but that it is enabled."""
        ring = self.rings[index]
        self.send(VhostRequest.SET_VRING_NUM, struct.pack("<II", index, SIZE))
        self.send(VhostRequest.SET_VRING_BASE, struct.pack("<II", index, base))
        self.send(VhostRequest.SET_VRING_ADDR, self.addresses(index))
        self.send(VhostRequest.SET_VRING_CALL, struct.pack("<Q", index), [ring.call])
        self.send(VhostRequest.SET_VRING_KICK, struct.pack("<Q", index), [ring.kick])

    def start(self, index: int = 0, base: int = 0) -> None:
        self.set_up(index, base)
        assert self.acknowledged(VhostRequest.SET_VRING_ENABLE, struct.pack("<II", index, 1)) == 0

    def up(self) -> None:
        """Everything until the queues run."""
        self.negotiate()
        self.share()
        for index in range(len(self.rings)):
            self.start(index)

    def hurry(self, features: int, protocol: int) -> None:
        """As `up`, where it is known what is offered: all is sent before an answer is read."""
        self.features, need = features, 1 | Flag.NEED_REPLY
        self.send(VhostRequest.SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        self.send(VhostRequest.SET_OWNER)
        self.send(VhostRequest.SET_FEATURES, struct.pack("<Q", features), flags=need)
        self.send(VhostRequest.SET_MEM_TABLE, self.table(), [self.fd], need)
        for index in range(len(self.rings)):
            self.set_up(index)
            self.send(VhostRequest.SET_VRING_ENABLE, struct.pack("<II", index, 1), flags=need)
        for _ in range(2 + len(self.rings)):
            assert self.receive()[1] == bytes(8)

    def stop(self, index: int = 0) -> int:
        answer = self.ask(VhostRequest.GET_VRING_BASE, struct.pack("<II", index, 0))
        return int(struct.unpack("<II", answer)[1])

    # Rings

    @property
    def words(self) -> memoryview:
        """The memory as words, each loaded and stored by one access: struct.pack_into clears the
        bytes before it sets them, and the device would see that."""
        return memoryview(self.memory).cast("H")

    def fence(self) -> None:
        """What was stored before is seen before anything is loaded after it."""
        with self._fence:
            pass

    def u16(self, at: int) -> int:
        return int(self.words[at // 2])

    def put(self, ring: Ring, head: int, chain: Sequence[tuple[int, int, bool]]) -> None:
        """Lay a chain of (offset, length, written by the device) down from `head` on."""
        for number, (at, length, written) in enumerate(chain):
            last = number == len(chain) - 1
            flags = (0 if last else NEXT) | (WRITE if written else 0)
            entry = _DESCRIPTOR.pack(GUEST + at, length, flags, head + number + 1)
            place = ring.at + 16 * (head + number)
            self.memory[place : place + 16] = entry

    def add(self, ring: Ring, head: int, *, kick: bool = True) -> None:
        self.words[(ring.at + 0x1004) // 2 + ring.added % SIZE] = head
        ring.added = (ring.added + 1) & 0xFFFF
        self.words[(ring.at + 0x1002) // 2] = ring.added
        if kick:
            os.eventfd_write(ring.kick, 1)

    def wait(self, ring: Ring, count: int = 1) -> list[tuple[int, int]]:
        """The next `count` used entries: (head, bytes written)."""
        found = []
        while len(found) < count:
            self.words[(ring.at + 0x1004) // 2 + SIZE] = ring.seen
            self.fence()
            if self.u16(ring.at + 0x2002) == ring.seen:
                ready = select.select([ring.call, self.socket], [], [], TIMEOUT_S)[0]
                if self.socket in ready and self.u16(ring.at + 0x2002) == ring.seen:
                    raise Closed
                assert ready, "no completion came"
                with suppress(BlockingIOError):
                    os.eventfd_read(ring.call)
                continue
            place = ring.at + 0x2004 + 8 * (ring.seen % SIZE)
            found.append(struct.unpack_from("<II", self.memory, place))
            ring.seen = (ring.seen + 1) & 0xFFFF
        return found

    def request(
        self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, index: int = 0
    ) -> tuple[int, bytes]:
        """One request on its own: its status and what was read."""
        ring = self.rings[index]
        at = DATA + index * 0x8_0000
        self.memory[at : at + 16] = struct.pack("<IIQ", kind, 0, sector)
        chain = [(at, 16, False)]
        if data:
            self.memory[at + 32 : at + 32 + len(data)] = data
            chain.append((at + 32, len(data), False))
        if room:
            self.memory[at + 32 : at + 32 + room] = bytes(room)
            chain.append((at + 32, room, True))
        self.memory[at + 16] = 0xFF
        chain.append((at + 16, 1, True))
        self.put(ring, 0, chain)
        self.add(ring, 0)
        ((head, written),) = self.wait(ring)
        assert head == 0 and written == room + 1
        return self.memory[at + 16], self.memory[at + 32 : at + 32 + room]

    def write(self, sector: int, data: bytes, index: int = 0) -> int:
        return self.request(T_OUT, sector, data, index=index)[0]

    def read(self, sector: int, length: int, index: int = 0) -> bytes:
        status, data = self.request(T_IN, sector, room=length, index=index)
        assert status == 0
        return data
