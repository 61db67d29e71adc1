"""QEMU's pci-testdev as a model: counts the writes that reach it.

Source: QEMU, docs/specs/pci-testdev.rst. Of the three tests of each BAR one counts in the device;
the writes of the two others go to an eventfd, past the count. Accesses are of one byte.
"""

from __future__ import annotations

import struct

from vfiotool.models.bar import BarSpec
from vfiotool.models.device import Model

_KINDS = ("no-eventfd", "wildcard-eventfd", "datamatch-eventfd")
# By BAR: what its tests are called, and where their registers begin.
_BARS = {0: ("mmio", 2048), 1: ("portio", 128)}
_DATA = 0xFA
_COUNT = 0x0C
# struct pci_test_dev_hdr: test, width, offset, data, count, name.
_HEADER = struct.Struct("<BB2xIII")


class PciTestdevModel(Model):
    """The device. `counts` is how many writes each running test of a BAR has seen."""

    vendor, device, class_code = 0x1B36, 0x0005, 0x00FF00
    subsystem = (0x1AF4, 0x1100)
    bars = (BarSpec(0, 4096), BarSpec(1, 256, ports=True))
    express, resets = False, False

    def power_on(self) -> None:
        self._running: tuple[int, int] | None = None
        self._header = b""
        self._target = 0

    def read(self, bar: int, offset: int, width: int) -> int:
        return self._header[offset] if offset + width < len(self._header) else 0

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        if offset == 0:
            self._start(bar, value)
        elif self._running == (bar, 0) and offset == self._target:
            (count,) = struct.unpack_from("<I", self._header, _COUNT)
            counted = struct.pack("<I", count + 1 & 0xFFFFFFFF)
            self._header = self._header[:_COUNT] + counted + self._header[_COUNT + 4 :]

    def _start(self, bar: int, test: int) -> None:
        self.power_on()
        if test < len(_KINDS):
            kind, base = _BARS[bar]
            self._running, self._target = (bar, test), base + test
            name = f"{kind}-{_KINDS[test]}".encode()
            self._header = _HEADER.pack(test, 1, self._target, _DATA, 0) + name + b"\0\0"
