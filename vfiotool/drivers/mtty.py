"""The kernel's sample mediated device mtty: a PCI card with one or two 16550 serial ports.

Source: Linux, samples/vfio-mdev/mtty.c; National Semiconductor PC16550D data sheet, section 8.
Each port is a loop: what is written to THR comes back from RBR, through a FIFO of 16. The sample
takes a full FIFO for an empty one (its head and tail meet), so at most 15 bytes are in it here.
"""

from __future__ import annotations

from collections.abc import Iterator

from vfiotool.drivers import Check, DeviceId
from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio import Device, Register, RegisterMap

VENDOR, DEVICE = 0x4348, 0x3253
DRIVES = {"mtty": (DeviceId(VENDOR, DEVICE),)}
FIFO_BYTES = 15


class UartRegisters(RegisterMap):
    """PC16550D, table II. All registers are one byte wide."""

    receive = Register(0, width=1, access="rc")
    transmit = Register(0, width=1, access="wo")
    interrupt_enable = Register(
        1, width=1, fields={"received": (0, 0), "transmit_empty": (1, 1), "line_status": (2, 2)}
    )
    interrupt_identification = Register(2, width=1, access="ro", fields={"none_pending": (0, 0)})
    fifo_control = Register(
        2, width=1, access="wo", fields={"enable": (0, 0), "clear_rx": (1, 1), "clear_tx": (2, 2)}
    )
    line_control = Register(3, width=1, fields={"divisor_latch": (7, 7), "word_length": (1, 0)})
    modem_control = Register(4, width=1)
    line_status = Register(
        5,
        width=1,
        access="ro",
        fields={"data_ready": (0, 0), "overrun": (1, 1), "transmit_empty": (5, 5)},
    )
    modem_status = Register(6, width=1, access="ro")
    scratch = Register(7, width=1)


class SerialPort:
    """One port of the card: `number` 0 or 1. The FIFO is enabled and emptied."""

    def __init__(self, device: Device, number: int = 0, *, clear: bool = True) -> None:
        if (device.vendor, device.device) != (VENDOR, DEVICE):
            raise UsageError(f"{device.name} is not an mtty", device=device.name)
        self.registers = UartRegisters(device.region(number))
        if clear:
            self.registers.line_control.set(word_length=3)
            self.registers.fifo_control.set(enable=1, clear_rx=1, clear_tx=1)

    @property
    def pending(self) -> bool:
        """Whether a byte waits to be read."""
        return bool(self.registers.line_status.field("data_ready"))

    def send(self, data: bytes) -> None:
        """Write bytes. Raises UsageError for more than the FIFO takes at once, KernelError if the
        port reports an overrun."""
        if len(data) > FIFO_BYTES:
            raise UsageError(f"{len(data)} bytes at once; the port's FIFO takes {FIFO_BYTES}")
        for byte in data:
            self.registers.transmit.write(byte)
        if self.registers.line_status.field("overrun"):
            raise KernelError("the serial port reports an overrun: bytes were lost")

    def receive(self) -> bytes:
        """All bytes that wait."""
        data = bytearray()
        while self.pending and len(data) <= FIFO_BYTES:
            data.append(self.registers.receive.read())
        return bytes(data)


def demo(device: Device) -> Iterator[Check]:
    """Scratch register, a text through each port's loop, an interrupt on receiving."""
    ports = [region.index for region in device.regions if region and region.index < 2]
    numbers = [n for n in ports if (info := device.regions[n]) is not None and info.size]
    with device.irqs.msi() as interrupts:
        for number in numbers:
            port = SerialPort(device, number)
            port.registers.scratch.write(0xA5)
            scratch = port.registers.scratch.read()
            yield Check(f"port {number}: scratch", scratch == 0xA5, f"{scratch:#x}")

            text = b"hello, mtty" + bytes([48 + number])
            port.send(text)
            back = port.receive()
            yield Check(f"port {number}: loop", back == text, f"{text!r} came back as {back!r}")

            port.registers.interrupt_enable.set(received=1)
            port.send(b"!")
            fired = interrupts[0].wait(5.0)
            port.registers.interrupt_enable.set()
            rest = port.receive()
            passed = fired == 1 and rest == b"!"
            yield Check(f"port {number}: interrupt", passed, f"{fired} MSI on receiving {rest!r}")


def registers_of(device: Device) -> UartRegisters:
    """The first port's registers, for `device dump`."""
    return UartRegisters(device.region(0))
