"""An opened device as its regions, interrupts and mappings see it: a name, a file, and whether it
can be reached."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NoReturn

from vfiotool.errors import UsageError
from vfiotool.native import library as native
from vfiotool.vfio.calls import DeviceCalls, KernelCalls
from vfiotool.vfio.caps import CONFIG_REGION, DeviceInfo, RegionInfo, parse_device, parse_region
from vfiotool.vfio.reach import Reach
from vfiotool.vfio.trace import Trace


def refuse_child(generation: int) -> None:
    """Raises UsageError in a child of the process that was in fork generation `generation`."""
    if generation != native.fork_generation():
        raise UsageError(
            "this process is a child of the one that opened the device",
            hint="open the device after the fork, in the process that drives it",
        )


def refuse_pickle(thing: object, _protocol: object) -> NoReturn:
    """For `__reduce_ex__` of what belongs to one process: raises TypeError, which says why."""
    raise TypeError(
        f"a {type(thing).__name__} cannot be pickled or copied: it holds descriptors and mappings "
        "of this process; open the device by its name in the process that drives it"
    )


class OpenDevice:
    """What `Region`, `Mapping` and `Interrupts` hold of the device that they belong to.

    `calls` asks it. `handle` is its file: `with device.use() as fd` keeps the descriptor open for
    what only the kernel answers, whatever other threads close meanwhile.
    """

    def __init__(
        self,
        name: str,
        handle: native.Handle,
        trace: Trace | None,
        calls: DeviceCalls | None = None,
    ) -> None:
        self.name = name
        self.handle = handle
        self.trace = trace
        self.generation = native.fork_generation()
        self._closed = False
        self._calls = calls or KernelCalls(handle)
        self.info: DeviceInfo = parse_device(self.calls.device_info(name))
        self.reach = Reach(name, self._config_reader() if self.info.is_pci else None)

    __reduce_ex__ = refuse_pickle

    def _config_reader(self) -> Callable[[int, int], int] | None:
        config = self.ask_region(CONFIG_REGION)
        if config is None or not config.readable:
            return None
        position = config.position

        def read(offset: int, width: int) -> int:
            return self._calls.read(
                position + offset, width, lambda: f"configuration space of {self.name}"
            )

        return read

    def ask_region(self, index: int) -> RegionInfo | None:
        """What the kernel tells of the region `index`; None where there is none."""
        raw = self.calls.region_info(index, self.name)
        return None if raw is None else parse_region(raw, index)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def refuse_closed(self) -> None:
        """Raises UsageError once the device is closed, and in a child process."""
        refuse_child(self.generation)
        if self._closed:
            raise UsageError(f"{self.name} is closed", device=self.name)

    @property
    def calls(self) -> DeviceCalls:
        """What asks the device. Raises UsageError once it is closed, and in a child process."""
        self.refuse_closed()
        return self._calls

    def use(self) -> native.Handle:
        """The device's file, for `with device.use() as fd`: no other thread closes the descriptor
        within. Raises UsageError once the device is closed, and in a child process."""
        self.refuse_closed()
        return self.handle

    def close(self) -> None:
        """Let go of the file."""
        self._closed = True
        self.handle.close()

    def after_reset(self) -> None:
        """What is to be done when the device was reset."""
        self.reach.refresh()


_open: set[str] = set()
_open_lock = threading.Lock()


def enter_open(name: str) -> bool:
    """Note that the device called `name` is open in this process; False if it is already."""
    with _open_lock:
        if name in _open:
            return False
        _open.add(name)
        return True


def leave_open(name: str) -> None:
    """Note that it no longer is."""
    _open.discard(name)


def _after_fork() -> None:
    global _open_lock
    _open_lock = threading.Lock()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
