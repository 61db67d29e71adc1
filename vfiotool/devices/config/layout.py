"""How a capability's registers are written down as data, and the one reader of them.

A register is a line of `name@bit` and `name@low-high` words, in the order of the specification's
tables; a word may end in `/converter` where the field is not a plain number. A one-bit field
becomes a bool, a longer one an int, or what its converter makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Value = bool | int | float | str | None | list["Value"] | dict[str, "Value"]
Fields = dict[str, Value]

# Link speeds by code, GT/s (PCI Express Base Specification 6.0, 7.5.3.6 and 7.5.3.18).
SPEEDS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
_L0S_NS = (64, 128, 256, 512, 1000, 2000, 4000)
_POWER_SCALES = (1.0, 0.1, 0.01, 0.001)


def u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def u64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")


def bits(value: int, low: int, high: int) -> int:
    """The bits `low` to `high`, both included, as a number."""
    return value >> low & (1 << high - low + 1) - 1


def power_limit_w(value: int, scale: int) -> float | None:
    """A slot power limit in watts; None for "above 600 W" (7.5.3.9, Slot Power Limit Value)."""
    if scale == 0 and value >= 0xF0:
        return None if value == 0xFF else float(250 + 25 * (value - 0xF0))
    return round(value * _POWER_SCALES[scale], 3)


def ltr_ns(value: int) -> int | None:
    """A latency of ten bits and a scale of three, in ns; None for the reserved scales (7.8.2)."""
    scale = bits(value, 10, 12)
    return None if scale > 5 else bits(value, 0, 9) << 5 * scale


def l0s_ns(code: int) -> int | None:
    """An upper bound of the L0s latency in ns; None for "no limit" (7.5.3.3, 7.5.3.6)."""
    return None if code == 7 else _L0S_NS[code]


def l1_ns(code: int) -> int | None:
    """An upper bound of the L1 latency in ns; None for "no limit"."""
    return None if code == 7 else 1000 << code


def _speed(code: int) -> float | None:
    return SPEEDS.get(code)


def _aspm(code: int) -> list[Value]:
    return [name for bit, name in enumerate(("L0s", "L1")) if code >> bit & 1]


_CONVERTERS: dict[str, Callable[[int], Value]] = {
    "payload": lambda code: 128 << code,
    "power2": lambda code: 1 << code,
    "plus1": lambda code: code + 1,
    "speed": _speed,
    "aspm": _aspm,
    "l0s": l0s_ns,
    "l1": l1_ns,
    "ltr": ltr_ns,
    "hex4": lambda code: f"{code:04x}",
    "indicator": lambda code: (None, "on", "blink", "off")[code],
    "ns": lambda code: None if code in (0, 0xFF) else code,
}


@dataclass(frozen=True, slots=True)
class ConfigRegister:
    """A register's name, place in its capability, width in bytes, and fields."""

    name: str
    offset: int
    width: int
    fields: tuple[tuple[str, int, int, Callable[[int], Value] | None], ...]


def register(name: str, offset: int, width: int, text: str) -> ConfigRegister:
    """A register from its line of words; an empty line is one field, the register itself."""
    fields = []
    for word in text.split():
        field, _, place = word.partition("@")
        place, _, converter = place.partition("/")
        low, _, high = place.partition("-")
        first = int(low)
        mask = (1 << int(high or low) - first + 1) - 1
        convert: Callable[[int], Value] | None = bool if not high else None
        fields.append((field, first, mask, _CONVERTERS[converter] if converter else convert))
    return ConfigRegister(name, offset, width, tuple(fields))


def read_register(spec: ConfigRegister, body: bytes) -> Value:
    """The register's fields, its number if it has no fields, or None beyond the readable part."""
    end = spec.offset + spec.width
    if end > len(body):
        return None
    value = int.from_bytes(body[spec.offset : end], "little")
    if not spec.fields:
        return value
    found: Fields = {}
    for name, low, mask, convert in spec.fields:
        part = value >> low & mask
        found[name] = part if convert is None else convert(part)
    return found


def read_registers(specs: Iterable[ConfigRegister], body: bytes) -> Fields:
    """Registers by name. Those without a name of their own lend their fields to the whole."""
    found: Fields = {}
    for spec in specs:
        value = read_register(spec, body)
        if spec.name:
            found[spec.name] = value
        elif isinstance(value, dict):
            found.update(value)
        else:
            found.update((name, None) for name, *_ in spec.fields)
    return found
