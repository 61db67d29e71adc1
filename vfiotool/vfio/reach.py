"""Whether a mapped access to a device can work now: one place knows, and every path asks it.

A mapped register of a device that does not decode memory, sleeps, or is gone is a bus error, which
kills the process. `Reach` holds the reasons against an access, shuts the mappings before one comes
into force, and opens them when the last has gone. It is told by every write of configuration
space, in whatever width and by whatever method, and by resets and low power.

The kernel gives SIGBUS where Memory Space Enable is off, where the device is in D3hot or below,
and where it was allowed to sleep: vfio_pci_mmap_fault and __vfio_pci_memory_enabled in
drivers/vfio/pci/vfio_pci_core.c and vfio_pci_config.c. Registers: PCI Local Bus Specification 3.0,
6.2.2 (COMMAND) and 6.7; PCI Power Management 1.2, 3.2.4 (PMCSR); PCI Express Base 5.0, 7.5.3.4
(Device Control); Advanced Capabilities for Conventional PCI (AF).
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator

from vfiotool.errors import KernelError, NotPermitted, UsageError
from vfiotool.native import library as native

COMMAND = 0x04
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
_STATUS_HAS_LIST = 1 << 4
_CAPABILITIES = 0x34
_PM, _EXPRESS, _MSIX, _AF = 0x01, 0x10, 0x11, 0x13
_D3HOT = 3
# More cannot stand in 256 bytes; a list that goes in circles ends here.
_LIST_LIMIT = 48

_DECODE = "the device does not decode memory now (COMMAND, Memory Space Enable is off)"
_POWER = "the device is in D3hot (PMCSR, PowerState): it sleeps"
_LOW_POWER = "the device may sleep: low power was allowed"
_RESET = "a reset of the device is under way"
_GONE = "the device does not answer: it is gone"
_CLOSED = "it is closed"
_HINTS = {
    _DECODE: "turn it on first: device.set_memory_decode(True)",
    _POWER: "write 0 to PowerState of its PMCSR first",
    _LOW_POWER: "wake it first: device.low_power(False)",
    _RESET: "try again when it has ended",
}


class Reach:
    """The reasons against mapped accesses to the device called `name`, and its mappings.

    `read` reads (offset, width) of its configuration space; None for a device that has none:
    nothing but low power, resets and closing stand against its accesses.
    """

    def __init__(self, name: str, read: Callable[[int, int], int] | None) -> None:
        self.name = name
        self.lock = threading.RLock()
        self._read = read
        self._reasons: dict[str, None] = {}
        self._windows: weakref.WeakSet[native.Window] = weakref.WeakSet()
        self._capabilities = {} if read is None else _capabilities(read)
        _live.add(self)

    @property
    def reason(self) -> str | None:
        """Why an access cannot work now, or None."""
        return next(iter(self._reasons), None)

    def refuse(self) -> None:
        """Raises UsageError if a mapped access would be a bus error now."""
        reason = self.reason
        if reason is not None:
            raise UsageError(f"{self.name}: {reason}", hint=_HINTS.get(reason), device=self.name)

    def add(self, window: native.Window) -> None:
        """From now on `window` is shut and opened as the device can be reached."""
        with self.lock:
            self._windows.add(window)
            self._apply()

    def discard(self, window: native.Window) -> None:
        """`window` is closed."""
        with self.lock:
            self._windows.discard(window)

    def capability(self, number: int) -> int | None:
        """Where in configuration space the first capability of this id stands, or None."""
        return self._capabilities.get(number)

    @property
    def windows(self) -> list[native.Window]:
        """The mappings that were not closed."""
        with self.lock:
            return list(self._windows)

    def _note(self, reason: str, on: bool) -> None:
        if on:
            self._reasons[reason] = None
        else:
            self._reasons.pop(reason, None)

    def _shut(self, reason: str) -> None:
        self._note(reason, True)
        self._apply()

    def _apply(self) -> None:
        # Once, when all reasons are known: a mapping that opens for a moment is a bus error.
        reason = self.reason
        for window in list(self._windows):
            window.unreachable = reason
            # Returns when no loop in C is at it any more.
            window._block(reason is not None)

    def refresh(self) -> None:
        """Ask the device itself, as COMMAND and PMCSR stand."""
        with self.lock:
            if self._read is not None:
                self._ask(self._read)
            self._apply()

    def _ask(self, read: Callable[[int, int], int]) -> None:
        try:
            command = read(COMMAND, 2)
            power = self._capabilities.get(_PM)
            state = 0 if power is None else read(power + 4, 2) & 3
        except (KernelError, NotPermitted):
            command, state = 0xFFFF, 0
        self._note(_GONE, command == 0xFFFF)
        self._note(_DECODE, not command & COMMAND_MEMORY)
        self._note(_POWER, state == _D3HOT and command != 0xFFFF)

    def close(self) -> None:
        """No access from now on: the device is being closed."""
        with self.lock:
            self._shut(_CLOSED)

    @contextlib.contextmanager
    def resetting(self) -> Iterator[None]:
        """Around a reset: mapped accesses are refused until it has ended, well or badly."""
        with self.lock:
            self._shut(_RESET)
            try:
                yield
            finally:
                self._note(_RESET, False)
                self.refresh()

    def low_power(self, on: bool, ask: Callable[[], object]) -> None:
        """Around `ask`, which allows the device to sleep, or wakes it. If it fails, all is as it
        was."""
        with self.lock:
            before = _LOW_POWER in self._reasons
            if on:
                self._shut(_LOW_POWER)
            try:
                ask()
            except BaseException:
                self._note(_LOW_POWER, before)
                self._apply()
                raise
            self._note(_LOW_POWER, on)
            # A device that sleeps would be woken by the question.
            if not on:
                self.refresh()

    @contextlib.contextmanager
    def writing(self, offset: int, data: bytes) -> Iterator[None]:
        """Around a write of `data` to configuration space at `offset`: what would make mapped
        accesses impossible shuts them first, and afterwards the device is asked how it stands."""
        if not self._concerns(offset, len(data)):
            yield
            return
        with self.lock:
            coming = [reason for reason, on in self._meant(offset, data) if on]
            for reason in coming:
                self._shut(reason)
            try:
                yield
            finally:
                for reason in coming:
                    self._note(reason, False)
                self.refresh()

    def _registers(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of what a write can change reachability with."""
        yield COMMAND, 2
        at = self._capabilities
        for capability, place, length in (
            (_PM, 4, 2),
            (_EXPRESS, 8, 2),
            (_AF, 4, 1),
            (_MSIX, 2, 2),
        ):
            if capability in at:
                yield at[capability] + place, length

    def _concerns(self, offset: int, length: int) -> bool:
        return self._read is not None and any(
            offset < place + size and place < offset + length for place, size in self._registers()
        )

    def _meant(self, offset: int, data: bytes) -> Iterator[tuple[str, bool]]:
        """What the write would bring about, for each register that it reaches."""
        at = self._capabilities

        def byte(place: int) -> int | None:
            return data[place - offset] if offset <= place < offset + len(data) else None

        if (low := byte(COMMAND)) is not None:
            yield _DECODE, not low & COMMAND_MEMORY
        if _PM in at and (low := byte(at[_PM] + 4)) is not None:
            yield _POWER, low & 3 == _D3HOT
        if _EXPRESS in at and (high := byte(at[_EXPRESS] + 9)) is not None:
            yield _RESET, bool(high & 0x80)
        if _AF in at and (low := byte(at[_AF] + 4)) is not None:
            yield _RESET, bool(low & 1)


_live: weakref.WeakSet[Reach] = weakref.WeakSet()


def _after_fork() -> None:
    # Whoever held a lock is not in the child.
    for reach in list(_live):
        reach.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _capabilities(read: Callable[[int, int], int]) -> dict[int, int]:
    """Where the capabilities stand, by id: the first of each. PCI Local Bus 3.0, 6.7.

    Raises what `read` raises: a device whose power cannot be known is not to be mapped.
    """
    found: dict[int, int] = {}
    if not read(COMMAND + 2, 2) & _STATUS_HAS_LIST:
        return found
    place = read(_CAPABILITIES, 1) & ~3
    for _ in range(_LIST_LIMIT):
        if place < 0x40:
            break
        found.setdefault(read(place, 1), place)
        place = read(place + 1, 1) & ~3
    return found
