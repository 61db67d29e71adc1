"""Typed registers: a driver declares what its device has, and gets checked, named access.

    class EduRegisters(RegisterMap):
        identification = Register(0x00, access="ro", fields={"major": (31, 24)})
        liveness = Register(0x04)

    registers = EduRegisters(bar)
    registers.liveness.write(5)
    registers.identification.field("major")

A declaration is checked when the class is made: a field outside its register, two fields on one
bit, two registers of one kind on one offset are errors there, not at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, overload

from vfiotool.errors import UsageError
from vfiotool.vfio.region import Registers

Access = Literal["rw", "ro", "wo", "rc"]


@dataclass(frozen=True)
class Register:
    """One register: `offset` and `width` in bytes, what may be done with it, its fields.

    `access` is "rw", "ro", "wo", or "rc" for one whose reading changes the device (such a
    register is never read by a dump). `fields` maps a name to (highest bit, lowest bit).
    `halves` accesses a 64-bit register as two 32-bit ones, low first (NVMe Base Specification
    2.0, 3.1).
    """

    offset: int
    width: int = 4
    access: Access = "rw"
    fields: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    halves: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.width not in (1, 2, 4, 8):
            raise UsageError(
                f"register at {self.offset:#x}: it has 1, 2, 4 or 8 bytes, not {self.width}"
            )
        if self.offset < 0 or self.offset % self.width:
            raise UsageError(
                f"register at {self.offset:#x}: {self.width} bytes do not fit there: its offset is "
                "no multiple of them"
            )
        taken = 0
        for name, (high, low) in self.fields.items():
            if not 0 <= low <= high < 8 * self.width:
                raise UsageError(f"field {name}: bits {high}:{low} of {8 * self.width}")
            mask = (1 << high + 1) - (1 << low)
            if taken & mask:
                raise UsageError(f"field {name}: bits {high}:{low} belong to another field too")
            taken |= mask

    def __set_name__(self, owner: type, name: str) -> None:
        if not self.name:
            object.__setattr__(self, "name", name)

    @overload
    def __get__(self, instance: None, owner: type) -> Register: ...
    @overload
    def __get__(self, instance: RegisterMap, owner: type) -> BoundRegister: ...
    def __get__(self, instance: RegisterMap | None, owner: type) -> Register | BoundRegister:
        if instance is None:
            return self
        return instance._bound[self.name]

    def __set__(self, instance: object, value: object) -> None:
        raise UsageError(f"{self.name} is a register: call its write method")

    def decode(self, value: int) -> dict[str, int]:
        """The fields of a value, by name."""
        return {
            name: value >> low & (1 << high - low + 1) - 1
            for name, (high, low) in self.fields.items()
        }

    def encode(self, value: int, **fields: int) -> int:
        """`value` with these fields replaced. Raises UsageError for an unknown field or a value
        that does not fit it."""
        for name, number in fields.items():
            if name not in self.fields:
                raise UsageError(
                    f"{self.name} has no field {name}", hint=f"it has {', '.join(self.fields)}"
                )
            high, low = self.fields[name]
            limit = 1 << high - low + 1
            if not 0 <= number < limit:
                raise UsageError(f"{self.name}.{name}: {number} does not fit {high - low + 1} bits")
            value = value & ~(limit - 1 << low) | number << low
        return value


class BoundRegister:
    """A register of an open device."""

    def __init__(self, register: Register, access: Registers) -> None:
        self.register = register
        bits = 8 * register.width
        self._access = access
        self._read = getattr(access, f"read{bits}")
        self._write = getattr(access, f"write{bits}")

    def __repr__(self) -> str:
        register = self.register
        where = f"{register.offset:#x}, {register.width} bytes, {register.access}"
        return f"<BoundRegister {register.name} at {where}, of {self._access!r}>"

    def read(self) -> int:
        """Its value. Raises UsageError for a register that can only be written."""
        register = self.register
        if register.access == "wo":
            raise UsageError(f"{register.name} can only be written")
        if register.halves:
            low = self._access.read32(register.offset)
            return low | self._access.read32(register.offset + 4) << 32
        value: int = self._read(register.offset)
        return value

    def write(self, value: int) -> None:
        """Store `value`. Raises UsageError for a register that can only be read."""
        register = self.register
        if register.access in ("ro", "rc"):
            raise UsageError(f"{register.name} can only be read")
        if register.halves:
            self._access.write32(register.offset, value & 0xFFFFFFFF)
            self._access.write32(register.offset + 4, value >> 32)
            return
        self._write(register.offset, value)

    def fields(self) -> dict[str, int]:
        """Read it once; its fields by name."""
        return self.register.decode(self.read())

    def field(self, name: str) -> int:
        """Read it; one field. Raises UsageError for an unknown one."""
        if name not in self.register.fields:
            raise UsageError(f"{self.register.name} has no field {name}")
        return self.fields()[name]

    def set(self, **fields: int) -> int:
        """Store a value made of these fields, the rest zero; returns it."""
        value = self.register.encode(0, **fields)
        self.write(value)
        return value

    def modify(self, **fields: int) -> int:
        """Read, replace these fields, store; returns what was stored."""
        value = self.register.encode(self.read(), **fields)
        self.write(value)
        return value

    def poll(self, mask: int, wanted: int, timeout_s: float | None) -> int:
        """Read until `value & mask == wanted`; returns the value. Raises TimedOut after
        `timeout_s` seconds."""
        register = self.register
        width = 4 if register.halves else register.width
        return self._access.poll(register.offset, mask, wanted, timeout_s, width=width)

    def poll_field(self, name: str, wanted: int, timeout_s: float | None) -> int:
        """Read until the field has this value; returns the register's value."""
        if name not in self.register.fields:
            raise UsageError(f"{self.register.name} has no field {name}")
        value = self.register.encode(0, **{name: wanted})
        high, low = self.register.fields[name]
        return self.poll((1 << high + 1) - (1 << low), value, timeout_s)


class RegisterMap:
    """Base of a driver's declaration; an instance binds it to a `Region` or a `Mapping`."""

    def __init__(self, access: Registers) -> None:
        self._bound = {
            register.name: BoundRegister(register, access) for register in self.registers()
        }
        self._access = access

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {len(self._bound)} registers of {self._access!r}>"

    def __init_subclass__(cls) -> None:
        taken: dict[tuple[int, str], str] = {}
        for register in cls.registers():
            for way in ("r", "w") if register.access == "rw" else (register.access[0],):
                key = (register.offset, "w" if register.access == "wo" else way)
                if key in taken:
                    raise UsageError(
                        f"{register.name} and {taken[key]} both lie at {register.offset:#x}"
                    )
                taken[key] = register.name

    @classmethod
    def registers(cls) -> list[Register]:
        """The declared registers, by offset."""
        found = {
            name: value
            for base in reversed(cls.__mro__)
            for name, value in vars(base).items()
            if isinstance(value, Register)
        }
        return sorted(found.values(), key=lambda register: register.offset)

    def dump(self) -> Iterator[tuple[Register, int, dict[str, int]]]:
        """Each register that can be read without consequence: declaration, value, fields."""
        for register in self.registers():
            if register.access in ("rw", "ro"):
                value = self._bound[register.name].read()
                yield register, value, register.decode(value)
