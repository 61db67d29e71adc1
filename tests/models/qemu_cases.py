"""The cases of test_conformance.py that a client without the model's process can ask, in a guest.

`python -m tests.models.qemu_cases ADDRESS` runs them through the guest's own vfio-pci: QEMU is the
model's client then. Prints a line a case, and last what a register read takes.
"""

from __future__ import annotations

import sys
import time

from tests.models.test_conformance import Card, CardRegisters
from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio import Device

_READS = 300


def says_what_it_is(device: Device) -> None:
    assert (device.vendor, device.device, device.class_code) == (0xABCD, 0x1234, 0x0B4000)
    assert device.info.is_pci and device.info.has_reset
    assert device.config.read8(8) == 7 and device.config.read32(0x2C) == 0x22221111
    sizes = [info.size if info else None for info in device.regions[:6]]
    assert sizes == [0x2000, 0, 1 << 16, 0, 64, 0], sizes
    counts = [info.count if info else 0 for info in device.irqs.infos]
    assert counts[:3] == [1, 4, 8], counts


def tells_the_sizes_of_its_bars(device: Device) -> None:
    config = device.config
    for offset, low in ((0x10, 0xFFFFE000), (0x18, 0xFFFF000C), (0x20, 0xFFFFFFC1)):
        before = config.read32(offset)
        config.write32(offset, 0xFFFFFFFF)
        assert config.read32(offset) == low, hex(config.read32(offset))
        config.write32(offset, before)


def keeps_its_ids(device: Device) -> None:
    device.config.write32(0, 0)
    assert (device.vendor, device.device) == (0xABCD, 0x1234)


def has_registers_of_each_kind(device: Device) -> None:
    registers = CardRegisters(device.region(0).access())
    assert registers.ident.read() == 0xC0FFEE
    device.region(0).write32(0, 1)
    assert registers.ident.read() == 0xC0FFEE, "read-only"
    registers.scratch.write(0x12345678)
    assert [device.region(0).read8(4 + n) for n in range(4)] == [0x78, 0x56, 0x34, 0x12]
    device.region(0).write16(6, 0xBEEF)
    assert registers.scratch.read() == 0xBEEF5678
    first = device.region(0).read32(0x10)
    assert [device.region(0).read32(0x10) - first for _ in range(2)] == [1, 2], "read with effect"
    registers.byte.write(0xA5)
    assert registers.byte.read() == 0xA5


def has_memory_that_both_ways_see(device: Device) -> None:
    region = device.region(2)
    with region.map() as mapping:
        mapping.write32(0x100, 0xFEEDFACE)
        assert region.read32(0x100) == 0xFEEDFACE
        region.write_bytes(0x8000, bytes(range(256)) * 16)
        assert bytes(mapping.read_many(0x8000, 4096, width=1)) == bytes(range(256)) * 16


def does_not_answer_with_decode_off(device: Device) -> None:
    device.set_memory_decode(False)
    try:
        device.region(0).read32(0)
    except (KernelError, UsageError):
        pass
    else:
        raise AssertionError("it answered")
    device.set_memory_decode(True)
    assert device.region(0).read32(0) == 0xC0FFEE


def signals_one_for_one(device: Device) -> None:
    device.set_bus_master(True)
    registers = CardRegisters(device.region(0).access())
    for kind, count in ((device.irqs.msix, 8), (device.irqs.msi, 4)):
        with kind(count) as vectors:
            # One after the other: what is pending already an interrupt controller takes once.
            for number in (3, 0, 2, 2, 1):
                registers.go.write(number)
                assert vectors[number].wait(20) == 1, number
            assert not any(vectors[number].wait(0) for number in range(4))


def is_reset(device: Device) -> None:
    registers = CardRegisters(device.region(0).access())
    registers.scratch.write(7)
    device.reset()
    device.set_memory_decode(True)
    assert registers.scratch.read() == 0 and registers.ident.read() == 0xC0FFEE


CASES = (
    says_what_it_is,
    tells_the_sizes_of_its_bars,
    keeps_its_ids,
    has_registers_of_each_kind,
    has_memory_that_both_ways_see,
    does_not_answer_with_decode_off,
    signals_one_for_one,
    is_reset,
)


def main(address: str) -> None:
    for case in CASES:
        with Device.open(address) as device:
            device.set_memory_decode(True)
            case(device)
        print(f"passed: {case.__name__}", flush=True)
    with Device.open(address) as device:
        device.set_memory_decode(True)
        region, times = device.region(0), []
        for _ in range(5):
            begun = time.perf_counter()
            for _ in range(_READS):
                region.read32(0)
            times.append((time.perf_counter() - begun) / _READS * 1e6)
    assert Card.vendor == 0xABCD
    print(f"a register read: {min(times):.0f} us, the fastest of 5 rounds of {_READS}")


if __name__ == "__main__":
    main(sys.argv[1])
