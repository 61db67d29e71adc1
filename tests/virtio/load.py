"""Load over our own front end: many tenants kept busy by one thread, and what each got done."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.virtio.frontend import DATA, SIZE, T_IN, T_OUT, Frontend

STRIDE = 8192
# Two descriptors a request: header and data together, then the status (or data and status).
DEPTH = SIZE // 2


@dataclass
class Tenant:
    """A front end that always has `depth` requests of `size` bytes in flight."""

    front: Frontend
    depth: int = DEPTH
    size: int = 4096
    write: bool = False
    done: int = 0
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = [2 * number for number in range(self.depth)]
        for head in self.free:
            at = DATA + head // 2 * STRIDE
            self.front.memory[at : at + 16] = struct.pack("<IIQ", self.kind, 0, head * 8)
            chain = [(at, 16, False), (at + 16, self.size + 1, True)]
            if self.write:
                chain = [(at, 16 + self.size, False), (at + 16 + self.size, 1, True)]
            self.front.put(self.front.rings[0], head, chain)

    @property
    def kind(self) -> int:
        return T_OUT if self.write else T_IN

    def turn(self) -> None:
        """Take what is done and ask for as much again."""
        ring, memory = self.front.rings[0], self.front.memory
        used = self.front.u16(ring.at + 0x2002)
        while ring.seen != used:
            place = ring.at + 0x2004 + 8 * (ring.seen % SIZE)
            self.free.append(struct.unpack_from("<I", memory, place)[0])
            ring.seen = (ring.seen + 1) & 0xFFFF
            self.done += 1
        if self.free:
            while self.free:
                self.front.add(ring, self.free.pop(), kick=not self.free)


def busy(tenants: Iterable[Tenant], seconds: float, between: Callable[[], object] = int) -> float:
    """Keep all busy for a while, and do something between; returns the seconds that it took."""
    everybody = list(tenants)
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        for tenant in everybody:
            tenant.turn()
        between()
    return now


def measured(tenants: Iterable[Tenant], seconds: float) -> list[float]:
    """Requests a second of each, after what had been saved up is used."""
    everybody = list(tenants)
    busy(everybody, 0.2)
    before = [tenant.done for tenant in everybody]
    took = busy(everybody, seconds)
    return [(t.done - was) / took for t, was in zip(everybody, before, strict=True)]
