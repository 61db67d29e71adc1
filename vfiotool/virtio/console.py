"""The console device with one port (Virtual I/O Device 1.2, section 5.3).

Queue 0 takes what goes to the driver, queue 1 brings what it writes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pty
import tty
from collections import deque

from vfiotool.native.direct import QueueRequest
from vfiotool.virtio.device import VirtioDevice

_TO_DRIVER, _FROM_DRIVER = 0, 1
# Kept for a driver that gives no buffers; what comes beyond it is the oldest that is lost.
_MOST_KEPT = 1 << 20
# The most that is handed over at a time.
_PIECE = 1 << 20


class Console(VirtioDevice):
    """A console. Subclasses answer `received` and call `send`."""

    id = 3
    queues = 2
    taken = frozenset({_TO_DRIVER})

    def __init__(self) -> None:
        self._kept: deque[bytes] = deque()
        self._bytes = 0

    def received(self, data: bytes) -> None:
        """The driver wrote this."""

    def send(self, data: bytes) -> None:
        """Have the driver read this, now or when it gives buffers. A MiB is kept for it."""
        if data:
            self._kept.append(data)
            self._bytes += len(data)
        self._deliver()
        while self._bytes > _MOST_KEPT:
            self._bytes -= len(self._kept.popleft())

    def kicked(self, queue: int) -> None:
        self._deliver()

    def handle(self, queue: int, requests: list[QueueRequest]) -> None:
        fault: Exception | None = None
        for request in requests:
            if queue == _FROM_DRIVER:
                # A driver may lay down the same memory a thousand times, as one request.
                for at in range(0, request.read_bytes, _PIECE):
                    try:
                        self.received(b"".join(request.readable_part(at, _PIECE)))
                    except Exception as error:
                        # It is reported when what came with it has been said, too.
                        fault = fault or error
            request.complete(0)
        try:
            if fault is not None:
                raise fault
        finally:
            # A frame that an error's traceback has and that has the error keeps the requests.
            fault = None

    def _deliver(self) -> None:
        while self._kept:
            requests = self.take(_TO_DRIVER, 1)
            if not requests:
                return
            data = self._kept.popleft()
            written = requests[0].write(data)
            requests[0].complete(written)
            self._bytes -= written
            if written < len(data):
                self._kept.appendleft(data[written:])


class TerminalConsole(Console):
    """A console on a pseudo-terminal of this host, whose name stands in `terminal`."""

    terminal = ""

    async def open(self) -> None:
        self._ours, theirs = pty.openpty()
        self.terminal = os.ttyname(theirs)
        tty.setraw(theirs)
        # Held open, so that ours does not end while nobody has the terminal open.
        self._theirs = theirs
        os.set_blocking(self._ours, False)
        asyncio.get_running_loop().add_reader(self._ours, self._readable)

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        os.close(self._theirs)

    def received(self, data: bytes) -> None:
        try:
            os.write(self._ours, data)
        except OSError as error:
            # Nobody reads the terminal: what does not find room is lost, as on a serial line.
            if error.errno != errno.EAGAIN:
                raise

    def _readable(self) -> None:
        try:
            self.send(os.read(self._ours, 4096))
        except BlockingIOError:
            return
