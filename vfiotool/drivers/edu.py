"""QEMU's edu device: factorials, DMA and an interrupt, made for learning.

Source: QEMU, docs/specs/edu.rst ("Command line switches", "MMIO area spec"). Registers below 0x80
take accesses of 4 bytes only, those from 0x80 on 4 or 8. The DMA engine moves at most 4096 bytes
between memory and a buffer of its own, reaches 28 bits of address, and takes 100 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import factorial

from vfiotool.drivers import Check, DeviceId
from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio import Device, Interrupt, Register, RegisterMap

VENDOR, DEVICE = 0x1234, 0x11E8
DRIVES = {"edu": (DeviceId(VENDOR, DEVICE),)}
ADDRESS_BITS = 28
BUFFER_START = 0x40000
BUFFER_SIZE = 4096
_IRQ_FACTORIAL = 0x001
_IRQ_DMA = 0x100


class EduRegisters(RegisterMap):
    """docs/specs/edu.rst, "MMIO area spec"."""

    identification = Register(
        0x00, access="ro", fields={"major": (31, 24), "minor": (23, 16), "edu": (15, 0)}
    )
    liveness = Register(0x04)
    factorial = Register(0x08)
    status = Register(0x20, fields={"computing": (0, 0), "irq_when_done": (7, 7)})
    interrupt_status = Register(0x24, access="ro")
    interrupt_raise = Register(0x60, access="wo")
    interrupt_acknowledge = Register(0x64, access="wo")
    dma_source = Register(0x80, width=8)
    dma_destination = Register(0x88, width=8)
    dma_count = Register(0x90, width=8)
    dma_command = Register(
        0x98, width=8, fields={"run": (0, 0), "to_memory": (1, 1), "irq_when_done": (2, 2)}
    )


class Edu:
    """The device, ready to use: identified, bus mastering on, one MSI.

    Raises UsageError if `device` is not an edu. When the device is closed, a transfer under way
    is waited for first, so that it does not run into freed memory.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.registers = EduRegisters(device.region(0).access())
        if (device.vendor, device.device) != (VENDOR, DEVICE):
            raise UsageError(f"{device.name} is not an edu device", device=device.name)
        # A driver that was killed may have left a transfer running, and edu has no reset: with
        # bus mastering still off it ends without touching memory.
        self.wait_idle()
        self.registers.interrupt_acknowledge.write(self.registers.interrupt_status.read())
        self.interrupt: Interrupt = device.irqs.msi()[0]
        device.set_bus_master(True)
        device.on_close(self.wait_idle)

    def wait_idle(self, timeout_s: float = 5.0) -> None:
        """Until no transfer runs. Raises KernelError (ETIMEDOUT)."""
        self.registers.dma_command.poll_field("run", 0, timeout_s)

    def factorial(self, number: int, timeout_s: float = 5.0) -> int:
        """`number`! modulo 2³², computed by the device, waited for by its interrupt."""
        registers = self.registers
        registers.status.set(irq_when_done=1)
        registers.factorial.write(number)
        self._await(_IRQ_FACTORIAL, timeout_s)
        registers.status.set(irq_when_done=0)
        return registers.factorial.read()

    def dma(self, iova: int, offset: int, count: int, *, to_memory: bool) -> None:
        """Move `count` bytes between `iova` and the device's buffer at `offset`; returns when
        the interrupt came. Raises UsageError for what leaves the buffer (edu does not check)."""
        if count <= 0 or offset < 0 or offset + count > BUFFER_SIZE:
            raise UsageError(f"{count} bytes at {offset:#x} leave edu's buffer of {BUFFER_SIZE}")
        if iova + count > 1 << ADDRESS_BITS:
            raise UsageError(f"I/O address {iova:#x} is beyond edu's {ADDRESS_BITS} bits")
        registers = self.registers
        inside = BUFFER_START + offset
        registers.dma_source.write(inside if to_memory else iova)
        registers.dma_destination.write(iova if to_memory else inside)
        registers.dma_count.write(count)
        registers.dma_command.set(run=1, to_memory=int(to_memory), irq_when_done=1)
        self._await(_IRQ_DMA, 5.0)

    def _await(self, cause: int, timeout_s: float) -> None:
        if not self.interrupt.wait(timeout_s):
            raise KernelError(
                f"no interrupt from {self.device.name} in {timeout_s:g} s", errno_name="ETIMEDOUT"
            )
        seen = self.registers.interrupt_status.read()
        self.registers.interrupt_acknowledge.write(seen)
        if not seen & cause:
            raise KernelError(f"{self.device.name} raised {seen:#x}, not {cause:#x}")


def demo(device: Device) -> Iterator[Check]:
    """Identification, liveness, factorial, DMA both ways, the interrupt raised by hand."""
    edu = Edu(device)
    registers = edu.registers
    fields = registers.identification.fields()
    seen = f"edu {fields['major']}.{fields['minor']}, {fields['edu']:#x}"
    yield Check("identification", fields["edu"] == 0xED, seen)

    registers.liveness.write(0x12345678)
    inverted = registers.liveness.read()
    yield Check("liveness", inverted == 0xEDCBA987, f"0x12345678 came back as {inverted:#x}")

    result = edu.factorial(10)
    yield Check("factorial", result == factorial(10), f"10! = {result}, by interrupt")

    # Not the whole buffer: QEMU 7.2 ends, with all of its guest, when a transfer reaches the last
    # byte of it (hw/misc/edu.c, edu_check_range).
    size = BUFFER_SIZE // 2
    with device.dma.alloc(2 * size, limit_bits=ADDRESS_BITS) as memory:
        sent = os.urandom(size)
        memory.view[:size] = sent
        edu.dma(memory.iova, 0, size, to_memory=False)
        edu.dma(memory.iova + size, 0, size, to_memory=True)
        back = bytes(memory.view[size : 2 * size])
        wrong = sum(a != b for a, b in zip(sent, back, strict=True))
        where = f"{size} bytes to the device and back at {memory.iova:#x}"
        yield Check("dma", wrong == 0, f"{where}: {wrong} differ")

    registers.interrupt_raise.write(0x42)
    fired = edu.interrupt.wait(5.0)
    cause = registers.interrupt_status.read()
    registers.interrupt_acknowledge.write(cause)
    yield Check("interrupt", fired == 1 and cause == 0x42, f"{fired} MSI, cause {cause:#x}")


def registers_of(device: Device) -> EduRegisters:
    """The device's registers, for `device dump`."""
    return EduRegisters(device.region(0))
