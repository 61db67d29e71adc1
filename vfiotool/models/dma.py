"""A client's memory as a model reaches it: shared by descriptor, or by messages.

Memory that its file's seals keep from being shortened is mapped; any other is read and written
through its descriptor, because a client that shortens a mapped file kills whoever touches it
(SIGBUS). Every access is checked against what is mapped now, and ends before an unmap is answered.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import mmap
import os
import threading
from dataclasses import dataclass

from vfiotool.errors import VfiotoolError
from vfiotool.vfio import UserChannel, UserCommand, is_sealed, user_message

PAGE = 4096
_MOST_BITS = 64
# Of one copy: who drives a model tells it lengths, and maps sparse files.
_MOST_AT_ONCE = 256 << 20


class DmaFault(VfiotoolError):
    """The device reached for memory that it may not: not mapped, not allowed, not there any more,
    or Bus Master Enable is off."""

    kind = "dma-fault"


@dataclass(slots=True)
class _File:
    """A file of the client's that mappings are of: opened and mapped once, however many there are.

    A guest's IOMMU has QEMU map memory page by page, and each message carries its file anew.
    """

    key: tuple[int, ...]
    descriptor: int
    sealed: bool
    memory: mmap.mmap | None = None
    users: int = 0

    def reach(self, end: int) -> None:
        """See to it that the file's first `end` bytes can be reached. Raises OSError and ValueError
        where it does not hold them."""
        if self.memory is not None and end <= len(self.memory):
            return
        size = os.fstat(self.descriptor).st_size
        if size < end:
            raise ValueError("the file ends before the mapping does")
        if not self.sealed:
            os.pread(self.descriptor, 1, end - 1)
            return
        # The shorter mapping, made before the file grew, is not needed any more.
        older, self.memory = self.memory, mmap.mmap(self.descriptor, size)
        if older is not None:
            older.close()

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
        os.close(self.descriptor)


@dataclass(slots=True)
class _Piece:
    iova: int
    size: int
    rights: int
    offset: int
    file: _File | None


def _same_file(file: int) -> tuple[int, ...]:
    """What two descriptors have in common that reach the same file in the same way."""
    found = os.fstat(file)
    return found.st_dev, found.st_ino, fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE


class ClientMemory:
    """What one client has mapped. `channel` carries messages for what came without a descriptor."""

    def __init__(self, channel: UserChannel, most: int = user_message.MOST_DMA_MAPS) -> None:
        self._channel = channel
        self._most = most
        self._lock = threading.RLock()
        self._starts: list[int] = []
        self._pieces: list[_Piece] = []
        self._files: dict[tuple[int, ...], _File] = {}

    def map(self, rights: int, offset: int, iova: int, size: int, descriptors: list[int]) -> int:
        """0 or an errno. The descriptors are its own from now on."""
        with contextlib.ExitStack() as stack:
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            if (
                not size
                or (iova | size | offset) % PAGE
                or iova + size > 1 << _MOST_BITS
                or not 0 < rights <= 3
                or len(descriptors) > 1
            ):
                return errno.EINVAL
            with self._lock:
                if self._within(iova, size):
                    return errno.EEXIST
                if len(self._pieces) >= self._most:
                    return errno.ENOSPC
                try:
                    file = self._file(descriptors[0], offset + size) if descriptors else None
                except (OSError, ValueError, OverflowError):
                    return errno.EINVAL
                at = bisect.bisect_left(self._starts, iova)
                self._starts.insert(at, iova)
                self._pieces.insert(at, _Piece(iova, size, rights, offset, file))
        return 0

    def _file(self, descriptor: int, end: int) -> _File:
        """The file of a descriptor, whose first `end` bytes can be reached; for one user more."""
        key = _same_file(descriptor)
        file = self._files.get(key)
        if file is not None:
            file.reach(end)
        else:
            own = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0)
            file = _File(key, own, is_sealed(own))
            try:
                file.reach(end)
            except BaseException:
                file.close()
                raise
            self._files[key] = file
        file.users += 1
        return file

    def _let_go(self, pieces: list[_Piece]) -> None:
        """Close the files that no mapping is of any more."""
        for file in (piece.file for piece in pieces if piece.file is not None):
            file.users -= 1
            if not file.users:
                del self._files[file.key]
                file.close()

    def unmap(self, iova: int, size: int, *, everything: bool = False) -> int:
        """0 or an errno; no access to it is under way when this returns. As VFIO has it
        (VFIO_IOMMU_UNMAP_DMA), several mappings can go at once, but none in part: a guest's IOMMU
        that changes a device's domain has QEMU unmap all of the address space, in large ranges.
        """
        with self._lock:
            if everything:
                self.clear()
                return 0
            found = self._within(iova, size)
            if not found:
                return errno.ENOENT
            if found[0].iova < iova or found[-1].iova + found[-1].size > iova + size:
                return errno.EINVAL
            at = bisect.bisect_left(self._starts, found[0].iova)
            del self._starts[at : at + len(found)]
            del self._pieces[at : at + len(found)]
            self._let_go(found)
        return 0

    def clear(self) -> None:
        """Forget all; as `unmap`."""
        with self._lock:
            found, self._starts, self._pieces = self._pieces, [], []
            self._let_go(found)

    def __len__(self) -> int:
        return len(self._pieces)

    def _within(self, iova: int, size: int) -> list[_Piece]:
        first = max(bisect.bisect_right(self._starts, iova) - 1, 0)
        last = bisect.bisect_left(self._starts, iova + size)
        return [one for one in self._pieces[first:last] if one.iova + one.size > iova]

    def _parts(self, iova: int, count: int, right: int) -> list[tuple[_Piece, int, int]]:
        """(piece, place in it, bytes) of a run of addresses, in order."""
        parts = []
        at, end = iova, iova + count
        for piece in self._within(iova, count):
            if piece.iova > at or not piece.rights & right:
                break
            length = min(end, piece.iova + piece.size) - at
            parts.append((piece, at - piece.iova, length))
            at += length
        if at != end:
            raise DmaFault(f"{count} bytes at I/O address {iova:#x}: fault at {at:#x}")
        return parts

    def read(self, iova: int, count: int) -> bytes:
        """A copy of memory, of 256 MiB at most at once. Raises DmaFault."""
        found: list[bytes] = []
        if count > _MOST_AT_ONCE:
            raise DmaFault(f"{count} bytes at I/O address {iova:#x}: read them in parts")
        with self._lock:
            for piece, place, length in self._parts(iova, count, user_message.DMA_READABLE):
                if piece.file is None:
                    found.append(self._ask(piece.iova + place, length))
                elif piece.file.memory is None:
                    found.append(_pread(piece, piece.file.descriptor, place, length))
                else:
                    start = piece.offset + place
                    found.append(piece.file.memory[start : start + length])
        return found[0] if len(found) == 1 else b"".join(found)

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Store into memory. Raises DmaFault; then some of it may have been stored."""
        at = 0
        with self._lock:
            for piece, place, length in self._parts(iova, len(data), user_message.DMA_WRITEABLE):
                part = bytes(data[at : at + length])
                if piece.file is None:
                    self._tell(piece.iova + place, part)
                elif piece.file.memory is None:
                    _pwrite(piece, piece.file.descriptor, place, part)
                else:
                    start = piece.offset + place
                    piece.file.memory[start : start + length] = part
                at += length

    def _ask(self, iova: int, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            step = min(count - len(found), user_message.LARGEST_TRANSFER)
            payload = user_message.DMA_ACCESS.pack(iova + len(found), step)
            found += self._message(UserCommand.DMA_READ, payload, step)
        return bytes(found)

    def _tell(self, iova: int, data: bytes) -> None:
        for at in range(0, len(data), user_message.LARGEST_TRANSFER):
            part = data[at : at + user_message.LARGEST_TRANSFER]
            payload = user_message.DMA_ACCESS.pack(iova + at, len(part)) + part
            self._message(UserCommand.DMA_WRITE, payload, 0)

    def _message(self, command: UserCommand, payload: bytes, wanted: int) -> bytes:
        try:
            reply = self._channel.call(command, payload)
        except VfiotoolError as error:
            raise DmaFault(f"the client does not give its memory: {error}") from error
        reply.close()
        data = reply.payload[user_message.DMA_ACCESS.size :]
        if wanted and len(data) != wanted:
            raise DmaFault(f"{len(data)} bytes of memory came, not {wanted}")
        return data


def _pread(piece: _Piece, descriptor: int, place: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        start = piece.offset + place + len(data)
        try:
            more = os.pread(descriptor, length - len(data), start)
        except OSError as error:
            raise DmaFault(f"I/O address {piece.iova + place:#x}: {error.strerror}") from error
        if not more:
            raise DmaFault(f"I/O address {piece.iova + place:#x}: its file was shortened")
        data += more
    return bytes(data)


def _pwrite(piece: _Piece, descriptor: int, place: int, part: bytes) -> None:
    done = 0
    try:
        # A write past the end would make a file that was shortened grow again.
        if os.fstat(descriptor).st_size < piece.offset + place + len(part):
            raise DmaFault(f"I/O address {piece.iova + place:#x}: its file was shortened")
        while done < len(part):
            done += os.pwrite(descriptor, part[done:], piece.offset + place + done)
    except OSError as error:
        raise DmaFault(f"I/O address {piece.iova + place:#x}: {error.strerror}") from error
