"""What an opened device is asked, whoever answers: the kernel through the device's file, or a
server over vfio-user (`vfio_user.py`).

Each call is an ioctl of <linux/vfio.h> or an access to the device's file, and answers as the
kernel does: raw structures, negative errnos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from vfiotool.native import library as native

What = Callable[[], str]


class DeviceCalls(Protocol):
    """`messages` tells that no file of the kernel's is behind it: interrupts are then triggered and
    masked through `irq_action`. A region's `position` is what its info says."""

    messages: bool

    def device_info(self, name: str) -> bytes: ...
    def region_info(self, index: int, name: str) -> bytes | None: ...
    def irq_info(self, index: int) -> tuple[int, int] | None: ...
    def read(self, position: int, width: int, what: What) -> int: ...
    def write(self, position: int, width: int, value: int, what: What) -> None: ...
    def copy_out(self, position: int, buffer: Any, what: str) -> None: ...
    def copy_in(self, position: int, buffer: Any, what: str) -> None: ...
    def irq_assign(self, index: int, start: int, descriptors: Sequence[int]) -> int: ...
    def irq_action(self, index: int, start: int, count: int, action: int) -> int: ...
    def irq_unmask_fd(self, index: int, descriptor: int) -> int: ...
    def reset(self, name: str) -> None: ...
    @contextmanager
    def mappable(self, position: int) -> Iterator[tuple[int, int]]:
        """The descriptor to map a region from, open within the block, and the place in it that
        `position` stands for."""
        yield -1, 0


class KernelCalls:
    """The device's own file."""

    messages = False

    def __init__(self, handle: native.Handle) -> None:
        self._handle = handle

    def device_info(self, name: str) -> bytes:
        with self._handle as fd:
            return native.device_info(fd, name)

    def region_info(self, index: int, name: str) -> bytes | None:
        with self._handle as fd:
            return native.region_info(fd, index, name)

    def irq_info(self, index: int) -> tuple[int, int] | None:
        with self._handle as fd:
            return native.irq_info(fd, index)

    def read(self, position: int, width: int, what: What) -> int:
        with self._handle as fd:
            return native.region_read(fd, position, width, what)

    def write(self, position: int, width: int, value: int, what: What) -> None:
        with self._handle as fd:
            native.region_write(fd, position, width, value, what)

    def copy_out(self, position: int, buffer: Any, what: str) -> None:
        with self._handle as fd:
            native.region_copy_out(fd, position, buffer, what)

    def copy_in(self, position: int, buffer: Any, what: str) -> None:
        with self._handle as fd:
            native.region_copy_in(fd, position, buffer, what)

    def irq_assign(self, index: int, start: int, descriptors: Sequence[int]) -> int:
        with self._handle as fd:
            return native.irq_assign(fd, index, start, descriptors)

    def irq_action(self, index: int, start: int, count: int, action: int) -> int:
        with self._handle as fd:
            return native.irq_action(fd, index, start, count, action)

    def irq_unmask_fd(self, index: int, descriptor: int) -> int:
        with self._handle as fd:
            return native.irq_unmask_fd(fd, index, descriptor)

    def reset(self, name: str) -> None:
        with self._handle as fd:
            native.device_reset(fd, name)

    @contextmanager
    def mappable(self, position: int) -> Iterator[tuple[int, int]]:
        with self._handle as fd:
            yield fd, position
