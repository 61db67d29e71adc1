"""A block device whose sectors come from Python: subclass `Storage` and answer read, write, flush.

Virtual I/O Device 1.2, section 5.2. Requests are taken apart here, however the driver framed them,
and checked against the capacity; what a subclass gets lies within it.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from vfiotool.errors import UsageError
from vfiotool.native.direct import QueueRequest
from vfiotool.virtio.block import BlockFeature
from vfiotool.virtio.device import U8, U16, U32, U64, VirtioConfig, VirtioDevice

SECTOR = 512
_HEADER = struct.Struct("<IIQ")
_HEADER_BYTES = _HEADER.size
_RANGE = struct.Struct("<QII")
_MOST_RANGES = 16
_UNMAP = 1


# The types of requests (section 5.2.6). Plain numbers: to take a member of an IntEnum takes longer
# than the rest of a request's way through here.
_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES = 0, 1, 4, 8, 11, 13


class BlockStatus(IntEnum):
    """How a request ended (section 5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


_OK = BlockStatus.OK
_STATUS = {status: bytes([status]) for status in BlockStatus}


@dataclass
class StorageConfig(VirtioConfig):
    """`struct virtio_blk_config` up to the write-zeroes fields."""

    capacity: U64 = 0
    size_max: U32 = 0
    seg_max: U32 = 254
    cylinders: U16 = 0
    heads: U8 = 0
    sectors: U8 = 0
    blk_size: U32 = SECTOR
    physical_block_exp: U8 = 0
    alignment_offset: U8 = 0
    min_io_size: U16 = 0
    opt_io_size: U32 = 0
    writeback: U8 = 1
    unused: U8 = 0
    num_queues: U16 = 1
    max_discard_sectors: U32 = 1 << 21
    max_discard_seg: U32 = _MOST_RANGES
    discard_sector_alignment: U32 = 1
    max_write_zeroes_sectors: U32 = 1 << 21
    max_write_zeroes_seg: U32 = _MOST_RANGES
    write_zeroes_may_unmap: U8 = 1


class Storage(VirtioDevice):
    """A disk of `size` bytes. Subclasses answer `read`, `write` and, where it means something to
    them, `flush` and `clear`; each may be `async def`. An exception ends the request with an I/O
    error; OSError is not reported, as a disk's own errors are the guest's business.

    Requests of one queue are independent (the driver waits where order matters to it), so
    coroutines of a batch run side by side and batches do not wait for one another.
    """

    id = 2
    ordered: ClassVar[bool] = False

    def __init__(
        self, size: int, *, read_only: bool = False, serial: str = "", queues: int = 1
    ) -> None:
        if size <= 0 or size % SECTOR:
            raise UsageError(f"a disk of {size} bytes: not a positive multiple of {SECTOR}")
        if len(serial.encode()) > 20:
            raise UsageError(f"serial {serial!r}: more than 20 bytes")
        self.size = size
        self.read_only = read_only
        self.serial = serial.encode()
        self.queues = queues
        self.config: StorageConfig = StorageConfig(capacity=size // SECTOR, num_queues=queues)
        offered = BlockFeature.SEG_MAX | BlockFeature.BLK_SIZE | BlockFeature.FLUSH
        offered |= BlockFeature.MQ
        if read_only:
            offered |= BlockFeature.RO
        else:
            offered |= BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES
        self.features = int(offered)

    # What a subclass answers

    def read(self, offset: int, into: memoryview) -> Awaitable[None] | None:
        """Fill `into` with the bytes at `offset`."""
        raise NotImplementedError

    def write(self, offset: int, data: memoryview) -> Awaitable[None] | None:
        """Store `data` at `offset`. The guest may change it meanwhile: look at it once."""
        raise NotImplementedError

    def flush(self) -> Awaitable[None] | None:
        """Return when all that was answered before is on stable storage."""
        return None

    def clear(self, offset: int, length: int, *, may_unmap: bool) -> Awaitable[None] | None:
        """Make `length` bytes read as zeros; the default writes them."""
        step = 1 << 20
        zeros = memoryview(bytes(min(length, step)))
        waits = []
        for at in range(offset, offset + length, step):
            size = min(step, offset + length - at)
            if (answer := self.write(at, zeros[:size])) is not None:
                waits.append(answer)
        return _all(waits) if waits else None

    def resize(self, size: int) -> None:
        """Offer another capacity from now on; the driver is told."""
        if size <= 0 or size % SECTOR:
            raise UsageError(f"a disk of {size} bytes: not a positive multiple of {SECTOR}")
        self.size = size
        self.config.capacity = size // SECTOR

    # Of VirtioDevice

    def handle(self, queue: int, requests: list[QueueRequest]) -> Awaitable[None] | None:
        waits: list[Awaitable[None]] = []
        fault: Exception | None = None
        for request in requests:
            try:
                answer = self._answer(request)
            except OSError:
                answer = BlockStatus.IOERR
            except Exception as error:
                # Of this request alone; it is reported when the others have been answered.
                fault, answer = fault or error, BlockStatus.IOERR
            if isinstance(answer, BlockStatus):
                self._end(request, answer)
            else:
                waits.append(self._later(request, answer))
        try:
            if fault is not None and not waits:
                raise fault
            if fault is not None:
                waits.append(_failed(fault))
        finally:
            # A frame that an error's traceback has and that has the error keeps the requests.
            fault = None
        return _all(waits) if waits else None

    def failed(self, request: QueueRequest) -> None:
        self._end(request, BlockStatus.IOERR)

    async def _later(self, request: QueueRequest, answer: Awaitable[None]) -> None:
        try:
            await answer
        except OSError:
            self._end(request, BlockStatus.IOERR)
        except BaseException:
            self._end(request, BlockStatus.IOERR)
            raise
        else:
            self._end(request, BlockStatus.OK)

    def _end(self, request: QueueRequest, status: BlockStatus) -> None:
        if request.is_complete:
            return
        room = request.room
        if room:
            request.write(_STATUS[status], room - 1)
        request.complete(room)

    def _answer(self, request: QueueRequest) -> BlockStatus | Awaitable[None]:
        """The status, or what to wait for until it is OK."""
        length = request.room - 1
        rest = request.read_bytes - _HEADER_BYTES
        if length < 0 or rest < 0:
            raise UsageError("a request without a header or a status")
        kind, _, sector = _HEADER.unpack(request.data(_HEADER_BYTES))
        if kind == _IN:
            views = request.writable_part(0, length)
            return self._move(self.read, sector * SECTOR, length, views)
        if kind == _OUT:
            if self.read_only:
                return BlockStatus.IOERR
            views = request.readable_part(_HEADER_BYTES)
            return self._move(self.write, sector * SECTOR, rest, views)
        return self._control(kind, request)

    def _move(
        self,
        move: Callable[[int, memoryview], Awaitable[None] | None],
        offset: int,
        length: int,
        views: list[memoryview],
    ) -> BlockStatus | Awaitable[None]:
        if not length or length % SECTOR or offset + length > self.size:
            return BlockStatus.IOERR
        waits = []
        for view in views:
            if (answer := move(offset, view)) is not None:
                waits.append(answer)
            offset += len(view)
        return _all(waits) if waits else _OK

    def _control(self, kind: int, request: QueueRequest) -> BlockStatus | Awaitable[None]:
        if kind == _FLUSH:
            return self.flush() or BlockStatus.OK
        if kind == _GET_ID:
            request.write(self.serial.ljust(20, b"\0")[: request.room - 1])
            return BlockStatus.OK
        if kind in (_DISCARD, _WRITE_ZEROES):
            ranges = request.data(_HEADER_BYTES + (_MOST_RANGES + 1) * _RANGE.size)
            return self._clear(ranges[_HEADER_BYTES:], discard=kind == _DISCARD)
        return BlockStatus.UNSUPP

    def _clear(self, ranges: bytes, *, discard: bool) -> BlockStatus | Awaitable[None]:
        if not ranges or len(ranges) % _RANGE.size or len(ranges) > _MOST_RANGES * _RANGE.size:
            return BlockStatus.IOERR
        if self.read_only:
            return BlockStatus.IOERR
        waits = []
        for sector, count, flags in _RANGE.iter_unpack(ranges):
            if flags & ~(0 if discard else _UNMAP):
                return BlockStatus.UNSUPP
            if (sector + count) * SECTOR > self.size or count > self.config.max_discard_sectors:
                return BlockStatus.IOERR
            may_unmap = discard or bool(flags & _UNMAP)
            answer = self.clear(sector * SECTOR, count * SECTOR, may_unmap=may_unmap)
            if answer is not None:
                waits.append(answer)
        return _all(waits) if waits else BlockStatus.OK


async def _all(waits: list[Awaitable[None]]) -> None:
    """Wait for all, and raise the first error when they have all ended."""
    ended = await asyncio.gather(*waits, return_exceptions=True)
    faults = [result for result in ended if isinstance(result, BaseException)]
    del ended
    try:
        if faults:
            raise faults[0]
    finally:
        faults.clear()


async def _failed(error: Exception) -> None:
    try:
        raise error
    finally:
        del error


class MemoryStorage(Storage):
    """A disk in this process's memory."""

    def __init__(
        self, size: int = 64 << 20, *, read_only: bool = False, serial: str = "", queues: int = 1
    ) -> None:
        super().__init__(size, read_only=read_only, serial=serial, queues=queues)
        self._bytes = memoryview(bytearray(size))

    def read(self, offset: int, into: memoryview) -> None:
        into[:] = self._bytes[offset : offset + len(into)]

    def write(self, offset: int, data: memoryview) -> None:
        self._bytes[offset : offset + len(data)] = data
