"""A model's BARs: memory, registers in it, and the handlers of registers.

The registers are declared by the `RegisterMap` that the driver uses. What has no handler is plain
storage. Memory is a file's, so that parts of it can be shared with the client.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vfiotool.errors import UsageError
from vfiotool.vfio import Area, Register, RegisterMap

Handler = TypeVar("Handler", bound=Callable[..., Any])
PAGE = 4096


@dataclass(frozen=True, slots=True)
class BarSpec:
    """BAR `index` of `size` bytes (a power of two). `ports`: I/O ports, otherwise memory, `wide`
    for a 64-bit address. `registers` declares what is in it; `shared` are the areas that the
    client maps, whose accesses no handler sees."""

    index: int
    size: int
    registers: type[RegisterMap] | None = None
    ports: bool = False
    wide: bool = False
    prefetchable: bool = False
    shared: tuple[Area, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.index, int) or not isinstance(self.size, int):
            raise UsageError(f"BAR {self.index!r} of {self.size!r} bytes: both are numbers")
        kind = self.registers
        if kind is not None and not (isinstance(kind, type) and issubclass(kind, RegisterMap)):
            raise UsageError(
                f"BAR {self.index}: `registers` is a RegisterMap's class, not {kind!r}"
            )
        shared = self.shared
        if not isinstance(shared, tuple) or not all(isinstance(one, Area) for one in shared):
            raise UsageError(f"BAR {self.index}: `shared` is a tuple of Area, not {shared!r}")
        last = 4 if self.wide else 5
        if not 0 <= self.index <= last or self.size < 4 or self.size & (self.size - 1):
            raise UsageError(
                f"BAR {self.index} of {self.size} bytes: a BAR's size is a power of two, at least "
                f"4, and its index 0 to {last}"
            )
        if any(
            area.offset % PAGE or area.size % PAGE or area.offset + area.size > self.size
            for area in self.shared
        ):
            raise UsageError(f"BAR {self.index}: shared areas are whole pages within it")
        if self.ports and (self.shared or self.wide):
            raise UsageError(f"BAR {self.index}: I/O ports are neither shared nor wide")

    @property
    def config_flags(self) -> int:
        """The low bits of its base address register (PCI Local Bus 3.0, 6.2.5.1)."""
        return int(self.ports) or 4 * self.wide | 8 * self.prefetchable


def memory_bar(index: int, size: int, *, wide: bool = False, prefetchable: bool = False) -> BarSpec:
    """A BAR of memory that the client maps as a whole, where it has whole pages."""
    shared = (Area(0, size),) if size >= PAGE else ()
    return BarSpec(index, size, wide=wide, prefetchable=prefetchable, shared=shared)


def reads(register: Register) -> Callable[[Handler], Handler]:
    """The method gives the register's value: `def value(self) -> int`."""
    return _handles("_reads", register)


def writes(register: Register) -> Callable[[Handler], Handler]:
    """The method is called with what was written to the register, after it was stored:
    `def stored(self, value: int) -> None`."""
    return _handles("_writes", register)


def _handles(kind: str, register: Register) -> Callable[[Handler], Handler]:
    if not isinstance(register, Register):
        word = kind.removeprefix("_")
        raise UsageError(f"{word}({register!r}): a handler is of a register: @{word}(Map.register)")

    def mark(method: Handler) -> Handler:
        setattr(method, kind, (*getattr(method, kind, ()), register))
        return method

    return mark


class Bar:
    """One BAR of a running model."""

    def __init__(self, spec: BarSpec, model: object) -> None:
        self.spec = spec
        size = -(-spec.size // PAGE) * PAGE
        self.file = os.memfd_create(f"bar{spec.index}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.file, size)
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.memory = mmap.mmap(self.file, size)
        except BaseException:
            os.close(self.file)
            raise
        declared = spec.registers.registers() if spec.registers else []
        self._readable = _places(one for one in declared if one.access != "wo")
        self._writable = _places(one for one in declared if one.access in ("rw", "wo"))
        self._fixed = _places(one for one in declared if one.access in ("ro", "rc"))
        self._on_read = _handlers(model, "_reads", declared)
        self._on_write = _handlers(model, "_writes", declared)

    def get(self, register: Register) -> int:
        """What is stored for a register. Raises UsageError for one that is not within the BAR."""
        self._refuse_outside(register)
        return self.load(register.offset, register.width)

    def set(self, register: Register, value: int) -> None:
        """Store a register's value, whatever its access is; no handler is called. Raises UsageError
        as `get` does."""
        self._refuse_outside(register)
        self.store(register.offset, value, register.width)

    def _refuse_outside(self, register: Register) -> None:
        if register.offset + register.width > self.spec.size:
            raise UsageError(
                f"register {register.name} at {register.offset:#x} is not within BAR "
                f"{self.spec.index} of {self.spec.size:#x} bytes"
            )

    def load(self, offset: int, width: int) -> int:
        return int.from_bytes(self.memory[offset : offset + width], "little")

    def store(self, offset: int, value: int, width: int) -> None:
        mask = (1 << 8 * width) - 1
        self.memory[offset : offset + width] = (value & mask).to_bytes(width, "little")

    def clear(self) -> None:
        """All bytes zero: the pages go back to the system."""
        self.memory.madvise(mmap.MADV_REMOVE)

    def read(self, offset: int, width: int) -> int:
        """An access of 1, 2, 4 or 8 bytes, aligned."""
        register = self._readable.get(offset)
        if register is None:
            return 0 if offset in self._writable else self.load(offset, width)
        if width > register.width:
            half = width // 2
            return self.read(offset, half) | self.read(offset + half, half) << 8 * half
        handler = self._on_read.get(register.name)
        value = self.get(register) if handler is None else handler()
        if not isinstance(value, int):
            given = f"{type(value).__name__}, not a number"
            raise UsageError(f"the handler that reads {register.name} gave {given}")
        return int(value >> 8 * (offset - register.offset) & (1 << 8 * width) - 1)

    def write(self, offset: int, value: int, width: int) -> None:
        """An access of 1, 2, 4 or 8 bytes, aligned."""
        register = self._writable.get(offset)
        if register is None:
            if offset not in self._fixed:
                self.store(offset, value, width)
            return
        if width > register.width:
            half = width // 2
            self.write(offset, value & (1 << 8 * half) - 1, half)
            self.write(offset + half, value >> 8 * half, half)
            return
        self.store(offset, value, width)
        handler = self._on_write.get(register.name)
        if handler is not None:
            handler(self.get(register))

    def close(self) -> None:
        self.memory.close()
        os.close(self.file)


def _places(registers: Any) -> dict[int, Register]:
    return {
        register.offset + byte: register for register in registers for byte in range(register.width)
    }


def _handlers(model: object, kind: str, declared: Sequence[Register]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dir(type(model)):
        for register in getattr(getattr(type(model), name), kind, ()):
            if any(register is one for one in declared):
                found[register.name] = getattr(model, name)
    return found
