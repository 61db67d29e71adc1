"""A model's PCI configuration space: bytes, which of their bits can be written, and what a write
means.

PCI Local Bus Specification 3.0, 6.1 (header), 6.2.5 (base addresses), 6.7 (capabilities), 6.8 (MSI,
MSI-X); PCI Power Management 1.2, 3.2; PCI Express Base 5.0, 7.5.3; Advanced Capabilities for
Conventional PCI (AF).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vfiotool.errors import UsageError
from vfiotool.models.bar import BarSpec

COMMAND, STATUS, BARS, ROM, CAPABILITIES = 0x04, 0x06, 0x10, 0x30, 0x34
COMMAND_PORTS, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_NO_INTX = 1, 1 << 1, 1 << 2, 1 << 10
_COMMAND_MASK = 0x0547
_HAS_LIST = 1 << 4
_HEADER_BYTES = 64
PM, MSI, EXPRESS, MSIX, AF = 0x01, 0x05, 0x10, 0x11, 0x13
# No more capabilities than fit.
_HOPS = 48
_D3HOT = 3


class ModelConfig:
    """`data` is what reads give; `mask` has the bits that writes change. `size` is 256 or 4096."""

    def __init__(self, data: bytes) -> None:
        if len(data) not in (256, 4096):
            raise UsageError(f"a configuration space of {len(data)} bytes, not 256 or 4096")
        self.data = bytearray(data)
        self.mask = bytearray(len(data))
        self._clear = bytearray(len(data))
        self.capabilities: dict[int, int] = {}
        self._walk()
        self._open_header()
        self._open_capabilities()
        self._first = bytes(self.data)

    @classmethod
    def of(
        cls,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        bars: Sequence[BarSpec] = (),
        intx: bool = False,
        msi: int = 0,
        msix: tuple[int, int, int] | None = None,
        express: bool = True,
        resets: bool = True,
    ) -> ModelConfig:
        """The configuration space of a card with these features. `msi` is how many vectors, `msix`
        how many, in which BAR and where the table lies there (the pending bits are behind it);
        with `resets` it has a function level reset."""
        data = bytearray(4096 if express else 256)
        struct.pack_into("<HHHHI", data, 0, vendor, device, 0, 0, class_code << 8 | revision)
        struct.pack_into("<HH", data, 0x2C, *subsystem)
        data[0x3D] = int(intx)
        for bar in bars:
            struct.pack_into("<I", data, BARS + 4 * bar.index, bar.config_flags)
        chain = [(PM, struct.pack("<HH2x", 0x0003, 0x0008))]
        if msi:
            chain.append((MSI, struct.pack("<HQH2x", 0x0080 | msi.bit_length() - 1 << 1, 0, 0)))
        if msix is not None:
            count, bar_index, offset = msix
            pending = _pending(count, offset, next(one for one in bars if one.index == bar_index))
            where = (offset | bar_index, pending | bar_index)
            chain.append((MSIX, struct.pack("<HII", count - 1, *where)))
        if express:
            device_caps = 0x8000 | (1 << 28 if resets else 0)
            body = struct.pack("<HIHH", 0x0002, device_caps, 0, 0) + struct.pack(
                "<IHH", 0x411, 0, 0x11
            )
            chain.append((EXPRESS, body.ljust(58, b"\0")))
        elif resets:
            chain.append((AF, struct.pack("<BBBB", 6, 3, 0, 0)))
        _chain(data, chain)
        made = cls(bytes(data))
        for bar in bars:
            made.open_bar(bar)
        return made

    def _walk(self) -> None:
        if not self.data[STATUS] & _HAS_LIST:
            return
        place = self.data[CAPABILITIES] & ~3
        for _ in range(_HOPS):
            if not _HEADER_BYTES <= place <= 252:
                return
            self.capabilities.setdefault(self.data[place], place)
            place = self.data[place + 1] & ~3

    def _open(self, offset: int, mask: int, width: int) -> None:
        if offset + width <= len(self.mask):
            self.mask[offset : offset + width] = mask.to_bytes(width, "little")

    def _open_header(self) -> None:
        self._open(COMMAND, _COMMAND_MASK, 2)
        self._open(0x0C, 0xFF, 1)
        self._open(0x3C, 0xFF, 1)
        # Errors seen are cleared by writing ones.
        self._clear[STATUS + 1] = 0xF9

    def _open_capabilities(self) -> None:
        """What can be written in the capabilities that mean something to a model."""
        at = self.capabilities
        if PM in at:
            self._open(at[PM] + 4, 0x0103, 2)
        if MSI in at:
            place = at[MSI]
            control = int.from_bytes(self.data[place + 2 : place + 4], "little")
            self._open(place + 2, 0x0071, 2)
            wide = 8 if control & 0x80 else 4
            self._open(place + 4, 0xFFFFFFFC, 4)
            if wide == 8:
                self._open(place + 8, 0xFFFFFFFF, 4)
            self._open(place + 4 + wide, 0xFFFF, 2)
            if control & 0x100:
                self._open(place + 8 + wide, 0xFFFFFFFF, 4)
        if MSIX in at:
            self._open(at[MSIX] + 2, 0xC000, 2)
        if EXPRESS in at:
            self._open(at[EXPRESS] + 8, 0x7FFF, 2)
            self._clear[at[EXPRESS] + 10] = 0x0F
            self._open(at[EXPRESS] + 16, 0x0FFB, 2)
            self._open(at[EXPRESS] + 40, 0xFFFF, 2)

    def open_bar(self, bar: BarSpec) -> None:
        """Let the base address of a BAR be written, as its size allows."""
        mask = -bar.size & ((1 << 64) - 1 if bar.wide else 0xFFFFFFFF)
        place = BARS + 4 * bar.index
        self._open(place, mask & ~0xF if not bar.ports else mask & ~3, 8 if bar.wide else 4)
        self._first = bytes(self.data)

    def reset(self) -> None:
        """As at power on, but for what the system's firmware wrote into the bases and the line:
        those a reset of the function clears too, and whoever resets restores them."""
        self.data[:] = self._first

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self.data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> bool:
        """Store what can be stored. True if the write asked for a reset of the function."""
        for at, value in enumerate(data, offset):
            mask = self.mask[at]
            self.data[at] = (self.data[at] & ~mask | value & mask) & ~(value & self._clear[at])
        return self._asks_reset(offset, data)

    def _asks_reset(self, offset: int, data: bytes) -> bool:
        for capability, place, bit in ((EXPRESS, 9, 0x80), (AF, 4, 0x01)):
            if capability in self.capabilities:
                at = self.capabilities[capability] + place - offset
                if 0 <= at < len(data) and data[at] & bit and self.resets_by(capability):
                    return True
        return False

    def resets_by(self, capability: int) -> bool:
        """Whether this capability says that the function can be reset by it."""
        place = self.capabilities.get(capability)
        if place is None:
            return False
        if capability == EXPRESS:
            return bool(self.data[place + 7] & 0x10)
        return capability == AF and bool(self.data[place + 3] & 2)

    @property
    def has_reset(self) -> bool:
        """Whether there is a reset of the function that a client can ask for: by PCI Express, AF,
        or by power management without No_Soft_Reset."""
        place = self.capabilities.get(PM)
        soft = place is not None and not self.data[place + 4] & 8
        return self.resets_by(EXPRESS) or self.resets_by(AF) or soft

    @property
    def command(self) -> int:
        return int.from_bytes(self.data[COMMAND : COMMAND + 2], "little")

    @property
    def sleeps(self) -> bool:
        """Whether it is in D3hot."""
        place = self.capabilities.get(PM)
        return place is not None and self.data[place + 4] & 3 == _D3HOT


def _pending(count: int, offset: int, bar: BarSpec) -> int:
    """Where the pending bits of a table lie in its BAR: in a page of their own where there is one,
    else right behind the table. Raises UsageError where the BAR is too small for both."""
    needed = -(-count // 64) * 8
    for pending in (offset + -(-count * 16 // 4096) * 4096, offset + 16 * count):
        if pending + needed <= bar.size:
            return pending
    raise UsageError(f"BAR {bar.index} has no room for {count} MSI-X vectors at {offset:#x}")


def _chain(data: bytearray, chain: list[tuple[int, bytes]]) -> None:
    """Put capabilities one behind the other from 0x40 on."""
    place = _HEADER_BYTES
    data[CAPABILITIES] = place
    data[STATUS] |= _HAS_LIST
    for number, (kind, body) in enumerate(chain):
        following = place + -(-(2 + len(body)) // 4) * 4
        last = number == len(chain) - 1
        data[place : place + 2] = bytes((kind, 0 if last else following))
        data[place + 2 : place + 2 + len(body)] = body
        place = following
