"""QEMU's edu device as a model: factorials, DMA, an interrupt.

Source: QEMU, docs/specs/edu.rst. As there, registers below 0x80 take accesses of 4 bytes and those
from 0x80 on 4 or 8; the DMA engine reaches 28 bits. A transfer takes `transfer_s` (QEMU's 100 ms).
"""

from __future__ import annotations

import threading

from vfiotool.models.bar import BarSpec, reads, writes
from vfiotool.models.device import Model
from vfiotool.models.dma import ClientMemory, DmaFault
from vfiotool.vfio import Register, RegisterMap

_BUFFER, _BUFFER_BYTES, _ADDRESS_BITS = 0x40000, 4096, 28
_FACTORIAL_DONE, _DMA_DONE = 0x001, 0x100
_RUN, _TO_MEMORY, _IRQ = 1, 2, 4
_COMPUTING, _IRQ_WHEN_DONE = 0x01, 0x80


class EduModelRegisters(RegisterMap):
    """docs/specs/edu.rst, "MMIO area spec"."""

    identification = Register(0x00, access="ro")
    liveness = Register(0x04)
    factorial = Register(0x08)
    status = Register(0x20)
    interrupt_status = Register(0x24, access="ro")
    interrupt_raise = Register(0x60, access="wo")
    interrupt_acknowledge = Register(0x64, access="wo")
    dma_source = Register(0x80, width=8)
    dma_destination = Register(0x88, width=8)
    dma_count = Register(0x90, width=8)
    dma_command = Register(0x98, width=8)


_R = EduModelRegisters


class EduModel(Model):
    """The device. It has no reset, as QEMU's has none."""

    vendor, device, class_code, revision = 0x1234, 0x11E8, 0x00FF00, 0x10
    subsystem = (0x1AF4, 0x1100)
    bars = (BarSpec(0, 1 << 20, registers=_R),)
    intx, msi, express, resets = True, 1, False, False

    def __init__(self, transfer_s: float = 0.0) -> None:
        self.transfer_s = transfer_s
        self.buffer = bytearray(_BUFFER_BYTES)
        self.faulted: DmaFault | None = None
        self._timer: threading.Timer | None = None
        super().__init__()

    def power_on(self) -> None:
        self.set(_R.identification, 0x010000ED)
        self.buffer[:] = bytes(_BUFFER_BYTES)

    def read(self, bar: int, offset: int, width: int) -> int:
        # QEMU's model declares no smaller accesses, and gives nothing for wider ones below 0x80.
        if width < 4:
            return 0
        return (1 << 64) - 1 if width == 8 and offset < 0x80 else super().read(bar, offset, width)

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        if width == 4 or (width == 8 and offset >= 0x80):
            super().write(bar, offset, value, width)

    @reads(_R.liveness)
    def inverted(self) -> int:
        return ~self.get(_R.liveness) & 0xFFFFFFFF

    @writes(_R.status)
    def set_status(self, value: int) -> None:
        self.set(_R.status, value & _IRQ_WHEN_DONE)

    @writes(_R.factorial)
    def compute(self, number: int) -> None:
        # Above 33 the product has 2**32 as a factor: it stays 0 (docs: "modulo 2**32").
        result = 1
        for factor in range(2, min(number, 40) + 1):
            result = result * factor & 0xFFFFFFFF
        self.set(_R.factorial, result)
        if self.get(_R.status) & _IRQ_WHEN_DONE:
            self.raise_cause(_FACTORIAL_DONE)

    def raise_cause(self, cause: int) -> None:
        self.set(_R.interrupt_status, self.get(_R.interrupt_status) | cause)
        if self.get(_R.interrupt_status):
            self.interrupt()

    @writes(_R.interrupt_raise)
    def raised(self, value: int) -> None:
        self.raise_cause(value)

    @writes(_R.interrupt_acknowledge)
    def acknowledged(self, value: int) -> None:
        self.set(_R.interrupt_status, self.get(_R.interrupt_status) & ~value)
        if not self.get(_R.interrupt_status):
            self.deassert()

    @writes(_R.dma_command)
    def run(self, command: int) -> None:
        if not command & _RUN or self._timer is not None:
            return
        if not self.transfer_s:
            self._transfer()
            return
        self._timer = threading.Timer(self.transfer_s, self._transfer)
        self._timer.daemon = True
        self._timer.start()

    def _transfer(self) -> None:
        with self.lock:
            self._timer = None
            if self.closed:
                return
            command = self.get(_R.dma_command)
            count = self.get(_R.dma_count)
            source, destination = self.get(_R.dma_source), self.get(_R.dma_destination)
            limit = (1 << _ADDRESS_BITS) - 1
            try:
                if command & _TO_MEMORY:
                    at = self._inside(source, count)
                    self.dma_write(destination & limit, self.buffer[at : at + count])
                else:
                    at = self._inside(destination, count)
                    self.buffer[at : at + count] = self.dma_read(source & limit, count)
            except DmaFault as fault:
                # As hardware: the transfer ends, its data is lost.
                self.faulted = fault
            self.set(_R.dma_command, command & ~_RUN)
            if command & _IRQ:
                self.raise_cause(_DMA_DONE)

    def _inside(self, address: int, count: int) -> int:
        at = address - _BUFFER
        if at < 0 or at + count > _BUFFER_BYTES:
            raise DmaFault(f"{count} bytes at {address:#x} leave the buffer")
        return at

    def start(self, memory: ClientMemory) -> None:
        self.faulted = None
        super().start(memory)
