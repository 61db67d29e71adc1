"""QEMU's pci-testdev: counts the writes that reach it, through memory and through I/O ports.

Source: QEMU, docs/specs/pci-testdev.rst and the header it describes. Writing a test's number to
offset 0 starts it; the header then tells where to write what, and counts the writes that did.
Registers are one byte wide, whatever they hold: a number of four bytes is read byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vfiotool.drivers import Check, DeviceId
from vfiotool.errors import UsageError
from vfiotool.vfio import Device, Registers

VENDOR, DEVICE = 0x1B36, 0x0005
DRIVES = {"pci_testdev": (DeviceId(VENDOR, DEVICE),)}
MEMORY_BAR, PORT_BAR = 0, 1
# struct pci_test_dev_hdr: test, width, pad, offset (4), data, pad, count (4), name.
_TEST, _WIDTH, _OFFSET, _DATA, _COUNT, _NAME = 0x00, 0x01, 0x04, 0x08, 0x0C, 0x10
_TESTS = 3
_WRITES = 16


@dataclass(frozen=True, slots=True)
class TestHeader:
    """What the device says of the running test: write `data` (`width` bytes) to `offset`."""

    test: int
    width: int
    offset: int
    data: int
    count: int
    name: str


class PciTestdev:
    """The device. Raises UsageError if `device` is not a pci-testdev."""

    def __init__(self, device: Device) -> None:
        if (device.vendor, device.device) != (VENDOR, DEVICE):
            raise UsageError(f"{device.name} is not a pci-testdev", device=device.name)
        self.device = device
        self.memory: Registers = device.region(MEMORY_BAR).access()
        # Ports cannot be mapped: the kernel does each access.
        self.ports: Registers = device.region(PORT_BAR)

    def start(self, bar: Registers, test: int) -> TestHeader:
        """Start test number `test`; its count is then 0."""
        bar.write8(_TEST, test)
        return self.header(bar)

    def header(self, bar: Registers) -> TestHeader:
        """The header of the test that runs."""
        name = bytearray()
        while (byte := bar.read8(_NAME + len(name))) and len(name) < 64:
            name.append(byte)
        return TestHeader(
            test=bar.read8(_TEST),
            width=bar.read8(_WIDTH),
            offset=_word(bar, _OFFSET),
            data=bar.read8(_DATA),
            count=_word(bar, _COUNT),
            name=name.decode("ascii", "backslashreplace"),
        )


def _word(bar: Registers, offset: int) -> int:
    # QEMU's model answers wider reads with the sign of each byte smeared over it.
    return sum((bar.read8(offset + i) & 0xFF) << 8 * i for i in range(4))


def demo(device: Device) -> Iterator[Check]:
    """Each test of both BARs: every write counted, or none where QEMU takes them."""
    testdev = PciTestdev(device)
    for kind, bar in (("memory", testdev.memory), ("ports", testdev.ports)):
        for number in range(_TESTS):
            header = testdev.start(bar, number)
            for _ in range(_WRITES):
                bar.write8(header.offset, header.data)
            counted = testdev.header(bar).count
            # QEMU hands the writes of the tests with an eventfd to its notifier, past the count.
            expected = _WRITES if header.name.endswith("no-eventfd") else 0
            detail = f"{counted} of {_WRITES} writes to {header.offset:#x} counted ({expected} due)"
            yield Check(f"{kind}: {header.name or number}", counted == expected, detail)
