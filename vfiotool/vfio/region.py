"""A device's regions: exact-width access through the device's file, and mappings of them.

`Region` works for every region, I/O ports and mediated devices too, at the price of a system call
an access. `Mapping` is the fast way to memory BARs: its accessors are C methods that do one
volatile load or store each, check bounds, alignment and life, and give errors instead of faults.
Offsets are bytes from the region's start; values are unsigned; PCI's byte order is little-endian.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from vfiotool.errors import TimedOut, UsageError, VfiotoolError
from vfiotool.native import library as native
from vfiotool.vfio.caps import Area, RegionInfo
from vfiotool.vfio.opened import OpenDevice, refuse_pickle

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Registers(Protocol):
    """What `Region` and `Mapping` have in common: enough to drive a device's registers."""

    def read8(self, offset: int, /) -> int: ...
    def read16(self, offset: int, /) -> int: ...
    def read32(self, offset: int, /) -> int: ...
    def read64(self, offset: int, /) -> int: ...
    def write8(self, offset: int, value: int, /) -> None: ...
    def write16(self, offset: int, value: int, /) -> None: ...
    def write32(self, offset: int, value: int, /) -> None: ...
    def write64(self, offset: int, value: int, /) -> None: ...
    def poll(
        self,
        offset: int,
        mask: int,
        wanted: int,
        timeout_s: float | None,
        *,
        width: int = 4,
    ) -> int: ...


def _check_mask(mask: int, wanted: int, width: int) -> None:
    if width not in _FORMATS:
        raise UsageError(f"an access of {width} bytes: a register has 1, 2, 4 or 8")
    if not 0 <= mask < 1 << 8 * width or not 0 <= wanted < 1 << 8 * width:
        raise UsageError(f"mask {mask:#x} or value {wanted:#x} does not fit {width} bytes")


def timed_out(what: str, value: int, timeout_s: float | None) -> VfiotoolError:
    """The error of a register that did not come to the value waited for."""
    seconds = native.nanoseconds(timeout_s) / 1e9
    return TimedOut(
        f"{what} did not come to the value waited for in {seconds:g} s; it is {value:#x}",
        errno_name="ETIMEDOUT",
    )


class Region:
    """One region of a device, reached through its file. Errors: UsageError for what the region
    does not hold or allow, KernelError (EIO) for memory or I/O decode that is off."""

    def __init__(self, device: OpenDevice, info: RegionInfo) -> None:
        self.device = device
        self.info = info
        self.trace = device.trace

    def __repr__(self) -> str:
        state = ", closed" if self.device.closed else ""
        return f"<Region {self.info.index} of {self.device.name}, {self.info.size} bytes{state}>"

    @property
    def index(self) -> int:
        return self.info.index

    @property
    def size(self) -> int:
        return self.info.size

    def _position(self, offset: int, length: int, write: bool) -> int:
        info = self.info
        if offset < 0 or length < 0 or offset + length > info.size:
            raise UsageError(
                f"region {info.index} of {self.device.name} holds {info.size} bytes: "
                f"{length} at {offset:#x} lie outside it"
            )
        if not (info.writable if write else info.readable):
            raise UsageError(
                f"region {info.index} of {self.device.name} cannot be "
                f"{'written' if write else 'read'}"
            )
        return info.position + offset

    def _what(self, offset: int, width: int) -> str:
        return f"{self.device.name} region {self.info.index} at {offset:#x}, {width} bytes"

    def read(self, offset: int, width: int) -> int:
        """The register of `width` (1, 2, 4, 8) bytes at `offset`, in one access.

        vfio-pci of kernels before 6.10 makes two accesses of 4 bytes out of one of 8 here (it had
        no 64-bit accessors); a `Mapping` never does.
        """
        if width not in _FORMATS or operator.index(offset) % width:
            raise UsageError(f"an access of {width} bytes at {offset:#x} is not aligned to itself")
        position = self._position(offset, width, write=False)
        value = self.device.calls.read(position, width, lambda: self._what(offset, width))
        if self.trace is not None:
            self.trace.record(
                "read", region=self.info.index, offset=offset, width=width, value=value
            )
        return value

    def write(self, offset: int, value: int, width: int) -> None:
        """Store `value` into the register of `width` bytes at `offset`; see `read`."""
        if width not in _FORMATS or operator.index(offset) % width:
            raise UsageError(f"an access of {width} bytes at {offset:#x} is not aligned to itself")
        if not 0 <= value < 1 << 8 * width:
            raise UsageError(f"{value:#x} does not fit {width} bytes")
        position = self._position(offset, width, write=True)
        self.device.calls.write(position, width, value, lambda: self._what(offset, width))
        if self.trace is not None:
            self.trace.record(
                "write", region=self.info.index, offset=offset, width=width, value=value
            )

    def read8(self, offset: int, /) -> int:
        return self.read(offset, 1)

    def read16(self, offset: int, /) -> int:
        return self.read(offset, 2)

    def read32(self, offset: int, /) -> int:
        return self.read(offset, 4)

    def read64(self, offset: int, /) -> int:
        return self.read(offset, 8)

    def write8(self, offset: int, value: int, /) -> None:
        self.write(offset, value, 1)

    def write16(self, offset: int, value: int, /) -> None:
        self.write(offset, value, 2)

    def write32(self, offset: int, value: int, /) -> None:
        self.write(offset, value, 4)

    def write64(self, offset: int, value: int, /) -> None:
        self.write(offset, value, 8)

    def read_bytes(self, offset: int, length: int) -> bytes:
        """`length` bytes, in whatever widths the kernel chooses: for memory, not for registers."""
        position = self._position(offset, length, write=False)
        buffer = bytearray(length)
        if length:
            self.device.calls.copy_out(position, buffer, self._what(offset, length))
        if self.trace is not None:
            self.trace.record("copy-out", region=self.info.index, offset=offset, length=length)
        return bytes(buffer)

    def write_bytes(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """The counterpart of `read_bytes`."""
        length = memoryview(data).nbytes
        position = self._position(offset, length, write=True)
        if length:
            self.device.calls.copy_in(position, data, self._what(offset, length))
        if self.trace is not None:
            self.trace.record("copy-in", region=self.info.index, offset=offset, length=length)

    def poll(
        self,
        offset: int,
        mask: int,
        wanted: int,
        timeout_s: float | None,
        *,
        width: int = 4,
    ) -> int:
        """Read the register until `value & mask == wanted`; returns the value. Raises
        TimedOut after `timeout_s` seconds; None and inf are no limit, less than 0
        looks once."""
        _check_mask(mask, wanted, width)
        end = time.monotonic() + native.nanoseconds(timeout_s) / 1e9
        pause = 1e-5
        while True:
            value = self.read(offset, width)
            if value & mask == wanted:
                return value
            if time.monotonic() >= end:
                raise timed_out(self._what(offset, width), value, timeout_s)
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)

    def access(self) -> Registers:
        """The fastest way to all of its registers: a mapping where the whole region can be mapped,
        otherwise the region itself (ports, mediated devices, most models over vfio-user)."""
        whole = Area(0, self.info.size)
        return self.map(0, self.info.size) if whole in self.info.areas else self

    def map(
        self, offset: int | None = None, size: int | None = None, *, alignment: int = 0
    ) -> Mapping:
        """Map `size` bytes from `offset` on; without them the first area that can be mapped.

        `alignment` (a power of two) aligns the mapping's address with the BAR's, so that the
        kernel can use large pages: give 2 MiB or 1 GiB for BARs at least that large. Raises
        UsageError where the region, or this part of it, cannot be mapped (`region.info.areas`
        tells which can), and where the device cannot be reached now (memory decode is off, it
        sleeps, it is being reset).
        """
        info = self.info
        if not info.areas:
            raise UsageError(
                f"region {info.index} of {self.device.name} cannot be mapped",
                hint="use its read and write methods instead of a mapping",
            )
        area = _area(info, offset, size)
        access = native.WINDOW_READ * info.readable | native.WINDOW_WRITE * info.writable
        kind = Mapping if self.trace is None else TracedMapping
        reach = self.device.reach
        with reach.lock:
            self.device.refuse_closed()
            reach.refresh()
            reach.refuse()
            return kind(self, area, access, alignment)


def _area(info: RegionInfo, offset: int | None, size: int | None) -> Area:
    if offset is None and size is None:
        return info.areas[0]
    start = offset or 0
    for area in info.areas:
        end = area.offset + area.size
        if area.offset <= start and start + (size or 1) <= end:
            return Area(start, size or end - start)
    listed = ", ".join(f"{area.offset:#x}+{area.size:#x}" for area in info.areas)
    raise UsageError(f"region {info.index} can be mapped at {listed} only, not at {start:#x}")


class Mapping(native.Window):
    """A mapped part of a region.

    `read8` … `write64`, `address`, `pin`, `unpin`, `start`, `size` and `closed` are C
    (`cext/python/window_type.c`). A read is followed by a read barrier, a write preceded by a write
    barrier. Each refused access raises UsageError: outside the mapping, not aligned, value too
    large, after `close`, in a child process, and while the device cannot be reached (memory decode
    off, asleep, being reset); `unreachable` is the reason then.
    """

    def __init__(self, region: Region, area: Area, access: int, alignment: int) -> None:
        self.region = region
        self.description = f"region {region.info.index} of {region.device.name}"
        try:
            with region.device.calls.mappable(region.info.position) as (fd, base):
                position = base + area.offset
                super().__init__(fd, position, area.offset, area.size, access, alignment)
        except OSError as error:
            raise native.failed(
                -(error.errno or 0), f"map {self.description}", device=region.device.name
            ) from error
        region.device.reach.add(self)

    __reduce_ex__ = refuse_pickle

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.start:#x}+{self.size:#x}"
        if not self.closed and self.unreachable:
            state += f", refused: {self.unreachable}"
        return f"<Mapping of {self.description}, {state}>"

    def read_into(self, offset: int, buffer: Any, *, width: int = 4, fifo: bool = False) -> None:
        """Fill a writable buffer with registers of `width` bytes from `offset` on, in order; with
        `fifo` from the one register at `offset`, again and again."""
        self._read_into(offset, buffer, width, fifo)

    def write_from(self, offset: int, buffer: Any, *, width: int = 4, fifo: bool = False) -> None:
        """The counterpart of `read_into`."""
        self._write_from(offset, buffer, width, fifo)

    def read_many(self, offset: int, count: int, *, width: int = 4) -> memoryview[int]:
        """`count` registers of `width` bytes in a row, as a memoryview of numbers."""
        buffer = bytearray(max(count, 0) * width)
        self._read_into(offset, buffer, width, False)
        return memoryview(buffer).cast(_FORMATS[width])

    def read32_many(self, offset: int, count: int) -> memoryview[int]:
        """`count` 32-bit registers in a row."""
        return self.read_many(offset, count)

    def poll(
        self,
        offset: int,
        mask: int,
        wanted: int,
        timeout_s: float | None,
        *,
        width: int = 4,
    ) -> int:
        """Read the register until `value & mask == wanted`; returns the value.

        Runs in C without the interpreter's lock. Raises TimedOut after `timeout_s`
        seconds (None and inf are no limit, less than 0 looks once), UsageError when the mapping is
        closed or the device cannot be reached any more meanwhile.
        """
        _check_mask(mask, wanted, width)
        timeout_ns = native.nanoseconds(timeout_s)
        found, value = self._poll_until(offset, width, mask, wanted, timeout_ns)
        if not found:
            raise timed_out(f"{self.description} at {offset:#x}", value, timeout_s)
        return value

    def check(self) -> None:
        """Ask the device whether it can be reached now, and refuse accesses until it can."""
        self.region.device.refuse_closed()
        self.region.device.reach.refresh()

    def close(self, *, even_pinned: bool = False) -> None:
        """Unmap; polls in other threads end with UsageError. Closing twice is nothing. Raises
        UsageError while C keeps an address of it (`pin`), unless `even_pinned`: then that C is
        refused from now on."""
        self._close(even_pinned)
        self.region.device.reach.discard(self)

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Config(Region):
    """PCI configuration space. What a write means for mapped accesses is seen to: they are refused
    while the device cannot be reached."""

    def write(self, offset: int, value: int, width: int) -> None:
        """As `Region.write`."""
        self.device.refuse_closed()
        data = (value & (1 << 64) - 1).to_bytes(8, "little")[: width if width in _FORMATS else 0]
        with self.device.reach.writing(offset, data):
            super().write(offset, value, width)

    def write_bytes(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """As `Region.write_bytes`."""
        self.device.refuse_closed()
        copied = bytes(data)
        with self.device.reach.writing(offset, copied):
            super().write_bytes(offset, copied)


def _traced_read(width: int) -> Callable[[TracedMapping, int], int]:
    plain = getattr(Mapping, f"read{8 * width}")

    def read(self: TracedMapping, offset: int, /) -> int:
        value: int = plain(self, offset)
        self.trace.record("read", region=self.region.index, offset=offset, width=width, value=value)
        return value

    return read


def _traced_write(width: int) -> Callable[[TracedMapping, int, int], None]:
    plain = getattr(Mapping, f"write{8 * width}")

    def write(self: TracedMapping, offset: int, value: int, /) -> None:
        plain(self, offset, value)
        self.trace.record(
            "write", region=self.region.index, offset=offset, width=width, value=value
        )

    return write


class TracedMapping(Mapping):
    """A mapping that records each access; taken when the device was opened with a trace."""

    def __init__(self, region: Region, area: Area, access: int, alignment: int) -> None:
        super().__init__(region, area, access, alignment)
        assert region.trace is not None
        self.trace = region.trace

    read8 = _traced_read(1)
    read16 = _traced_read(2)
    read32 = _traced_read(4)
    read64 = _traced_read(8)
    write8 = _traced_write(1)
    write16 = _traced_write(2)
    write32 = _traced_write(4)
    write64 = _traced_write(8)

    def _read_into(self, offset: int, buffer: Any, width: int, fifo: bool, /) -> None:
        super()._read_into(offset, buffer, width, fifo)
        self._bulk("copy-out", offset, buffer)

    def _write_from(self, offset: int, buffer: Any, width: int, fifo: bool, /) -> None:
        super()._write_from(offset, buffer, width, fifo)
        self._bulk("copy-in", offset, buffer)

    def _bulk(self, event: str, offset: int, buffer: Any) -> None:
        length = memoryview(buffer).nbytes
        self.trace.record(event, region=self.region.index, offset=offset, length=length)

    def poll(
        self,
        offset: int,
        mask: int,
        wanted: int,
        timeout_s: float | None,
        *,
        width: int = 4,
    ) -> int:
        value = super().poll(offset, mask, wanted, timeout_s, width=width)
        self.trace.record(
            "poll",
            region=self.region.index,
            offset=offset,
            width=width,
            mask=mask,
            wanted=wanted,
            value=value,
        )
        return value
