"""A model's interrupts: which of the client's eventfds each one signals now.

The semantics are VFIO_DEVICE_SET_IRQS's of <linux/vfio.h>: INTx is level-triggered, masked when it
fires and signalled again by an unmask while it is still asserted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading

from vfiotool.host.paths import PROC
from vfiotool.vfio import user_message as wire

INTX, MSI, MSIX, ERR, REQ = range(5)
_ONE = struct.pack("=Q", 1)


def _is_eventfd(file: int) -> bool:
    """Whether it is one, as the kernel's VFIO demands; signalled, another kind of file could keep
    the model waiting."""
    try:
        return os.readlink(f"{PROC}/self/fd/{file}") == "anon_inode:[eventfd]"
    except OSError:
        return False


class Signals:
    """The descriptors are its own; `close` closes them. Any thread may call it."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts
        self._lock = threading.Lock()
        self._files: dict[tuple[int, int], int] = {}
        self._masked: set[tuple[int, int]] = set()
        self._asserted = False
        # How often each was signalled, for tests and figures.
        self.fired: dict[tuple[int, int], int] = {}

    def flags(self, index: int) -> int:
        """What DEVICE_GET_IRQ_INFO says of an index."""
        if index == INTX:
            return wire.IRQ_EVENTFD_FLAG | wire.IRQ_MASKABLE_FLAG | wire.IRQ_AUTOMASKED_FLAG
        return wire.IRQ_EVENTFD_FLAG

    def set(
        self, flags: int, index: int, start: int, count: int, data: bytes, files: list[int]
    ) -> int:
        """DEVICE_SET_IRQS: 0 or an errno. It takes what it keeps out of `files`."""
        if not 0 <= index < len(self.counts) or start + count > self.counts[index]:
            return errno.EINVAL
        kind, action = flags & 7, flags & ~7
        if kind == wire.DATA_BOOL and len(data) < count:
            return errno.EINVAL
        if kind == wire.DATA_EVENTFD:
            if action != wire.ACTION_TRIGGER:
                return errno.EOPNOTSUPP
            return self._assign(index, start, count, files)
        if kind not in (wire.DATA_NONE, wire.DATA_BOOL) or files:
            return errno.EINVAL
        if not count:
            if kind != wire.DATA_NONE or action != wire.ACTION_TRIGGER:
                return errno.EINVAL
            self._off(index)
            return 0
        chosen = [
            start + at
            for at in range(count)
            if kind == wire.DATA_NONE or data[at : at + 1] != b"\0"
        ]
        return self._act(action, index, chosen)

    def _assign(self, index: int, start: int, count: int, files: list[int]) -> int:
        if (files and len(files) != count) or not all(_is_eventfd(file) for file in files):
            return errno.EINVAL
        with self._lock:
            for vector in range(start, start + count):
                self._drop((index, vector))
            for vector in range(start, start + len(files)):
                file = files.pop(0)
                os.set_blocking(file, False)
                self._files[index, vector] = file
            if index == INTX:
                self._masked.clear()
                self._show()
        return 0

    def _drop(self, key: tuple[int, int]) -> None:
        file = self._files.pop(key, None)
        if file is not None:
            os.close(file)

    def _off(self, index: int) -> None:
        with self._lock:
            for key in [key for key in self._files if key[0] == index]:
                self._drop(key)

    def _act(self, action: int, index: int, vectors: list[int]) -> int:
        with self._lock:
            if action == wire.ACTION_TRIGGER:
                for vector in vectors:
                    self._signal((index, vector))
                return 0
            if index != INTX or action not in (wire.ACTION_MASK, wire.ACTION_UNMASK):
                return errno.EOPNOTSUPP if action in (8, 16) else errno.EINVAL
            for vector in vectors:
                if action == wire.ACTION_MASK:
                    self._masked.add((index, vector))
                else:
                    self._masked.discard((index, vector))
            self._show()
        return 0

    def _signal(self, key: tuple[int, int]) -> None:
        file = self._files.get(key)
        if file is None:
            return
        self.fired[key] = self.fired.get(key, 0) + 1
        # Full: the client's own loss.
        with contextlib.suppress(OSError):
            os.write(file, _ONE)

    def _show(self) -> None:
        if self._asserted and (INTX, 0) in self._files and (INTX, 0) not in self._masked:
            self._masked.add((INTX, 0))
            self._signal((INTX, 0))

    def uses(self, index: int) -> bool:
        """Whether the client listens to this kind."""
        with self._lock:
            return any(key[0] == index for key in self._files)

    def message(self, index: int, vector: int) -> None:
        """Send an MSI or MSI-X."""
        with self._lock:
            self._signal((index, vector))

    def level(self, asserted: bool) -> None:
        """Assert or release the INTx pin."""
        with self._lock:
            self._asserted = asserted
            self._show()

    def close(self) -> None:
        """Let go of all descriptors."""
        with self._lock:
            for key in list(self._files):
                self._drop(key)
            self._masked.clear()
