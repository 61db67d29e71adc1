"""Whether what a model's class declares can be a PCI function: one error for what cannot.

PCI Local Bus Specification 3.0, 6.1 and 6.2.1 (ids), 6.2.5.1 (BARs), 6.8.1.3 (MSI), 6.8.2 (MSI-X).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from vfiotool.errors import UsageError
from vfiotool.models.bar import PAGE, BarSpec
from vfiotool.vfio import Register

_MSI_COUNTS = (0, 1, 2, 4, 8, 16, 32)
_MOST_MSIX, _ENTRY_BYTES = 2048, 16
_SMALLEST_MEMORY, _LARGEST_NARROW, _LARGEST = 16, 1 << 31, 1 << 39


class Declared(Protocol):
    """What a model's class declares beside its BARs."""

    @property
    def vendor(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def class_code(self) -> int: ...
    @property
    def revision(self) -> int: ...
    @property
    def subsystem(self) -> tuple[int, int]: ...
    @property
    def msi(self) -> int: ...
    @property
    def msix(self) -> int: ...
    @property
    def msix_bar(self) -> int: ...
    @property
    def msix_offset(self) -> int: ...


def check_declaration(model: Declared, bars: Sequence[BarSpec]) -> None:
    """Raises UsageError, which names the class and the first fault of its declaration."""
    for fault in _faults(model, bars):
        raise UsageError(f"{type(model).__name__}: {fault}")


def _faults(model: Declared, bars: Sequence[BarSpec]) -> Iterator[str]:
    yield from _ids(model)
    if not isinstance(bars, Sequence) or not all(isinstance(one, BarSpec) for one in bars):
        yield "`bars` is a tuple of BarSpec"
    taken: dict[int, int] = {}
    for spec in bars:
        for place in range(spec.index, spec.index + 1 + spec.wide):
            if place in taken:
                yield f"BAR {spec.index} lies on BAR {taken[place]} (a wide one takes two)"
            taken[place] = spec.index
        yield from _bar(spec)
    yield from _interrupts(model, bars)
    declared = [one for spec in bars for one in _registers(spec)]
    for name in dir(type(model)):
        method = getattr(type(model), name, None)
        for register in (*getattr(method, "_reads", ()), *getattr(method, "_writes", ())):
            if not any(register is one for one in declared):
                yield f"{name} handles register {register.name}, which no BAR declares"


def _ids(model: Declared) -> Iterator[str]:
    if not isinstance(model.subsystem, tuple) or len(model.subsystem) != 2:
        yield "`subsystem` is two ids, of vendor and device"
    for name, value, bits in (
        ("vendor", model.vendor, 16),
        ("device", model.device, 16),
        ("class_code", model.class_code, 24),
        ("revision", model.revision, 8),
        ("subsystem", model.subsystem[0], 16),
        ("subsystem", model.subsystem[1], 16),
    ):
        if not isinstance(value, int) or not 0 <= value < 1 << bits:
            said = f"{value:#x}" if isinstance(value, int) else repr(value)
            yield f"`{name}` is a number of {bits} bits, not {said}"


def _registers(spec: BarSpec) -> list[Register]:
    return spec.registers.registers() if spec.registers else []


def _bar(spec: BarSpec) -> Iterator[str]:
    smallest = 4 if spec.ports else _SMALLEST_MEMORY
    largest = _LARGEST if spec.wide else _LARGEST_NARROW
    if not smallest <= spec.size <= largest:
        wide = "" if spec.wide or spec.ports else " (more where it is wide)"
        yield f"BAR {spec.index} of {spec.size:#x} bytes: {smallest:#x} to {largest:#x}{wide}"
    for register in _registers(spec):
        if register.offset + register.width > spec.size:
            yield (
                f"register {register.name} at {register.offset:#x} is not within BAR {spec.index} "
                f"of {spec.size:#x} bytes"
            )
    end = 0
    for area in sorted(spec.shared, key=lambda one: one.offset):
        if area.offset < end or area.size < PAGE:
            yield f"BAR {spec.index}: its shared areas overlap, or one is empty"
        end = area.offset + area.size


def _interrupts(model: Declared, bars: Sequence[BarSpec]) -> Iterator[str]:
    if model.msi not in _MSI_COUNTS:
        yield f"`msi` is 1, 2, 4, 8, 16 or 32 vectors, not {model.msi!r}"
    if not isinstance(model.msix, int) or not 0 <= model.msix <= _MOST_MSIX:
        yield f"`msix` is at most {_MOST_MSIX} vectors, not {model.msix!r}"
    if not model.msix:
        return
    first = model.msix_offset
    if not isinstance(first, int) or first % 8 or first < 0:
        yield f"`msix_offset` is a multiple of 8, not {first!r}"
    found = [spec for spec in bars if spec.index == model.msix_bar and not spec.ports]
    if not found:
        yield f"`msix_bar` is {model.msix_bar}, and there is no such BAR of memory for the table"
    for register in _registers(found[0]):
        if first < register.offset + register.width and register.offset < first + (
            _ENTRY_BYTES * model.msix
        ):
            yield (
                f"the MSI-X table lies over register {register.name} of BAR {model.msix_bar}: set "
                "`msix_offset` or `msix_bar`"
            )
