"""The host's end of the channel to the agent in a guest.

Frames both ways over a virtio-serial port: length of the payload (u32), kind (u8), command (u32),
little endian, then the payload. The channel carries any bytes; the console carries none of it.
"""

from __future__ import annotations

import enum
import json
import select
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence

HEADER = struct.Struct("<IBI")


class Kind(enum.IntEnum):
    """What a frame is; below 64 from the host, above from the guest."""

    RUN = 1
    INPUT = 2
    CLOSE_INPUT = 3
    SIGNAL = 4
    RESIZE = 5
    HELLO = 65
    OUTPUT = 66
    ERROR = 67
    EXIT = 68
    REFUSED = 69


class ChannelClosed(Exception):
    """The other end is gone: the guest, or QEMU, has ended."""


class Channel:
    """Sends requests to the agent and takes its frames apart."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._received = bytearray()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()

    def _send(self, kind: Kind, number: int, payload: bytes = b"") -> None:
        try:
            self._stream.sendall(HEADER.pack(len(payload), kind, number) + payload)
        except OSError as error:
            raise ChannelClosed from error

    def run(
        self,
        number: int,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        merge: bool,
        terminal: tuple[int, int] | None,
    ) -> None:
        """Ask for command `number`; `terminal` is (rows, columns) of one to run it in."""
        request = {
            "argv": list(argv),
            "cwd": cwd,
            "env": dict(env),
            "merge": merge,
            "terminal": terminal,
        }
        self._send(Kind.RUN, number, json.dumps(request).encode())

    def input(self, number: int, data: bytes) -> None:
        self._send(Kind.INPUT, number, data)

    def close_input(self, number: int) -> None:
        self._send(Kind.CLOSE_INPUT, number)

    def signal(self, number: int, which: signal.Signals) -> None:
        self._send(Kind.SIGNAL, number, struct.pack("<I", which))

    def resize(self, number: int, rows: int, columns: int) -> None:
        self._send(Kind.RESIZE, number, struct.pack("<4H", rows, columns, 0, 0))

    def receive(self, deadline: float | None) -> tuple[Kind, int, bytes] | None:
        """The next frame, or None when `deadline` (time.monotonic) passes first.

        Raises ChannelClosed when the guest's end has gone.
        """
        while True:
            frame = self._take()
            if frame is not None:
                return frame
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._stream], [], [], left)[0]:
                return None
            try:
                data = self._stream.recv(1 << 18)
            except OSError as error:
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            self._received += data

    def buffered(self) -> bool:
        """Whether a whole frame is here already."""
        if len(self._received) < HEADER.size:
            return False
        length = HEADER.unpack_from(self._received)[0]
        return len(self._received) >= HEADER.size + int(length)

    def _take(self) -> tuple[Kind, int, bytes] | None:
        if not self.buffered():
            return None
        length, kind, number = HEADER.unpack_from(self._received)
        payload = bytes(self._received[HEADER.size : HEADER.size + length])
        del self._received[: HEADER.size + length]
        return Kind(kind), number, payload
