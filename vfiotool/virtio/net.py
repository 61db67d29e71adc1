"""A network of virtual machines in one process: network cards over vhost-user, and a switch.

Virtual I/O Device 1.2, section 5.1. Checksum and segmentation offloads pass through from machine to
machine; who did not accept them gets frames that are complete.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vfiotool.errors import UsageError
from vfiotool.native.direct import QueueRequest
from vfiotool.virtio.device import U16, Mac, VirtioConfig, VirtioDevice
from vfiotool.virtio.frames import Frame, NetFeature, parse_frame, suited
from vfiotool.virtio.served import VirtioFeature

_RX, _TX = 0, 1
_BATCH = 64
# Taken from a driver at a time, where no rate has to be kept.
_TOGETHER = 16
# Plain numbers for what is asked of each frame.
_MERGES = int(NetFeature.MRG_RXBUF)
_LONG_HEADER = int(VirtioFeature.VERSION_1) | _MERGES
# Frames kept for a driver that gives no buffers; what comes beyond is dropped, as a switch does.
_BACKLOG = 256
_LARGEST = 65_550 + 12
AGE_S = 300.0
_MOST_ADDRESSES = 4096
_UP = 1


class Port(Protocol):
    """Where a switch sends frames to."""

    def deliver(self, frame: Frame) -> None:
        """Send a frame out of this port, or drop it."""


class Switch:
    """A learning switch (IEEE 802.1D, without a spanning tree): it forgets after 300 s.

    Frames between bridges (01:80:c2:00:00:00 to 0f) are not forwarded. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.ports: list[Port] = []
        self._clock = clock
        self._learned: OrderedDict[bytes, tuple[Port, float]] = OrderedDict()

    def add(self, port: Port) -> None:
        self.ports.append(port)

    def remove(self, port: Port) -> None:
        """Forget a port and what was learned of it."""
        self.ports.remove(port)
        for address in [key for key, (where, _) in self._learned.items() if where is port]:
            del self._learned[address]

    def forward(self, source: Port, frame: Frame) -> None:
        """Take a frame that came in at a port."""
        to, sender, now = frame.data[:6], frame.data[6:12], self._clock()
        if not sender[0] & 1:
            self._learned[sender] = source, now
            self._learned.move_to_end(sender)
            if len(self._learned) > _MOST_ADDRESSES:
                self._learned.popitem(last=False)
        if to[:5] == b"\x01\x80\xc2\0\0" and to[5] < 16:
            return
        known = self._learned.get(to)
        if known is not None and now - known[1] <= AGE_S:
            if known[0] is not source:
                known[0].deliver(frame)
            return
        for port in self.ports:
            if port is not source:
                port.deliver(frame)


class _Bucket:
    """Bytes a second; a second's worth may come at once. One frame may overdraw it."""

    def __init__(self, rate: int, now: float) -> None:
        self.rate, self._tokens, self._at = rate, float(rate), now

    def take(self, size: int, now: float) -> None:
        self._refill(now)
        self._tokens -= size

    def wait(self, now: float) -> float:
        """Seconds until something may be taken."""
        self._refill(now)
        return 0.0 if self._tokens > 0 else (1 - self._tokens) / self.rate

    def _refill(self, now: float) -> None:
        self._tokens = min(float(self.rate), self._tokens + self.rate * (now - self._at))
        self._at = now


def local_mac(name: str) -> bytes:
    """A locally administered address that is always the same for a name."""
    return b"\x52\x54\x00" + hashlib.sha256(name.encode()).digest()[:3]


@dataclass
class NetConfig(VirtioConfig):
    """`struct virtio_net_config` up to the MTU."""

    mac: Mac = bytes(6)
    status: U16 = _UP
    max_virtqueue_pairs: U16 = 1
    mtu: U16 = 1500


@dataclass
class NetFigures:
    """Counters of one card, as its machine sees them."""

    sent: int = 0
    received: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    dropped: int = 0
    malformed: int = 0


class NetCard(VirtioDevice):
    """A machine's network card, plugged into a switch.

    `rate` limits what the machine sends, in bytes a second: it has to wait, nothing is dropped.
    """

    id = 1
    queues = 2
    taken = frozenset({_RX, _TX})
    features = int(
        NetFeature.CSUM
        | NetFeature.GUEST_CSUM
        | NetFeature.MAC
        | NetFeature.GUEST_TSO4
        | NetFeature.GUEST_TSO6
        | NetFeature.HOST_TSO4
        | NetFeature.HOST_TSO6
        | NetFeature.MRG_RXBUF
        | NetFeature.STATUS
    )

    def __init__(self, switch: Switch, mac: bytes, *, rate: int | None = None) -> None:
        if len(mac) != 6 or mac[0] & 1:
            raise UsageError(f"{mac.hex(':')}: not a MAC address of a single card")
        if rate is not None and rate <= 0:
            raise UsageError(f"a rate of {rate} bytes a second: not positive")
        self.config: NetConfig = NetConfig(mac=mac)
        self.figures = NetFigures()
        self._switch = switch
        self._rate = rate
        self._backlog: deque[Frame] = deque()
        self._held: list[QueueRequest] = []
        self._again: asyncio.TimerHandle | asyncio.Handle | None = None

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._bucket = None if self._rate is None else _Bucket(self._rate, now)
        self._switch.add(self)

    async def close(self) -> None:
        self._switch.remove(self)
        if self._again is not None:
            self._again.cancel()

    def kicked(self, queue: int) -> None:
        if queue == _TX:
            self._transmit()
        else:
            while self._backlog and self._receive(self._backlog[0]):
                self._backlog.popleft()

    def stopped(self, queue: int) -> None:
        if queue == _RX:
            self._held.clear()
            self._backlog.clear()

    @property
    def _header_bytes(self) -> int:
        return 12 if self.negotiated & _LONG_HEADER else 10

    # What the machine sends

    def _transmit(self) -> None:
        """Forward what waits: a batch at a time, and no more than the rate allows."""
        if self._again is not None:
            return
        most = _TOGETHER if self._bucket is None else 1
        for _ in range(_BATCH // most):
            if self._bucket is not None and (wait := self._bucket.wait(self._loop.time())):
                self._again = self._loop.call_later(wait, self._resume)
                return
            requests = self.take(_TX, most)
            if not requests:
                return
            for request in requests:
                self._send(request)
        self._again = self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._again = None
        self._transmit()

    def _send(self, request: QueueRequest) -> None:
        size = request.read_bytes
        frame = parse_frame(request.data(), self._header_bytes) if size <= _LARGEST else None
        request.complete(0)
        if self._bucket is not None:
            self._bucket.take(size, self._loop.time())
        if frame is None:
            self.figures.malformed += 1
            return
        self.figures.sent += 1
        self.figures.sent_bytes += len(frame.data)
        self._switch.forward(self, frame)

    # What it receives

    def deliver(self, frame: Frame) -> None:
        """Port.deliver: at once, or when the driver gives buffers; the last of many are dropped."""
        for piece in suited(frame, self.negotiated):
            if self._backlog or not self._receive(piece):
                if len(self._backlog) < _BACKLOG:
                    self._backlog.append(piece)
                else:
                    self.figures.dropped += 1

    def _receive(self, frame: Frame) -> bool:
        """Put a frame into the driver's buffers; False if there are not enough yet."""
        need = self._header_bytes + len(frame.data)
        merges = self.negotiated & _MERGES
        room = sum(request.room for request in self._held)
        while room < need and (merges or not self._held):
            fresh = self.take(_RX, 1)
            if not fresh:
                return False
            self._held += fresh
            room += fresh[0].room
        held, self._held = self._held, []
        if room < need or held[0].room < self._header_bytes:
            self.figures.dropped += 1
            for request in held:
                request.complete(0)
            return True
        self._fill(held, frame.header(len(held))[: self._header_bytes] + frame.data)
        self.figures.received += 1
        self.figures.received_bytes += len(frame.data)
        return True

    @staticmethod
    def _fill(buffers: list[QueueRequest], packet: bytes) -> None:
        left = memoryview(packet)
        for request in buffers:
            written = request.write(left)
            request.complete(written)
            left = left[written:]
