"""The block device: what a disk offers to its driver, and images opened safely.

Virtual I/O Device 1.2, section 5.2. Images are raw, never probed: a guest that writes another
format's header into its disk must not have it interpreted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from enum import IntFlag
from typing import TYPE_CHECKING

from vfiotool.errors import Refused, UsageError, from_oserror
from vfiotool.native.limits import LimitShare
from vfiotool.native.virtqueue import (
    DiskFigures,
    MemoryMap,
    MemoryRegion,
    RawDisk,
    ServedQueue,
    Worker,
)
from vfiotool.virtio.served import QueueStart, VirtioFeature

if TYPE_CHECKING:
    from vfiotool.virtio.nvme import NvmeRange

SECTOR = 512
MOST_SEGMENTS = 254
MOST_RANGES = 16
_LARGEST_PHYSICAL = 65536
_MOST_RANGE_SECTORS = 1 << 21
_LARGEST = 1 << 62
# Of one NVMe command.
_MOST_BLOCKS = 65536
_CONFIG = struct.Struct("<QII HBB I BBHI BBH II I II B3x")
# QEMU's locks on an image (block/file-posix.c): a byte for each permission that is used, and one
# for each that is not shared. Bits: consistent read 0, write 1, write unchanged 2, resize 3.
_LOCK_USED, _LOCK_UNSHARED = 100, 200
_READER, _WRITER, _NOT_SHARED = (0,), (0, 1), (1, 3)
LOCKS = ("always", "running")
_FLOCK = struct.Struct("hhqqi4x")
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
# F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW (linux/fcntl.h).
_F_ADD_SEALS, _F_GET_SEALS, _SEALS = 1033, 1034, 7


class BlockFeature(IntFlag):
    """Feature bits of section 5.2.3."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


@dataclass(frozen=True)
class DiskSettings:
    """A disk as it is asked for. Bytes; without `path` and `nvme` it is a disk in memory of `size`
    bytes."""

    path: str | None = None
    size: int | None = None
    offset: int = 0
    read_only: bool = False
    serial: str = ""
    block_size: int = SECTOR
    physical_block_size: int = 0
    """What writes should come in whole multiples of; 0: the block size."""
    queues: int = 1
    direct: bool = False
    """Past the page cache (O_DIRECT), where a request is aligned."""
    nvme: str | None = None
    """`ADDRESS[/NSID]`: a namespace of an NVMe controller on a VFIO driver, or part of it."""
    lock: str = "always"
    """When the image is locked: `always`, or `running`, while a machine runs on it: two servers may
    have it open then, and the machine moves from one to the other."""


def check(settings: DiskSettings) -> None:
    """Raise UsageError for what no disk can be, naming the option."""
    size = settings.block_size
    if not SECTOR <= size <= 4096 or size & (size - 1):
        raise UsageError(f"--block-size {size}: not a power of two from 512 to 4096")
    physical = settings.physical_block_size
    if physical and not (size <= physical <= _LARGEST_PHYSICAL and physical & (physical - 1) == 0):
        raise UsageError(
            f"--physical-block-size {physical}: not a power of two from the block size {size} to"
            f" {_LARGEST_PHYSICAL}"
        )
    if not 1 <= settings.queues <= 256:
        raise UsageError(f"--queues {settings.queues}: not from 1 to 256")
    if settings.offset < 0 or settings.offset % size:
        raise UsageError(f"--offset {settings.offset}: not a multiple of the block size {size}")
    if max(settings.offset, settings.size or 0) > _LARGEST:
        raise UsageError(f"a disk reaches to {_LARGEST} bytes at most, by its offset and size each")
    if settings.size is not None and (settings.size <= 0 or settings.size % size):
        raise UsageError(f"--size {settings.size}: not a multiple of the block size {size}")
    if settings.path is None and settings.nvme is None and settings.size is None:
        raise UsageError("a disk in memory has no size", hint="give it: --ram 1G")
    if settings.lock not in LOCKS:
        raise UsageError(f"--lock {settings.lock[:20]!r}: not one of {', '.join(LOCKS)}")
    if settings.direct and settings.path is None:
        raise UsageError("--direct is of a file alone")
    if len(settings.serial.encode()) > 20 or not settings.serial.isprintable():
        raise UsageError(f"--serial {settings.serial!r}: not at most 20 printable bytes")


class BlockDisk:
    """An open disk that any number of queues serve. Close it when none does any more. `share` is
    what they may do together.

    Opening raises UsageError, NotPermitted or KernelError, naming the image, and Refused if another
    program (or another export) has the image locked; nothing stays open then.
    """

    def __init__(
        self, settings: DiskSettings, image: int | None = None, *, lasting: bool = False
    ) -> None:
        """`image` is the image as another process opened and locked it; it is ours after that.
        `lasting` has a disk in memory lie where another process can take it over."""
        self.settings = settings
        self.carried: DiskFigures | None = None
        self._running = 0
        with ExitStack() as stack:
            if image is not None:
                stack.callback(os.close, image)
            check(settings)
            descriptor, direct, available = None, None, settings.size or 0
            self.range = _range(settings)
            if self.range is not None:
                stack.callback(self.range.close)
                available = self.range.available
            elif settings.path is not None:
                if image is None:
                    descriptor = _open(settings)
                    stack.callback(os.close, descriptor)
                else:
                    descriptor = image
                    _check_image(descriptor, settings)
                if settings.lock == "always":
                    lock(descriptor, settings.path, read_only=settings.read_only)
                available = _available(descriptor, settings)
                if settings.direct:
                    direct = _open_direct(settings)
                    stack.callback(os.close, direct)
                    _check_image(direct, settings, descriptor)
            elif image is not None:
                descriptor = image
                _check_memory(descriptor, available)
            elif lasting:
                descriptor = _memory(available)
                stack.callback(os.close, descriptor)
            self.size = settings.size if settings.size is not None else available
            if self.size > available or not self.size:
                raise UsageError(
                    f"{settings.path or settings.nvme}: holds {available} bytes from offset"
                    f" {settings.offset} on, not {self.size}"
                )
            self.raw = RawDisk(
                self.size,
                fd=descriptor,
                mapped=settings.path is None and descriptor is not None,
                direct_fd=direct,
                offset=settings.offset,
                read_only=settings.read_only,
                serial=settings.serial,
                place=None if self.range is None else self.range.place,
            )
            stack.callback(self.raw.close)
            self.share = LimitShare()
            stack.callback(self.share.close)
            self.image = descriptor
            self._open = stack.pop_all()

    def figures(self) -> DiskFigures:
        """Counters since the disk was opened, by whichever process it was."""
        here = self.raw.figures()
        if self.carried is None:
            return here
        sums = {f.name: getattr(here, f.name) + getattr(self.carried, f.name) for f in fields(here)}
        return DiskFigures(**sums)

    def features(self) -> int:
        found = BlockFeature.SEG_MAX | BlockFeature.BLK_SIZE | BlockFeature.FLUSH
        found |= BlockFeature.TOPOLOGY | BlockFeature.MQ
        if self.settings.read_only:
            found |= BlockFeature.RO
        else:
            found |= BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES
        return int(found) | VirtioFeature.RING_PACKED

    def config(self) -> bytes:
        """`struct virtio_blk_config` up to the write-zeroes fields."""
        block = self.block_size
        most = _MOST_RANGE_SECTORS
        if self.range is not None:
            # What one Write Zeroes command takes.
            most = min(most, _MOST_BLOCKS * self.range.block_bytes // SECTOR)
        return _CONFIG.pack(
            self.size // SECTOR,
            0,  # size_max: not offered
            MOST_SEGMENTS,
            0,
            0,
            0,  # geometry: not offered
            block,
            *self._topology(block),
            1,  # writeback
            0,
            self.settings.queues,
            most,
            MOST_RANGES,
            block // SECTOR,
            most,
            MOST_RANGES,
            1,  # zeros may unmap
        )

    def _topology(self, block: int) -> tuple[int, int, int, int]:
        """The exponent of logical blocks in a physical one, the first block that begins one, and
        the least and the best size of a write, in logical blocks (section 5.2.4)."""
        each = max(1, self.settings.physical_block_size // block)
        first = -(self.settings.offset // block) % each
        return each.bit_length() - 1, first, each if each > 1 else 0, 0

    @property
    def queues(self) -> int:
        return self.settings.queues

    @property
    def block_size(self) -> int:
        """What the driver is told, in bytes: no less than the blocks that the disk has."""
        own = SECTOR if self.range is None else self.range.block_bytes
        return max(self.settings.block_size, own)

    def reach(self, memory: MemoryMap, regions: list[MemoryRegion]) -> None:
        """Have the disk reach a machine's memory by itself, if it does that at all. Raises
        KernelError where there is no room for it."""
        if self.range is not None:
            self.range.host.reach(memory, regions)

    def leave(self, memory: MemoryMap) -> None:
        """Close a map, once the disk cannot reach it any more."""
        if self.range is not None:
            self.range.host.leave(memory)
        else:
            memory.close()

    def held_up(self) -> bool:
        return self.raw.is_muted

    def forgive(self) -> None:
        self.raw.unmute()

    def write_config(self, offset: int, data: bytes) -> None:
        raise UsageError("no field of a disk's configuration can be written")

    def start_queue(
        self, workers: list[Worker], _index: int, features: int, start: QueueStart
    ) -> ServedQueue:
        """Have the worker that has the fewest queues serve another one. Raises Refused if the image
        is to be locked now and another program has it locked."""
        if self._locks_running and not self._running:
            assert self.image is not None and self.settings.path is not None
            lock(self.image, self.settings.path, read_only=self.settings.read_only)
        self._running += 1
        try:
            return self._queue(workers, features, start)
        except BaseException:
            self._queue_ended()
            raise

    @property
    def _locks_running(self) -> bool:
        return self.settings.path is not None and self.settings.lock == "running"

    def _queue_ended(self) -> None:
        self._running -= 1
        if self._locks_running and not self._running and self.image is not None:
            unlock(self.image)

    def _queue(self, workers: list[Worker], features: int, start: QueueStart) -> ServedQueue:
        worker = min(workers, key=lambda worker: worker.queues)
        port = None
        if self.range is not None:
            # The queue may be moved to any of them.
            for one in workers:
                self.range.host.port(one)
            port = self.range.host.port(worker)
        return ServedQueue(
            worker,
            self.raw,
            start.memory,
            start.layout,
            base=start.base,
            write_through=not features & BlockFeature.FLUSH,
            kick=start.kick,
            call=start.call,
            error=start.error,
            log=start.log,
            dirty=start.dirty,
            call_index=start.call_index,
            share=self.share,
            port=port,
            ended=self._queue_ended,
        )

    def resize(self) -> bool:
        """Take a changed image's size; whether it changed. A disk cut out by `size` stays."""
        if self.settings.path is None or self.settings.size is not None:
            return False
        assert self.image is not None
        size = os.lseek(self.image, 0, os.SEEK_END) - self.settings.offset
        size -= size % self.settings.block_size
        if size == self.size or size <= 0:
            return False
        self.size = size
        self.raw.resize(size)
        return True

    def close(self) -> None:
        self._open.close()


def _range(settings: DiskSettings) -> NvmeRange | None:
    if settings.nvme is None:
        return None
    from vfiotool.virtio.nvme import NvmeRange

    return NvmeRange(settings.nvme, settings.offset, settings.size, read_only=settings.read_only)


def _open(settings: DiskSettings) -> int:
    path = settings.path or ""
    flags = os.O_RDONLY if settings.read_only else os.O_RDWR
    try:
        # Non-blocking, so that a FIFO is refused and not waited for.
        if stat.S_ISBLK(os.stat(path).st_mode) and _is_claimed(settings):
            flags |= os.O_EXCL
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.EBUSY and flags & os.O_EXCL:
            raise Refused(
                f"{path}: in use by this host (mounted, swap, RAID, LVM, or a partition of it) or"
                " by another program",
                hint="end that use, or serve it with --read-only",
            ) from error
        raise from_oserror(f"open {path}", error) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(descriptor)
        raise UsageError(f"{path}: neither a regular file nor a block device")
    return descriptor


def _is_claimed(settings: DiskSettings) -> bool:
    """Whether a block device is taken from the host: what a machine writes below a file system that
    is mounted here damages both (open(2), O_EXCL). Not where two servers have it open at once."""
    return not settings.read_only and settings.lock == "always"


def _memory(size: int) -> int:
    """Memory of zeros that keeps its size."""
    made = None
    try:
        made = os.memfd_create("vfiotool-disk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(made, size)
        fcntl.fcntl(made, _F_ADD_SEALS, _SEALS)
    except OSError as error:
        if made is not None:
            os.close(made)
        raise from_oserror(f"make a disk of {size} bytes in memory", error) from error
    return made


def _check_memory(descriptor: int, size: int) -> None:
    """Raise Refused unless a descriptor that came from elsewhere is what `_memory` makes."""
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError as error:
        raise Refused("a disk in memory that is not one") from error
    if seals & _SEALS != _SEALS or os.fstat(descriptor).st_size != size:
        raise Refused("a disk in memory that is not one, or of another size")


def _open_direct(settings: DiskSettings) -> int:
    """The image once more, for direct I/O."""
    path = settings.path or ""
    flags = os.O_RDONLY if settings.read_only else os.O_RDWR
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UsageError(
                f"--direct: the file system of {path} has no direct I/O", hint="leave it out"
            ) from error
        raise from_oserror(f"open {path}", error) from error


def _check_image(descriptor: int, settings: DiskSettings, image: int | None = None) -> None:
    """Raise Refused unless a descriptor is of the image (at its path, if `image` is None) and
    opened as it is needed."""
    try:
        there = os.stat(settings.path or "") if image is None else os.fstat(image)
        found = os.fstat(descriptor)
    except OSError as error:
        raise from_oserror(f"look at {settings.path}", error) from error
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    same = (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino)
    if not same or mode != (os.O_RDONLY if settings.read_only else os.O_RDWR):
        raise Refused(f"{settings.path}: the image was replaced since it was opened")


def _available(descriptor: int, settings: DiskSettings) -> int:
    """The bytes from the offset on, in whole blocks unless it ends in the middle of one."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    available = max(end - settings.offset, 0)
    if settings.size is None and available % settings.block_size:
        raise UsageError(
            f"{settings.path}: {available} bytes are not a multiple of the block size"
            f" {settings.block_size}",
            hint="give the part that is served: --size BYTES",
        )
    return available


def lock(descriptor: int, path: str, *, read_only: bool) -> None:
    """Lock an image as QEMU does, until the descriptor is closed. Raises Refused if it is in use.

    The locks are of the open file (fcntl(2), "Open file description locks"), so two exports of one
    process meet each other as well. A file system without locks is served unlocked, as QEMU does.
    """
    used = _READER if read_only else _WRITER
    try:
        for bit in used:
            _ofd(descriptor, _F_OFD_SETLK, fcntl.F_RDLCK, _LOCK_USED + bit)
        for bit in _NOT_SHARED:
            _ofd(descriptor, _F_OFD_SETLK, fcntl.F_RDLCK, _LOCK_UNSHARED + bit)
        others = [_LOCK_UNSHARED + bit for bit in used] + [_LOCK_USED + bit for bit in _NOT_SHARED]
        busy = [at for at in others if _ofd(descriptor, _F_OFD_GETLK, fcntl.F_WRLCK, at)]
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            return
        raise from_oserror(f"lock {path}", error) from error
    if busy:
        unlock(descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)
        raise Refused(
            f"{path}: in use by another program or another export",
            hint="stop what has it open, or serve it everywhere with --read-only",
        )


def unlock(descriptor: int) -> None:
    """Let go of what `lock` took."""
    with suppress(OSError):
        for at in range(_LOCK_USED, _LOCK_UNSHARED + 4):
            _ofd(descriptor, _F_OFD_SETLK, fcntl.F_UNLCK, at)


def _ofd(descriptor: int, command: int, kind: int, at: int) -> bool:
    """One operation on one byte; for GETLK, whether another open file has a lock there."""
    asked = _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(descriptor, command, asked))
    return command == _F_OFD_GETLK and answer[0] != fcntl.F_UNLCK
