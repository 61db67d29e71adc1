"""Front ends that break the rules: every class of fault that took other servers down, at random.

`attack` is one connection's worth; it returns how many messages and rings it sent. Connections are
numbered, and number N begins with the class KINDS[N % len(KINDS)], so that each has its turn; what
follows is chosen at random. Only what is sent to our own server is kept here, as rules by which it
is made, not as inputs.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress

from tests.virtio.frontend import (
    DATA,
    GUEST,
    INDIRECT,
    NEXT,
    SIZE,
    T_IN,
    T_OUT,
    USER,
    WRITE,
    Closed,
    Frontend,
)
from vfiotool.virtio.message import VhostRequest

MEMORY = 2 << 20
ODD = (0, 1, 2, 15, 16, 511, 4096, 0xFFFF, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, 1 << 32)
# Features and protocol features by a server's socket.
OFFERED: dict[str, tuple[int, int]] = {}
ODD_64 = (*ODD, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
# A table of as many requests as there are descriptors, to be read and to be written in turn.
_FULL = b"".join(
    struct.pack("<QIHH", GUEST + DATA + 32 * head, 32, WRITE * (head % 2), 0)
    for head in range(SIZE)
)


class Attacker:
    """One hostile connection."""

    def __init__(self, path: str, rng: random.Random, queues: int) -> None:
        self.front = Frontend(path, queues=queues, memory=MEMORY)
        # The one that is attacked.
        self.ring = self.front.rings[rng.randrange(queues)]
        self.front.socket.settimeout(5.0)
        self.rng = rng
        self.sent = 0
        self.path = path

    def close(self) -> None:
        self.front.close()

    def send(self, request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> None:
        self.front.send(request, payload, [self.front.fd] * fds, flags)
        self.sent += 1

    def number(self) -> int:
        return self.rng.choice((*ODD_64, GUEST, USER, GUEST + MEMORY, self.rng.getrandbits(64)))

    def up(self) -> None:
        """Everything until the queues run; what the server offers is asked for once."""
        known = OFFERED.get(self.path)
        if known is None:
            self.front.up()
            OFFERED[self.path] = self.front.features, self.front.protocol
        else:
            self.front.hurry(*known)
        self.sent += 20

    # Rings: what is laid down is made available and kicked; the answer is not waited for.

    def entry(self, at: int, address: int, length: int, flags: int, next_: int) -> None:
        entry = struct.pack(
            "<QIHH", address & ((1 << 64) - 1), length & 0xFFFFFFFF, flags, next_ & 0xFFFF
        )
        self.front.memory[at : at + 16] = entry

    def offer(self, head: int) -> None:
        self.front.add(self.ring, head & 0xFFFF)
        self.sent += 1

    def chain(self) -> None:
        """A chain of which each part may be wrong."""
        rng, at = self.rng, DATA
        kind = rng.choice((T_IN, T_OUT, 4, 8, 11, 13, rng.getrandbits(32)))
        self.front.memory[at : at + 16] = struct.pack(
            "<IIQ", kind & 0xFFFFFFFF, 0, self.number() if rng.random() < 0.5 else 0
        )
        count, head = rng.randrange(1, 6), rng.randrange(SIZE)
        for number in range(count):
            address = GUEST + rng.choice((at, at + 32, MEMORY - 8, 0, 0x1000))
            length = rng.choice((16, 512, 1, 4096, 0, MEMORY, (1 << 32) - 1))
            flags = rng.choice((NEXT, NEXT, NEXT | WRITE, WRITE, INDIRECT, 0xFFFF, 0))
            if rng.random() < 0.15:
                address = self.number()
            next_ = rng.choice((head + number + 1, head, number, 0xFFFF, SIZE))
            self.entry(self.ring.at + 16 * ((head + number) % SIZE), address, length, flags, next_)
        self.offer(head)

    def table(self) -> None:
        """An indirect table: nested, going round, too long, cut off, or nowhere."""
        rng, at = self.rng, DATA + 0x1000
        for number in range(8):
            flags = rng.choice((NEXT, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0))
            address = GUEST + rng.choice((DATA, at, MEMORY - 4))
            self.entry(at + 16 * number, address, rng.choice(ODD), flags, rng.randrange(10))
        head = rng.randrange(SIZE)
        length = rng.choice((16, 128, 129, 1 << 20, (1 << 32) - 16, 0))
        place = rng.choice((GUEST + at, GUEST + MEMORY - 16, self.number()))
        self.entry(
            self.ring.at + 16 * head,
            place,
            length,
            INDIRECT | rng.choice((0, 0, NEXT, WRITE)),
            head,
        )
        self.offer(head)

    def indices(self) -> None:
        """Heads that are not there or come twice, and an index that jumps."""
        ring, rng = self.ring, self.rng
        head = rng.choice((0, 0, SIZE - 1, SIZE, 0xFFFF))
        for _ in range(rng.randrange(1, 4)):
            self.offer(head)
        if rng.random() < 0.4:
            ring.added = rng.getrandbits(16)
            self.front.words[(ring.at + 0x1002) // 2] = ring.added
            os.eventfd_write(ring.kick, 1)
            self.sent += 1

    def garbage(self) -> None:
        self.front.memory[0:0x4000] = self.rng.randbytes(0x4000)
        os.eventfd_write(self.rng.choice(self.front.rings).kick, 1)
        self.sent += 1

    def shrink(self) -> None:
        """The memory goes while it is in use."""
        self.chain()
        os.ftruncate(self.front.fd, self.rng.choice((0, 4096, 0x3000, MEMORY // 2)))
        os.eventfd_write(self.ring.kick, 1)
        # This end may not look at it any more either.
        os.ftruncate(self.front.fd, MEMORY)
        self.sent += 1

    def leaked(self) -> None:
        """All that the ring holds, none of which is ever taken back; then the same again."""
        ring, memory = self.ring, self.front.memory
        memory[ring.at : ring.at + len(_FULL)] = _FULL
        for _ in range(2):
            heads = (number & (SIZE - 1) for number in range(-ring.added, SIZE - ring.added))
            memory[ring.at + 0x1004 : ring.at + 0x1004 + 2 * SIZE] = struct.pack(
                f"<{SIZE}H", *heads
            )
            ring.added = (ring.added + SIZE) & 0xFFFF
            self.front.words[(ring.at + 0x1002) // 2] = ring.added
            os.eventfd_write(ring.kick, 1)
        self.sent += 2 * SIZE

    def replace(self) -> None:
        """The memory table is replaced, by other memory as well, while requests are in use."""
        self.chain()
        with suppress(OSError):
            other = os.memfd_create("other", os.MFD_CLOEXEC)
            try:
                os.ftruncate(other, self.rng.choice((MEMORY, 4096, MEMORY // 2)))
                table = self.front.table()
                self.front.send(VhostRequest.SET_MEM_TABLE, table, [other])
                self.chain()
                self.front.send(VhostRequest.SET_MEM_TABLE, table, [self.front.fd])
            finally:
                os.close(other)
        self.sent += 2

    def across(self) -> None:
        """Lengths across two regions that meet, overlap, or leave a hole."""
        half, hole = MEMORY // 2, self.rng.choice((0, 0, 4096, -4096))
        regions = struct.pack("<QQQQ", GUEST, half, USER, 0)
        regions += struct.pack("<QQQQ", GUEST + half + hole, half, USER + half + hole, half)
        payload = struct.pack("<II", 2, 0) + regions
        self.send(VhostRequest.SET_MEM_TABLE, payload, 2)
        for flags in (0, WRITE):
            self.entry(self.ring.at, GUEST + half - 8, self.rng.choice((16, half)), flags, 0)
            self.offer(0)

    # Messages

    def flood(self) -> None:
        """More descriptors than any message may carry."""
        count = self.rng.choice((9, 64, 253))
        self.send(self.rng.choice(tuple(VhostRequest)), bytes(8), count)

    def early(self) -> None:
        """A ring that runs before there is memory, or once its memory is gone."""
        if self.rng.random() < 0.5:
            self.send(VhostRequest.SET_MEM_TABLE, bytes(8))
        index = self.rng.randrange(len(self.front.rings))
        for request in (VhostRequest.SET_VRING_NUM, VhostRequest.SET_VRING_BASE):
            self.send(request, struct.pack("<II", index, SIZE))
        self.send(VhostRequest.SET_VRING_ADDR, self.front.addresses(index))
        ring = self.front.rings[index]
        self.front.send(VhostRequest.SET_VRING_KICK, struct.pack("<Q", index), [ring.kick])
        self.send(VhostRequest.SET_VRING_ENABLE, struct.pack("<II", index, 1))
        self.chain()

    def memory_table(self) -> None:
        rng, count = self.rng, self.rng.choice((0, 1, 2, 8, 9, 0xFFFFFFFF))
        regions = b"".join(
            struct.pack("<QQQQ", *(rng.choice((self.number(), 0, MEMORY)) for _ in range(4)))
            for _ in range(min(count, 8))
        )
        self.send(
            VhostRequest.SET_MEM_TABLE,
            struct.pack("<II", count, 0) + regions,
            rng.choice((min(count, 8), 0, 1, 8)),
            rng.choice((1, 9)),
        )

    def slot(self) -> None:
        values = struct.pack("<5Q", 0, *(self.number() for _ in range(4)))
        request = self.rng.choice((VhostRequest.ADD_MEM_REG, VhostRequest.REM_MEM_REG))
        self.send(request, values, self.rng.randrange(3), 9)

    def inflight(self) -> None:
        """An area of odd counts, or of odd content."""
        rng = self.rng
        for index in range(len(self.front.rings)):
            self.send(VhostRequest.GET_VRING_BASE, struct.pack("<II", index, 0))
        self.front.memory[DATA : DATA + 0x2000] = rng.randbytes(0x2000)
        if rng.random() < 0.5:
            head = struct.pack("<QHHHH", 0, 1, SIZE, rng.getrandbits(16), rng.getrandbits(16))
            self.front.memory[DATA : DATA + 16] = head
        size, offset = rng.choice((0x1000, 0x2000, self.number())), rng.choice((DATA, 0))
        area = (size, rng.choice((offset, self.number())), rng.choice((1, 2, 0, 0xFFFF)), SIZE)
        self.send(VhostRequest.SET_INFLIGHT_FD, struct.pack("<QQHH4x", *area), 1, 9)
        with suppress(AssertionError):
            self.front.start(rng.randrange(len(self.front.rings)))

    def log(self) -> None:
        payload = struct.pack("<QQ", self.number(), self.number())
        self.send(VhostRequest.SET_LOG_BASE, payload, 1)

    def config(self) -> None:
        head = struct.pack("<III", *(self.rng.choice(ODD[:-1]) for _ in range(3)))
        room = bytes(self.rng.choice((0, 60, 256, 300)))
        request = self.rng.choice((VhostRequest.GET_CONFIG, VhostRequest.SET_CONFIG))
        self.send(request, head + room)

    def vring(self) -> None:
        rng = self.rng
        request = rng.choice(
            (
                VhostRequest.SET_VRING_NUM,
                VhostRequest.SET_VRING_BASE,
                VhostRequest.SET_VRING_ENABLE,
                VhostRequest.GET_VRING_BASE,
                VhostRequest.SET_VRING_KICK,
                VhostRequest.SET_VRING_CALL,
                VhostRequest.SET_VRING_ERR,
            )
        )
        payload = struct.pack("<II", rng.choice((0, 1, 2, 255, 1 << 31)), rng.choice(ODD[:-1]))
        self.send(request, payload, rng.choice((0, 0, 1, 8)), rng.choice((1, 9)))

    def addresses(self) -> None:
        values = [self.number() for _ in range(4)]
        payload = struct.pack("<IIQQQQ", self.rng.randrange(3), self.rng.randrange(2), *values)
        self.send(VhostRequest.SET_VRING_ADDR, payload, 0, 9)

    def noise(self) -> None:
        rng = self.rng
        request = rng.choice((*VhostRequest, rng.randrange(64), rng.getrandbits(32)))
        payload = rng.randbytes(rng.choice((0, 8, 40, rng.randrange(300), 4096)))
        flags = rng.choice((1, 9, 0, 5, 2, rng.getrandbits(32)))
        self.send(int(request), payload, rng.choice((0, 0, 1, 8)), flags)

    def torn(self) -> None:
        """Half a message, and then the end."""
        self.front.socket.sendall(self.rng.randbytes(self.rng.randrange(1, 30)))
        self.sent += 1
        raise Closed


Kind = Callable[[Attacker], None]
RINGS: tuple[Kind, ...] = (
    Attacker.chain,
    Attacker.table,
    Attacker.indices,
    Attacker.garbage,
    Attacker.shrink,
    Attacker.leaked,
    Attacker.replace,
    Attacker.across,
)
MESSAGES: tuple[Kind, ...] = (
    Attacker.memory_table,
    Attacker.slot,
    Attacker.inflight,
    Attacker.log,
    Attacker.config,
    Attacker.vring,
    Attacker.addresses,
    Attacker.noise,
    Attacker.torn,
    Attacker.flood,
    Attacker.early,
)
KINDS = (*RINGS, *MESSAGES)


def attack(path: str, rng: random.Random, queues: int = 2, number: int | None = None) -> int:
    """One connection that goes wrong, by its number if it has one; returns how many messages and
    rings were sent."""
    attacker = Attacker(path, rng, queues)
    first = None if number is None else KINDS[number % len(KINDS)]
    try:
        with suppress(Closed, TimeoutError, AssertionError, OSError):
            if rng.random() < (0.8 if first is None else 0.4) or first in RINGS:
                # Of a device that somebody else runs there are the messages alone.
                with suppress(AssertionError):
                    attacker.up()
                if first is not None:
                    first(attacker)
                for _ in range(rng.randrange(8)):
                    rng.choice(RINGS)(attacker)
            elif first is not None:
                first(attacker)
            for _ in range(rng.randrange(1, 10)):
                rng.choice(MESSAGES)(attacker)
                if rng.random() < 0.5:
                    rng.choice(RINGS)(attacker)
    finally:
        attacker.close()
    return attacker.sent
