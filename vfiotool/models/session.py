"""One client of a model: its commands answered until it goes.

Nothing that a client sends ends the server: what breaks the protocol ends the client's connection,
what is merely wrong is answered with an errno. Descriptors that nobody keeps are closed.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import replace

from vfiotool.errors import KernelError, UsageError, VfiotoolError
from vfiotool.models.device import CONFIG_INDEX, REGION_COUNT, Model
from vfiotool.models.dma import ClientMemory
from vfiotool.vfio import UserChannel, UserCommand, UserMessage, UserProtocolError
from vfiotool.vfio import user_message as wire

Answer = tuple[bytes, tuple[int, ...]]
_NOTHING: Answer = (b"", ())
_MOST_ROOM = 1 << 16


class _Refused(Exception):
    """A command is answered with this errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Session:
    """A connected client of `model`; `run` serves it to its end. A command whose handler raises is
    answered with EIO, and `failed` hears of it."""

    def __init__(
        self,
        model: Model,
        connection: socket.socket,
        *,
        twin: bool = True,
        failed: Callable[[BaseException], object] = lambda _: None,
    ) -> None:
        self.model = model
        self._failed = failed
        self.channel = UserChannel(connection)
        self._offers_twin = twin
        self._twin: UserChannel | None = None
        self._peer = wire.UserCapabilities()
        self.commands = 0
        self._memory = ClientMemory(self.channel)
        self._handlers: dict[int, Callable[[UserMessage], Answer]] = {
            UserCommand.DMA_MAP: self._dma_map,
            UserCommand.DMA_UNMAP: self._dma_unmap,
            UserCommand.DEVICE_GET_INFO: self._device_info,
            UserCommand.DEVICE_GET_REGION_INFO: self._region_info,
            UserCommand.DEVICE_GET_IRQ_INFO: self._irq_info,
            UserCommand.DEVICE_SET_IRQS: self._set_irqs,
            UserCommand.REGION_READ: self._region_read,
            UserCommand.REGION_WRITE: self._region_write,
            UserCommand.REGION_WRITE_MULTI: self._write_multi,
            UserCommand.DEVICE_RESET: self._reset,
        }

    def run(self) -> str:
        """Serve until the client goes; returns why it ended, in words."""
        try:
            self._negotiate(self.channel.next_command())
            self.model.start(self._memory)
            while True:
                self._serve(self.channel.next_command())
        except VfiotoolError as error:
            return error.message
        except OSError as error:
            return f"{error.strerror}"
        finally:
            self._end()

    def end(self, reason: str) -> None:
        """End it, from any thread."""
        self.channel.end(reason)

    def _end(self) -> None:
        # First, so that nothing of the model's waits for the client any more.
        self.channel.end("its session has ended")
        if self._twin is not None:
            self._twin.end("its session has ended")
        self.model.stop()
        if self._twin is not None:
            self._twin.close()
        self._memory.clear()
        self.channel.close()

    def _negotiate(self, message: UserMessage) -> None:
        message.close()
        if message.command != UserCommand.VERSION:
            raise UserProtocolError(f"command {message.command} before the version")
        major, minor, self._peer = wire.parse_version(message)
        if major != wire.MAJOR:
            raise UserProtocolError(f"the client speaks version {major} of vfio-user")
        ours = replace(wire.OURS, write_multiple=self._peer.write_multiple, twin_socket=False)
        if not (self._offers_twin and self._peer.twin_socket):
            self.channel.reply(message, wire.format_version(ours, minor))
            return
        mine, theirs = socket.socketpair()
        with theirs:
            self._twin = UserChannel(mine)
            self._memory = ClientMemory(self._twin)
            told = wire.format_version(replace(ours, twin_socket=True, twin_index=0), minor)
            self.channel.reply(message, told, (theirs.fileno(),))

    def _serve(self, message: UserMessage) -> None:
        self.commands += 1
        try:
            handler = self._handlers.get(message.command)
            if handler is None:
                raise _Refused(errno.EOPNOTSUPP)
            payload, descriptors = handler(message)
        except _Refused as refused:
            message.close()
            self.channel.fail(message, refused.number)
        except UserProtocolError:
            # Cut short: the client can be told, the next message begins where it should.
            message.close()
            self.channel.fail(message, errno.EINVAL)
        except (Exception, SystemExit) as error:
            message.close()
            self._failed(error)
            self.channel.fail(message, errno.EIO)
        else:
            message.close()
            if not self.model.faults.mute:
                self.channel.reply(message, payload, descriptors)

    def _dma_map(self, message: UserMessage) -> Answer:
        _, flags, offset, iova, size = message.unpack(wire.DMA_MAP)
        number = self._memory.map(flags, offset, iova, size, message.take())
        if number:
            raise _Refused(number)
        return _NOTHING

    def _dma_unmap(self, message: UserMessage) -> Answer:
        _, flags, iova, size = message.unpack(wire.DMA_UNMAP)
        everything = bool(flags & wire.UNMAP_ALL_FLAG)
        if flags & ~wire.UNMAP_ALL_FLAG or (everything and (iova or size)):
            raise _Refused(errno.EINVAL)
        number = self._memory.unmap(iova, size, everything=everything)
        if number:
            raise _Refused(number)
        return message.payload[: wire.DMA_UNMAP.size], ()

    def _device_info(self, message: UserMessage) -> Answer:
        (argsz, *_) = message.unpack(wire.DEVICE_INFO)
        if argsz < wire.DEVICE_INFO.size:
            raise _Refused(errno.EINVAL)
        flags = wire.DEVICE_PCI_FLAG | wire.DEVICE_RESET_FLAG * self.model.has_reset
        irqs = len(self.model.signals.counts)
        return wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, flags, REGION_COUNT, irqs), ()

    def _region_info(self, message: UserMessage) -> Answer:
        argsz, _, index, _, _, _ = message.unpack(wire.REGION_INFO)
        if argsz < wire.REGION_INFO.size or index >= REGION_COUNT:
            raise _Refused(errno.EINVAL)
        size = self.model.region_size(index)
        flags = wire.REGION_READ_FLAG | wire.REGION_WRITE_FLAG if size else 0
        bar = self.model.bar_or_none(index)
        if bar is None or not bar.spec.shared:
            return wire.format_region(index, flags, size, (), argsz), ()
        flags |= wire.REGION_MMAP_FLAG
        areas = tuple((area.offset, area.size) for area in bar.spec.shared)
        if areas == ((0, size),):
            areas = ()
        return wire.format_region(index, flags, size, areas, min(argsz, _MOST_ROOM)), (bar.file,)

    def _irq_info(self, message: UserMessage) -> Answer:
        argsz, _, index, _ = message.unpack(wire.IRQ_INFO)
        signals = self.model.signals
        if argsz < wire.IRQ_INFO.size or index >= len(signals.counts):
            raise _Refused(errno.EINVAL)
        flags, count = signals.flags(index), signals.counts[index]
        return wire.IRQ_INFO.pack(wire.IRQ_INFO.size, flags, index, count), ()

    def _set_irqs(self, message: UserMessage) -> Answer:
        _, flags, index, start, count = message.unpack(wire.IRQ_SET)
        data = message.payload[wire.IRQ_SET.size :]
        number = self.model.signals.set(flags, index, start, count, data, message.descriptors)
        if number:
            raise _Refused(number)
        return _NOTHING

    def _place(self, message: UserMessage) -> tuple[int, int, int]:
        offset, index, count = message.unpack(wire.REGION_ACCESS)
        size = self.model.region_size(index) if index < REGION_COUNT else 0
        if not count or count > wire.LARGEST_TRANSFER or offset + count > size:
            raise _Refused(errno.EINVAL)
        return offset, index, count

    def _refuse_silent(self, index: int) -> None:
        if not self.model.answers(index):
            raise _Refused(errno.EIO)

    def _region_read(self, message: UserMessage) -> Answer:
        offset, index, count = self._place(message)
        self._refuse_silent(index)
        data = self.model.region_read(index, offset, count)
        return message.payload[: wire.REGION_ACCESS.size] + data, ()

    def _region_write(self, message: UserMessage) -> Answer:
        offset, index, count = self._place(message)
        data = message.payload[wire.REGION_ACCESS.size :]
        if len(data) != count:
            raise _Refused(errno.EINVAL)
        self._write(index, offset, data)
        return message.payload[: wire.REGION_ACCESS.size], ()

    def _write(self, index: int, offset: int, data: bytes) -> None:
        self._refuse_silent(index)
        try:
            self.model.region_write(index, offset, data)
        except UsageError as error:
            if index != CONFIG_INDEX:
                raise
            raise _Refused(errno.EIO) from error

    def _write_multi(self, message: UserMessage) -> Answer:
        (count,) = message.unpack(wire.WRITE_COUNT)
        rest = message.payload[wire.WRITE_COUNT.size :]
        if count * wire.ONE_WRITE.size != len(rest):
            raise _Refused(errno.EINVAL)
        for offset, index, width, value in struct.iter_unpack(wire.ONE_WRITE.format, rest):
            size = self.model.region_size(index) if index < REGION_COUNT else 0
            if not 0 < width <= 8 or offset + width > size:
                raise _Refused(errno.EINVAL)
            self._write(index, offset, value.to_bytes(8, "little")[:width])
        return message.payload[: wire.WRITE_COUNT.size], ()

    def _reset(self, message: UserMessage) -> Answer:
        if not self.model.has_reset:
            raise _Refused(errno.EINVAL)
        try:
            self.model.reset()
        except (KernelError, UsageError) as error:
            raise _Refused(errno.EIO) from error
        return _NOTHING
