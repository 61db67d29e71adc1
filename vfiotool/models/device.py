"""A PCI device as a Python class: what every model has.

A subclass declares ids, BARs and interrupts as class attributes, marks its handlers with `reads`
and `writes`, and puts itself into its first state in `power_on`. Handlers are called one at a time,
with `lock` held; a thread of the model's own takes `lock` for what it shares with them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

from vfiotool.errors import UsageError
from vfiotool.models.bar import Bar, BarSpec
from vfiotool.models.config import (
    COMMAND_MASTER,
    COMMAND_MEMORY,
    COMMAND_NO_INTX,
    COMMAND_PORTS,
    ModelConfig,
)
from vfiotool.models.declaration import check_declaration
from vfiotool.models.dma import ClientMemory, DmaFault
from vfiotool.models.faults import Faults
from vfiotool.models.signals import ERR, INTX, MSI, MSIX, REQ, Signals
from vfiotool.vfio import Register

CONFIG_INDEX, REGION_COUNT = 7, 9
_MADE = frozenset(
    ("lock", "faults", "config", "has_reset", "signals", "memory", "closed", "_bars", "_slept")
)


class Model:
    """A device. `msi` and `msix` are how many vectors it has; the MSI-X table lies at the start of
    BAR `msix_bar`. With `resets` it has a function level reset. A model is served by one
    `ModelServer` at a time; `close` gives its memory back.
    """

    vendor: ClassVar[int] = 0x1234
    device: ClassVar[int] = 0
    class_code: ClassVar[int] = 0xFF0000
    revision: ClassVar[int] = 0
    subsystem: ClassVar[tuple[int, int]] = (0, 0)
    bars: ClassVar[Sequence[BarSpec]] = ()
    intx: ClassVar[bool] = False
    msi: ClassVar[int] = 0
    msix: ClassVar[int] = 0
    msix_bar: ClassVar[int] = 0
    msix_offset: ClassVar[int] = 0
    express: ClassVar[bool] = True
    resets: ClassVar[bool] = True

    def __init__(self) -> None:
        self._make(self.make_config(self.bars), self.bars)

    def make_config(self, bars: Sequence[BarSpec]) -> ModelConfig:
        """Its configuration space, as declared. Raises UsageError for what cannot be declared."""
        check_declaration(self, bars)
        table = (self.msix, self.msix_bar, self.msix_offset) if self.msix else None
        return ModelConfig.of(
            vendor=self.vendor,
            device=self.device,
            class_code=self.class_code,
            revision=self.revision,
            subsystem=self.subsystem,
            bars=bars,
            intx=self.intx,
            msi=self.msi,
            msix=table,
            express=self.express,
            resets=self.resets,
        )

    def _make(self, config: ModelConfig, bars: Sequence[BarSpec]) -> None:
        self.lock = threading.RLock()
        self.faults = Faults()
        self.config = config
        self.has_reset = config.has_reset
        self.signals = Signals(self.interrupt_counts())
        self.memory: ClientMemory | None = None
        self.closed = False
        self._bars: dict[int, Bar] = {}
        try:
            for spec in bars:
                self._bars[spec.index] = Bar(spec, self)
        except BaseException:
            self.close()
            raise
        self._slept = False
        self._lost = False
        self.power_on()

    def __getattr__(self, name: str) -> Any:
        """What `_make` sets, used before it did."""
        kind = type(self).__name__
        if name in _MADE:
            raise UsageError(f"{kind}: `{name}` is used before super().__init__() was called")
        raise AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=self)

    def interrupt_counts(self) -> tuple[int, ...]:
        """How many interrupts there are of each index, from INTx to REQ."""
        counts = {INTX: int(self.intx), MSI: self.msi, MSIX: self.msix, ERR: 0, REQ: 1}
        return tuple(counts[index] for index in sorted(counts))

    def power_on(self) -> None:
        """Put the registers into their first state; storage is zero. Also after a reset."""

    def bar(self, index: int) -> Bar:
        """A BAR that is declared. Raises UsageError for one that is not."""
        found = self._bars.get(index)
        if found is None:
            there = ", ".join(map(str, self._bars)) or "none"
            raise UsageError(f"{type(self).__name__} has no BAR {index!r}; declared: {there}")
        return found

    def bar_or_none(self, index: int) -> Bar | None:
        return self._bars.get(index)

    def get(self, register: Register, bar: int = 0) -> int:
        """What is stored for a register."""
        return self.bar(bar).get(register)

    def set(self, register: Register, value: int, bar: int = 0) -> None:
        """Store a register's value, read-only ones too."""
        self.bar(bar).set(register, value)

    def fields(self, register: Register, bar: int = 0) -> dict[str, int]:
        """The fields of what is stored for a register."""
        return register.decode(self.get(register, bar))

    def dma_read(self, iova: int, count: int) -> bytes:
        """A copy of the client's memory. Raises DmaFault."""
        return self._reach().read(iova, count)

    def dma_write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Store into the client's memory. Raises DmaFault."""
        self._reach().write(iova, data)

    def _reach(self) -> ClientMemory:
        memory = self.memory
        if memory is None or self._is_gone():
            raise DmaFault("nobody is there whose memory could be reached")
        if not self.config.command & COMMAND_MASTER:
            raise DmaFault("Bus Master Enable is off")
        return memory

    def interrupt(self, vector: int = 0) -> None:
        """Signal a vector, by the kind that the client listens to; INTx is asserted until
        `deassert`. MSI and MSI-X are memory writes: they need Bus Master Enable. What the client
        has not turned on is lost. Raises UsageError for a vector that is not declared."""
        most = max(self.signals.counts[MSIX], self.signals.counts[MSI], 1)
        if not 0 <= vector < most:
            raise UsageError(f"{type(self).__name__}: vector {vector} of {most}; 0 is the first")
        if self._is_gone():
            return
        for index in (MSIX, MSI):
            if self.signals.uses(index):
                if self.config.command & COMMAND_MASTER:
                    self.signals.message(index, vector)
                return
        if self.intx and not self.config.command & COMMAND_NO_INTX:
            self.signals.level(True)

    def deassert(self) -> None:
        """Release the INTx pin; nothing for MSI and MSI-X."""
        self.signals.level(False)

    def region_size(self, index: int) -> int:
        """Bytes of a region; 0 for one that there is not."""
        if index == CONFIG_INDEX:
            return len(self.config.data)
        bar = self._bars.get(index)
        return 0 if bar is None else bar.spec.size

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """`count` bytes within a region, as a client reads them."""
        self.faults.wait()
        with self.lock:
            if self._is_gone():
                return b"\xff" * count
            if index == CONFIG_INDEX:
                data = self.config.read(offset, count)
                return self._lied(index, offset, data)
            out = bytearray()
            for at, width in pieces(offset, count):
                out += self._number("read", self.read(index, at, width), width)
            return self._lied(index, offset, bytes(out))

    def _lied(self, index: int, offset: int, data: bytes) -> bytes:
        lie, width = self.faults.lie, len(data)
        if lie is None or width not in (1, 2, 4, 8):
            return data
        value = lie(index, offset, width, int.from_bytes(data, "little"))
        return self._number("faults.lie", value, width)

    def _number(self, giver: str, value: object, width: int) -> bytes:
        """What the author's code gave for an access, as bytes; a larger number is cut."""
        if not isinstance(value, int):
            gave = type(value).__name__
            raise UsageError(f"{type(self).__name__}: `{giver}` gave {gave}, not a number")
        return (value & (1 << 8 * width) - 1).to_bytes(width, "little")

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Store within a region, as a client does."""
        self.faults.wait()
        with self.lock:
            if self._is_gone():
                return
            if index == CONFIG_INDEX:
                asks_reset = self.config.write(offset, data)
                self._after_config()
                if asks_reset:
                    self.reset()
                return
            for at, width in pieces(offset, len(data)):
                value = int.from_bytes(data[at - offset : at - offset + width], "little")
                self.write(index, at, value, width)

    def _after_config(self) -> None:
        if self.config.sleeps:
            self._slept = True
        elif self._slept:
            self._slept = False
            if self.faults.d3_gone:
                self.faults.gone = True
        self.config_written()

    def config_written(self) -> None:
        """Called after each write of configuration space."""

    def read(self, bar: int, offset: int, width: int) -> int:
        """One aligned access to a BAR; override for a device with rules of its own."""
        return self.bar(bar).read(offset, width)

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        """As `read`."""
        self.bar(bar).write(offset, value, width)

    def reset(self) -> None:
        """Reset the function, as the faults allow. Raises UsageError where it is to fail."""
        fault = self.faults.reset
        if fault == "hangs":
            self.faults.released.wait()
            return
        if fault == "fails":
            raise UsageError("the reset failed")
        with self.lock:
            if fault == "nothing" or self.faults.gone:
                return
            if fault == "lost":
                self._lost = True
                return
            self._lost = False
            self.signals.level(False)
            self.config.reset()
            self._slept = False
            for bar in self._bars.values():
                bar.clear()
            self.power_on()

    def _is_gone(self) -> bool:
        """Whether nothing of the function is to be seen: it was removed, or is in a reset that it
        does not come back from before the fault is lifted, and then has behind it."""
        if self._lost and self.faults.reset != "lost":
            self._lost = False
            self.reset()
        return self.faults.gone or self._lost

    def answers(self, index: int) -> bool:
        """Whether it answers to a region now: as vfio-pci has it, a BAR whose decode is off, or of
        a device in D3hot, does not."""
        bar = self._bars.get(index)
        if bar is None or self._is_gone():
            return True
        wanted = COMMAND_PORTS if bar.spec.ports else COMMAND_MEMORY
        return bool(self.config.command & wanted) and not self.config.sleeps

    def start(self, memory: ClientMemory) -> None:
        """A client is there: its memory can be reached."""
        self.memory = memory

    def stop(self) -> None:
        """The client has gone: nothing of his is touched once this returns."""
        with self.lock:
            self.memory = None
            self.signals.close()

    def close(self) -> None:
        """Give the memory of the BARs back."""
        if not self.closed:
            self.closed = True
            self.faults.released.set()
            for bar in self._bars.values():
                bar.close()


def pieces(offset: int, count: int) -> list[tuple[int, int]]:
    """An access as aligned ones of 8, 4, 2 and 1 bytes: (offset, width)."""
    found = []
    end = offset + count
    while offset < end:
        width = 8
        while offset % width or offset + width > end:
            width //= 2
        found.append((offset, width))
        offset += width
    return found
