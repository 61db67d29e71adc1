"""Typed registers: declarations are checked, values are exact, dumps have no side effects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.errors import UsageError
from vfiotool.vfio.registers import Register, RegisterMap


class Memory:
    """Registers in a dict of bytes; remembers each access."""

    def __init__(self) -> None:
        self.bytes = bytearray(64)
        self.log: list[tuple[str, int, int]] = []

    def _read(self, offset: int, width: int) -> int:
        self.log.append(("read", offset, width))
        return int.from_bytes(self.bytes[offset : offset + width], "little")

    def _write(self, offset: int, value: int, width: int) -> None:
        self.log.append(("write", offset, width))
        self.bytes[offset : offset + width] = value.to_bytes(width, "little")

    def read8(self, offset: int, /) -> int:
        return self._read(offset, 1)

    def read16(self, offset: int, /) -> int:
        return self._read(offset, 2)

    def read32(self, offset: int, /) -> int:
        return self._read(offset, 4)

    def read64(self, offset: int, /) -> int:
        return self._read(offset, 8)

    def write8(self, offset: int, value: int, /) -> None:
        self._write(offset, value, 1)

    def write16(self, offset: int, value: int, /) -> None:
        self._write(offset, value, 2)

    def write32(self, offset: int, value: int, /) -> None:
        self._write(offset, value, 4)

    def write64(self, offset: int, value: int, /) -> None:
        self._write(offset, value, 8)

    def poll(self, offset: int, mask: int, wanted: int, timeout_s: float, *, width: int = 4) -> int:
        value = self._read(offset, width)
        assert value & mask == wanted
        return value


class Example(RegisterMap):
    identification = Register(0x00, access="ro", fields={"major": (31, 24), "minor": (23, 16)})
    control = Register(0x04, fields={"enable": (0, 0), "mode": (3, 1), "size": (15, 8)})
    data = Register(0x08, width=1, access="rc")
    command = Register(0x08, width=1, access="wo")
    wide = Register(0x10, width=8, halves=True)
    small = Register(0x18, width=2)


def test_widths_and_halves_are_as_declared() -> None:
    memory = Memory()
    registers = Example(memory)
    registers.wide.write(0x1122334455667788)
    assert registers.wide.read() == 0x1122334455667788
    registers.small.write(7)
    assert memory.log == [
        ("write", 0x10, 4), ("write", 0x14, 4), ("read", 0x10, 4), ("read", 0x14, 4),
        ("write", 0x18, 2),
    ]  # fmt: skip


@given(st.integers(0, 1), st.integers(0, 7), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_fields_survive_encoding_and_leave_the_rest_alone(
    enable: int, mode: int, size: int, before: int
) -> None:
    register = Example.control
    value = register.encode(before, enable=enable, mode=mode, size=size)
    assert register.decode(value) == {"enable": enable, "mode": mode, "size": size}
    assert value & ~0xFF0F == before & ~0xFF0F


def test_modify_reads_once_and_writes_once() -> None:
    memory = Memory()
    registers = Example(memory)
    registers.control.write(0xF00)
    memory.log.clear()
    assert registers.control.modify(mode=5, enable=1) == 0xF0B
    assert memory.log == [("read", 4, 4), ("write", 4, 4)]
    assert registers.control.field("mode") == 5
    assert registers.control.set(size=2) == 0x200


def test_poll_field_waits_for_the_field_alone() -> None:
    memory = Memory()
    registers = Example(memory)
    registers.control.write(0xFFFF0B)
    assert registers.control.poll_field("mode", 5, 1.0) == 0xFFFF0B


def test_rights_and_names_are_checked() -> None:
    registers = Example(Memory())
    with pytest.raises(UsageError, match="only be read"):
        registers.identification.write(1)
    with pytest.raises(UsageError, match="only be written"):
        registers.command.read()
    with pytest.raises(UsageError, match="no field colour"):
        registers.control.set(colour=1)
    with pytest.raises(UsageError, match="no field colour"):
        registers.control.field("colour")
    with pytest.raises(UsageError, match="does not fit 3 bits"):
        registers.control.set(mode=8)
    with pytest.raises(UsageError, match="call its write method"):
        registers.control = 5  # type: ignore[assignment]


def test_a_dump_reads_nothing_that_reading_changes() -> None:
    memory = Memory()
    names = [register.name for register, _, _ in Example(memory).dump()]
    assert names == ["identification", "control", "wide", "small"]
    assert all(offset != 8 for _, offset, _ in memory.log)


def test_faulty_declarations_are_errors_when_the_class_is_made() -> None:
    with pytest.raises(UsageError, match="do not fit there"):
        Register(0x02, width=4)
    with pytest.raises(UsageError, match=r"it has 1, 2, 4 or 8 bytes, not 32"):
        Register(0x00, width=32)
    with pytest.raises(UsageError, match="bits 32:31 of 32"):
        Register(0x00, fields={"a": (32, 31)})
    with pytest.raises(UsageError, match="belong to another"):
        Register(0x00, fields={"a": (3, 0), "b": (7, 3)})
    with pytest.raises(UsageError, match="both lie at 0x4"):

        class _Clash(RegisterMap):
            first = Register(4)
            second = Register(4, access="ro")
