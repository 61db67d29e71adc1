"""An address space and devices over vfio-user: a process serves each device on a socket.

    with Device.open("vfio-user:/run/card.sock") as device: ...

The client's side of QEMU's docs/interop/vfio-user.rst. Memory of `device.dma.alloc` is shared by
its file; other memory (`device.dma.map`) the server reaches by messages, which a thread answers.
A region is mapped where the seals of its file keep it from being shortened, as a server that
shortens a mapped file ends whoever touches it (SIGBUS); any other is reached by messages.
Needs no root, no kernel module and no IOMMU.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.native import library as native
from vfiotool.vfio import user_message as wire
from vfiotool.vfio.calls import What
from vfiotool.vfio.caps import CONFIG_REGION
from vfiotool.vfio.iova import PAGE
from vfiotool.vfio.reach import COMMAND, COMMAND_MEMORY
from vfiotool.vfio.space import (
    ALL_ADDRESSES,
    AddressSpace,
    Attachment,
    StillMapped,
    file_of,
    let_go,
)
from vfiotool.vfio.target import Target
from vfiotool.vfio.user_channel import UserChannel, UserFailure
from vfiotool.vfio.user_connect import always_holds, channel_of, connect, errno_of
from vfiotool.vfio.user_message import UserCommand, UserMessage, UserProtocolError

# As vfio-pci does it: a region's position tells its index.
_INDEX_SHIFT = 40
_ALL = (1 << 64) - 1
COMMAND_PORTS = 1
# What a reset clears and whoever asked for it restores: base addresses and ROM, interrupt line.
_BARS, _SAVED_BYTES = 0x10, 0x40
Descriptors = Sequence[int]


@dataclass(frozen=True, slots=True)
class LentMemory:
    """`size` bytes of this process from `address` on, that devices see at `iova`; `file` is the
    descriptor of the file that they are of, or None."""

    address: int
    iova: int
    size: int
    rights: int
    file: int | None


class UserCalls:
    """A device's server, asked by messages. Close it after use."""

    messages = True

    def __init__(self, path: str, name: str, memory: MemoryTable) -> None:
        self.name = name
        self._memory = memory
        self._files: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self.channel = connect(path, name)
        self._twin: UserChannel | None = None
        self._server: threading.Thread | None = None
        try:
            self._negotiate()
        except BaseException:
            self.close()
            raise

    def _negotiate(self) -> None:
        try:
            reply = self._call(UserCommand.VERSION, wire.format_version(wire.OURS))
        except UserFailure as failure:
            raise self._failed(failure, f"agree with {self.name} on a version") from failure
        descriptors = reply.take()
        try:
            major, _, told = wire.parse_version(reply)
            if major != wire.MAJOR:
                raise UserProtocolError(f"{self.name} speaks version {major} of vfio-user")
            self.told = told
            if told.twin_socket:
                if told.twin_index is None or not 0 <= told.twin_index < len(descriptors):
                    raise UserProtocolError(f"{self.name} offers a second socket and sends none")
                # Its own from the moment that it is a socket.
                self._twin = channel_of(descriptors[told.twin_index], self.name)
                del descriptors[told.twin_index]
                self._twin.set_limit(self.channel.limit_s)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _call(
        self, command: UserCommand, payload: bytes = b"", descriptors: Descriptors = ()
    ) -> UserMessage:
        return self.channel.call(command, payload, descriptors)

    def _asked(self, command: UserCommand, payload: bytes, what: What) -> UserMessage:
        try:
            return self._call(command, payload)
        except UserFailure as failure:
            raise self._failed(failure, what()) from failure

    def _failed(self, failure: UserFailure, what: str) -> VfiotoolError:
        return native.failed(errno_of(failure), what, device=self.name)

    def serve_memory(self) -> None:
        """From now on a thread answers the server's reads and writes of memory."""
        with self._lock:
            if self._server is None:
                channel = self._twin or self.channel
                self._server = threading.Thread(
                    target=self._memory.serve, args=(channel,), daemon=True, name="vfio-user memory"
                )
                self._server.start()

    def close(self) -> None:
        """End the connection."""
        for channel in (self.channel, self._twin):
            if channel is not None:
                channel.end("it was closed here")
        if self._server is not None:
            self._server.join()
        for channel in (self.channel, self._twin):
            if channel is not None:
                channel.close()
        with self._lock:
            for descriptor, _ in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def abandon(self) -> None:
        """In a child: let go of the descriptors."""
        self.channel.abandon()
        if self._twin is not None:
            self._twin.abandon()
        for descriptor, _ in self._files.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def device_info(self, name: str) -> bytes:
        asked = wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, 0, 0, 0)
        reply = self._asked(UserCommand.DEVICE_GET_INFO, asked, lambda: f"ask {name} what it is")
        reply.close()
        argsz, flags, regions, irqs = reply.unpack(wire.DEVICE_INFO)
        # The kernel's structure has an offset of capabilities behind these, of which none come.
        return wire.DEVICE_INFO.pack(argsz, flags & 3, regions, irqs) + bytes(4)

    def region_info(self, index: int, name: str) -> bytes | None:
        room = 4096
        asked = wire.REGION_INFO.pack(room, 0, index, 0, 0, 0)
        try:
            reply = self._call(UserCommand.DEVICE_GET_REGION_INFO, asked)
        except UserFailure as failure:
            if failure.number in (errno.EINVAL, errno.ENODEV):
                return None
            raise self._failed(failure, f"ask {name} for region {index}") from failure
        descriptors = reply.take()
        try:
            return self._region(reply, index, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _region(self, reply: UserMessage, index: int, descriptors: list[int]) -> bytes:
        argsz, flags, _, cap_offset, size, offset = reply.unpack(wire.REGION_INFO)
        if not descriptors or not always_holds(descriptors[0], offset + size):
            # Without a file, or beyond its end, a mapped access would be a bus error, which ends
            # this process: the region is read and written by messages.
            flags &= ~wire.REGION_MMAP_FLAG
        if size >> _INDEX_SHIFT:
            raise UserProtocolError(f"{self.name}: region {index} of {size} bytes")
        if flags & wire.REGION_MMAP_FLAG:
            with self._lock:
                old = self._files.pop(index, None)
                self._files[index] = (descriptors.pop(0), offset)
            if old is not None:
                os.close(old[0])
        position = index << _INDEX_SHIFT
        head = wire.REGION_INFO.pack(argsz, flags, index, cap_offset, size, position)
        return head + reply.payload[wire.REGION_INFO.size :]

    def irq_info(self, index: int) -> tuple[int, int] | None:
        asked = wire.IRQ_INFO.pack(wire.IRQ_INFO.size, 0, index, 0)
        try:
            reply = self._call(UserCommand.DEVICE_GET_IRQ_INFO, asked)
        except UserFailure as failure:
            if failure.number == errno.EINVAL:
                return None
            raise self._failed(failure, f"ask {self.name} for interrupt {index}") from failure
        reply.close()
        _, flags, _, count = reply.unpack(wire.IRQ_INFO)
        return flags, count

    def _data(self, position: int, count: int, what: What) -> bytes:
        offset = position & (1 << _INDEX_SHIFT) - 1
        asked = wire.REGION_ACCESS.pack(offset, position >> _INDEX_SHIFT, count)
        reply = self._asked(UserCommand.REGION_READ, asked, what)
        data = reply.payload[wire.REGION_ACCESS.size :]
        if len(data) != count:
            reply.close()
            raise UserProtocolError(f"{what()}: {len(data)} bytes came, not {count}")
        return data

    def _store(self, position: int, data: bytes, what: What) -> None:
        offset = position & (1 << _INDEX_SHIFT) - 1
        head = wire.REGION_ACCESS.pack(offset, position >> _INDEX_SHIFT, len(data))
        self._asked(UserCommand.REGION_WRITE, head + data, what).close()

    def read(self, position: int, width: int, what: What) -> int:
        return int.from_bytes(self._data(position, width, lambda: f"read {what()}"), "little")

    def write(self, position: int, width: int, value: int, what: What) -> None:
        self._store(position, value.to_bytes(width, "little"), lambda: f"write {what()}")

    def copy_out(self, position: int, buffer: Any, what: str) -> None:
        target = memoryview(buffer).cast("B")
        step = min(self.told.max_data_xfer_size, wire.LARGEST_TRANSFER) or 1
        for at in range(0, len(target), step):
            count = min(step, len(target) - at)
            target[at : at + count] = self._data(position + at, count, lambda: f"read {what}")

    def copy_in(self, position: int, buffer: Any, what: str) -> None:
        source = memoryview(buffer).cast("B")
        step = min(self.told.max_data_xfer_size, wire.LARGEST_TRANSFER) or 1
        for at in range(0, len(source), step):
            self._store(position + at, bytes(source[at : at + step]), lambda: f"write {what}")

    def _set_irqs(self, flags: int, index: int, start: int, count: int, files: Descriptors) -> int:
        asked = wire.IRQ_SET.pack(wire.IRQ_SET.size, flags, index, start, count)
        try:
            self._call(UserCommand.DEVICE_SET_IRQS, asked, files).close()
        except UserFailure as failure:
            return errno_of(failure)
        return 0

    def irq_assign(self, index: int, start: int, descriptors: Sequence[int]) -> int:
        flags = wire.DATA_EVENTFD | wire.ACTION_TRIGGER
        step = max(1, min(self.told.max_msg_fds, wire.MOST_DESCRIPTORS))
        for at in range(0, len(descriptors), step):
            some = descriptors[at : at + step]
            result = self._set_irqs(flags, index, start + at, len(some), some)
            if result:
                return result
        return 0

    def irq_action(self, index: int, start: int, count: int, action: int) -> int:
        return self._set_irqs(wire.DATA_NONE | action, index, start, count, ())

    def irq_unmask_fd(self, index: int, descriptor: int) -> int:
        flags = wire.DATA_EVENTFD | wire.ACTION_UNMASK
        return self._set_irqs(flags, index, 0, 1, (descriptor,))

    def decode(self) -> None:
        """Have the device answer to its BARs, as the kernel does when it opens a device."""
        position = (CONFIG_REGION << _INDEX_SHIFT) + COMMAND
        command = self.read(position, 2, lambda: f"COMMAND of {self.name}")
        if command != 0xFFFF:
            wanted = command | COMMAND_PORTS | COMMAND_MEMORY
            self.write(position, 2, wanted, lambda: f"COMMAND of {self.name}")

    def reset(self, name: str) -> None:
        """DEVICE_RESET; afterwards configuration space is as it was, as the kernel restores it."""
        base = CONFIG_REGION << _INDEX_SHIFT
        saved = self._data(base, _SAVED_BYTES, lambda: f"configuration space of {name}")
        self._reset(name)
        self._store(
            base + _BARS, saved[_BARS:_SAVED_BYTES], lambda: f"configuration space of {name}"
        )
        self.decode()

    def _reset(self, name: str) -> None:
        self._asked(UserCommand.DEVICE_RESET, b"", lambda: f"reset {name}").close()

    @contextmanager
    def mappable(self, position: int) -> Iterator[tuple[int, int]]:
        with self._lock:
            found = self._files.get(position >> _INDEX_SHIFT)
            if found is None:
                raise UsageError(f"region {position >> _INDEX_SHIFT} cannot be mapped")
            copied = os.dup(found[0])
        try:
            yield copied, found[1]
        finally:
            os.close(copied)

    def map(self, memory: LentMemory) -> int:
        """VFIO_USER_DMA_MAP: 0 or a negative errno."""
        asked = wire.DMA_MAP.pack(wire.DMA_MAP.size, memory.rights, 0, memory.iova, memory.size)
        if memory.file is None:
            self.serve_memory()
        try:
            files = () if memory.file is None else (memory.file,)
            self._call(UserCommand.DMA_MAP, asked, files).close()
        except UserFailure as failure:
            return errno_of(failure)
        return 0

    def unmap(self, memory: LentMemory) -> int:
        """VFIO_USER_DMA_UNMAP: 0 or a negative errno."""
        asked = wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, 0, memory.iova, memory.size)
        try:
            self._call(UserCommand.DMA_UNMAP, asked).close()
        except UserFailure as failure:
            return errno_of(failure)
        return 0


class MemoryTable:
    """What is mapped in an address space, sorted by I/O address; and the answers to a server that
    reaches it by messages."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._starts: list[int] = []
        self._pieces: list[LentMemory] = []

    def __iter__(self) -> Iterator[LentMemory]:
        return iter(list(self._pieces))

    def within(self, iova: int, size: int) -> list[LentMemory]:
        """The pieces that share an address with `size` bytes from `iova` on."""
        first = max(bisect.bisect_right(self._starts, iova) - 1, 0)
        found = []
        for piece in self._pieces[first:]:
            if piece.iova >= iova + size:
                break
            if piece.iova + piece.size > iova:
                found.append(piece)
        return found

    def add(self, piece: LentMemory) -> None:
        at = bisect.bisect_left(self._starts, piece.iova)
        self._starts.insert(at, piece.iova)
        self._pieces.insert(at, piece)

    def remove(self, piece: LentMemory) -> None:
        """Once this returns nobody reads or writes it any more on behalf of a server."""
        with self.lock:
            at = self._pieces.index(piece)
            del self._starts[at], self._pieces[at]
            if piece.file is not None:
                os.close(piece.file)

    def clear(self) -> None:
        for piece in self:
            self.remove(piece)

    def serve(self, channel: UserChannel) -> None:
        """Answer DMA_READ and DMA_WRITE until the connection ends."""
        with contextlib.suppress(VfiotoolError):
            while True:
                message = channel.next_command()
                message.close()
                number, payload = self._answer(message)
                if number:
                    channel.fail(message, number)
                else:
                    channel.reply(message, payload)

    def _answer(self, message: UserMessage) -> tuple[int, bytes]:
        """(errno or 0, payload) of the reply."""
        writing = message.command == UserCommand.DMA_WRITE
        if not writing and message.command != UserCommand.DMA_READ:
            return errno.EOPNOTSUPP, b""
        try:
            iova, count = message.unpack(wire.DMA_ACCESS)
        except UserProtocolError:
            return errno.EINVAL, b""
        data = message.payload[wire.DMA_ACCESS.size :]
        if count > wire.LARGEST_TRANSFER or iova + count > _ALL or (writing and len(data) != count):
            return errno.EINVAL, b""
        head = wire.DMA_ACCESS.pack(iova, count)
        right = wire.DMA_WRITEABLE if writing else wire.DMA_READABLE
        with self.lock:
            pieces = self.within(iova, count)
            if any(not piece.rights & right for piece in pieces):
                return errno.EACCES, b""
            if sum(_shared(piece, iova, count) for piece in pieces) != count:
                return errno.EFAULT, b""
            out = b""
            for piece in pieces:
                start, length = max(iova, piece.iova), _shared(piece, iova, count)
                address = piece.address + start - piece.iova
                if writing:
                    ctypes.memmove(address, data[start - iova : start - iova + length], length)
                else:
                    out += ctypes.string_at(address, length)
        return 0, head + out


def _shared(piece: LentMemory, iova: int, count: int) -> int:
    """How many of `count` bytes from `iova` on lie in `piece`."""
    return min(iova + count, piece.iova + piece.size) - max(iova, piece.iova)


class VfioUserSpace(AddressSpace):
    """Devices that processes serve, and the memory lent to all of them."""

    name = "vfio-user"
    shares_memory = True

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._table = MemoryTable()
        self._lent: dict[int, int] = {}
        self._calls: dict[str, UserCalls] = {}

    @contextmanager
    def lending(self, files: dict[int, int]) -> Iterator[None]:
        with self.lock:
            self._lent.update(files)
            try:
                yield
            finally:
                for address in files:
                    self._lent.pop(address, None)

    def _attach(self, target: Target, vf_token: str | None) -> Attachment:
        if target.bus != "vfio-user":
            raise UsageError(
                f"{target.name} is not served over vfio-user: it has a space of its own",
                device=target.name,
            )
        calls = UserCalls(target.path, target.name, self._table)
        try:
            for piece in self._table:
                native.check(calls.map(piece), f"map {piece.size} bytes for {target.name}")
            calls.decode()
            handle = file_of(os.dup(calls.channel.number), target.name)
        except BaseException:
            calls.close()
            raise
        self._calls[target.name] = calls
        return Attachment(target, handle, None, calls=calls)

    def _detach(self, attachment: Attachment) -> None:
        let_go(attachment.handle)
        calls = self._calls.pop(attachment.target.name, None)
        if calls is not None:
            calls.close()
        if not self._calls:
            self._table.clear()

    def map(self, address: int, iova: int, size: int, /, *, read: bool, write: bool) -> None:
        self.refuse_closed()
        if not size or (address | iova | size) % PAGE or iova + size > 1 << 64:
            raise UsageError(
                f"map {size} bytes at {address:#x}, I/O address {iova:#x}: not whole pages of "
                f"{PAGE} bytes"
            )
        rights = wire.DMA_READABLE * read | wire.DMA_WRITEABLE * write
        with self.lock:
            if self._table.within(iova, size):
                raise UsageError(f"I/O address {iova:#x}, {size} bytes: something is mapped there")
            file = self._lent.get(address)
            piece = LentMemory(address, iova, size, rights, None if file is None else os.dup(file))
            # Before the servers hear of it, who may ask at once.
            self._table.add(piece)
            done: list[UserCalls] = []
            try:
                for calls in list(self._calls.values()):
                    result = calls.map(piece)
                    if result < 0:
                        self._map_failed(result, address, iova, size)
                    done.append(calls)
            except BaseException:
                for calls in done:
                    with contextlib.suppress(VfiotoolError):
                        calls.unmap(piece)
                self._table.remove(piece)
                raise

    def map_many(self, rows: Any, /, *, read: bool, write: bool) -> None:
        done: list[tuple[int, int]] = []
        with self.lock:
            for address, iova, size in _rows(rows, 3):
                try:
                    self.map(address, iova, size, read=read, write=write)
                except VfiotoolError as error:
                    try:
                        self.unmap_many(done)
                    except VfiotoolError as again:
                        raise StillMapped(f"{error}; and {again}") from error
                    raise
                done.append((iova, size))

    def unmap(self, iova: int, size: int, /) -> int:
        self.refuse_closed()
        operation = f"unmap {size} bytes at I/O address {iova:#x}"
        if not size or (iova | size) % PAGE:
            raise UsageError(f"{operation}: not whole pages of {PAGE} bytes")
        with self.lock:
            pieces = self._table.within(iova, size)
            if any(one.iova < iova or one.iova + one.size > iova + size for one in pieces):
                raise UsageError(f"{operation}: it would cut a mapping in two")
            for piece in pieces:
                self._unmap(piece, operation)
            return sum(piece.size for piece in pieces)

    def _unmap(self, piece: LentMemory, operation: str) -> None:
        for calls in list(self._calls.values()):
            # A server that has gone reaches nothing; but for shared memory that it keeps mapped.
            if calls.channel.failure is None:
                try:
                    result = calls.unmap(piece)
                except KernelError:
                    if calls.channel.failure is None:
                        raise
                    continue
                native.check(result, operation)
        self._table.remove(piece)

    def unmap_many(self, rows: Any, /) -> int:
        return sum(self.unmap(iova, size) for iova, size in _rows(rows, 2))

    def unmap_all(self) -> int:
        with self.lock:
            return sum(self.unmap(piece.iova, piece.size) for piece in self._table)

    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        raise native.failed(result, f"map {size} bytes at I/O address {iova:#x}")

    def _cuts(self, result: int, iova: int, size: int) -> bool:
        return False

    def ranges(self) -> tuple[tuple[int, int], ...]:
        return ALL_ADDRESSES

    def page_sizes(self) -> int:
        return PAGE

    def dirty_track(self, start: bool) -> None:
        raise Unsupported("vfio-user devices' writes are not tracked")

    def dirty_bitmap(self, iova: int, size: int, page_size: int = PAGE) -> bytes:
        raise Unsupported("vfio-user devices' writes are not tracked")

    def _handles(self) -> list[native.Handle]:
        return []

    def abandon(self) -> None:
        for calls in self._calls.values():
            calls.abandon()
        super().abandon()


def _rows(rows: Any, width: int) -> Iterator[tuple[int, ...]]:
    """Rows as `Mapper` takes them: tuples, or a buffer of unsigned 64-bit numbers."""
    try:
        numbers = memoryview(rows).cast("B").cast("Q").tolist()
    except TypeError:
        yield from rows
        return
    for at in range(0, len(numbers), width):
        yield tuple(numbers[at : at + width])
