"""A disk with a volatile write cache, served over NBD, whose power can be cut at any instant.

What a flush (or a forced write) has returned for is kept. Of what was written since, a power loss
keeps any part: sector by sector, each earlier or later than another. That is what real disks
promise, and more than a killed QEMU forgets, whose host still has every write that was finished.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle).
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

SECTOR = 512
_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_REQUEST, _SIMPLE_REPLY = 0x25609513, 0x67446698
_OPT_ABORT, _OPT_GO = 2, 7
_REP_ACK, _REP_INFO, _REP_ERR_UNSUP = 1, 3, (1 << 31) + 1
_HAS_FLAGS, _SEND_FLUSH, _SEND_FUA = 1, 4, 8
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_CMD_FUA = 1
_EINVAL = 22

# Called with the disk before each request; what it returns does not matter.
Watch = Callable[["ForgetfulDisk"], object]


class ForgetfulDisk:
    """A disk of one image, served on a Unix socket to one client.

    `watch` is called between requests, in the serving thread: nothing changes meanwhile.
    """

    def __init__(self, image: bytes, socket_path: Path, watch: Watch) -> None:
        self.kept = bytearray(image)
        # Sectors written since the last flush, in order.
        self.cache: list[tuple[int, bytes]] = []
        self.flushes = 0
        self.error: BaseException | None = None
        self._newest: dict[int, bytes] = {}
        self._watch = watch
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(socket_path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, name="disk", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self._thread.join(30)
        if error is None and self.error is not None:
            raise self.error

    def after_power_loss(self, chance: random.Random) -> bytes:
        """What the disk may hold if its power went now."""
        image = bytearray(self.kept)
        survival = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for sector, data in self.cache:
            if chance.random() < survival:
                image[sector * SECTOR : (sector + 1) * SECTOR] = data
        return bytes(image)

    def read(self, offset: int, length: int) -> bytes:
        """As the client sees it: with what is in the cache."""
        first, last = offset // SECTOR, (offset + length) // SECTOR
        kept = self.kept
        return b"".join(
            self._newest.get(sector) or kept[sector * SECTOR : (sector + 1) * SECTOR]
            for sector in range(first, last)
        )

    def _write(self, offset: int, data: bytes, forced: bool) -> None:
        for at in range(0, len(data), SECTOR):
            sector, piece = (offset + at) // SECTOR, data[at : at + SECTOR]
            self.cache.append((sector, piece))
            self._newest[sector] = piece
        if forced:
            sectors = range(offset // SECTOR, (offset + len(data)) // SECTOR)
            self._keep([entry for entry in self.cache if entry[0] in sectors])
            self.cache = [entry for entry in self.cache if entry[0] not in sectors]

    def _flush(self) -> None:
        self._keep(self.cache)
        self.cache = []
        self._newest = {}
        self.flushes += 1

    def _keep(self, entries: list[tuple[int, bytes]]) -> None:
        for sector, data in entries:
            self.kept[sector * SECTOR : (sector + 1) * SECTOR] = data

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            try:
                if self._negotiate(connection):
                    self._transmit(connection)
            except (ConnectionError, EOFError):
                return
            except BaseException as error:
                self.error = error

    def _negotiate(self, connection: socket.socket) -> bool:
        connection.sendall(_MAGIC + _OPTION_MAGIC + struct.pack(">H", 1))
        receive(connection, 4)
        while True:
            _, option, length = struct.unpack(">8sII", receive(connection, 16))
            receive(connection, length)
            if option == _OPT_GO:
                flags = _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA
                export = struct.pack(">HQH", 0, len(self.kept), flags)
                self._answer(connection, option, _REP_INFO, export)
                self._answer(connection, option, _REP_ACK)
                return True
            if option == _OPT_ABORT:
                self._answer(connection, option, _REP_ACK)
                return False
            self._answer(connection, option, _REP_ERR_UNSUP)

    @staticmethod
    def _answer(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
        connection.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data)

    def _transmit(self, connection: socket.socket) -> None:
        while True:
            magic, flags, command, handle, offset, length = struct.unpack(
                ">IHHQQI", receive(connection, 28)
            )
            if magic != _REQUEST or command == _DISCONNECT:
                return
            data = receive(connection, length) if command == _WRITE else b""
            self._watch(self)
            error, answer = 0, b""
            if (offset | length) % SECTOR or offset + length > len(self.kept):
                error = _EINVAL
            elif command == _READ:
                answer = self.read(offset, length)
            elif command == _WRITE:
                self._write(offset, data, bool(flags & _CMD_FUA))
            elif command == _FLUSH:
                self._flush()
            else:
                error = _EINVAL
            connection.sendall(struct.pack(">IIQ", _SIMPLE_REPLY, error, handle) + answer)


def receive(connection: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes. Raises EOFError if the other end closed before."""
    parts = []
    while length:
        part = connection.recv(length)
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
