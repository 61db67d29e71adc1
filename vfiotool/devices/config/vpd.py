"""Vital Product Data decoded, with bounds on all of it.

Source: PCI Local Bus Specification 3.0, appendix I; drivers/pci/vpd.c.
"""

from __future__ import annotations

from dataclasses import dataclass

# Small resources have the length in the tag; of those only the end tag is allowed here.
_IDENTIFIER, _READ_ONLY, _READ_WRITE, _END = 0x82, 0x90, 0x91, 0x78
_MAX_BYTES = 0x8000
_MAX_FIELDS = 1024


@dataclass(frozen=True, slots=True)
class Vpd:
    """The product's name and its fields in order: keyword and text (`("SN", "MT1234")`).

    Bytes that are no printable ASCII appear as ``\\xNN``. `checksum_ok` is None where there is no
    checksum field; `problems` says where the data stop making sense.
    """

    name: str | None
    fields: tuple[tuple[str, str], ...]
    checksum_ok: bool | None
    problems: tuple[str, ...]


def parse_vpd(data: bytes) -> Vpd:
    """Decode what the `vpd` attribute holds; never raises, whatever that is."""
    data = data[:_MAX_BYTES]
    name: str | None = None
    fields: list[tuple[str, str]] = []
    checksum: bool | None = None
    at = 0
    while at < len(data):
        tag = data[at]
        if tag == _END:
            return Vpd(name, tuple(fields), checksum, ())
        if tag not in (_IDENTIFIER, _READ_ONLY, _READ_WRITE) or at + 3 > len(data):
            return Vpd(name, tuple(fields), checksum, (f"no resource begins at {at:#x}",))
        begin = at + 3
        end = begin + int.from_bytes(data[at + 1 : begin], "little")
        if end > len(data):
            return Vpd(name, tuple(fields), checksum, (f"the resource at {at:#x} is cut off",))
        if tag == _IDENTIFIER:
            name = _text(data[begin:end])
        else:
            found = _keywords(data, begin, end)
            if tag == _READ_ONLY and (place := found.get("RV")) is not None:
                checksum = place[0] < end and sum(data[: place[0] + 1]) & 0xFF == 0
            fields += [
                (keyword, _text(data[first:last]))
                for keyword, (first, last) in found.items()
                if keyword not in ("RV", "RW")
            ]
        at = end
    return Vpd(name, tuple(fields), checksum, ("there is no end tag",))


def _keywords(data: bytes, at: int, end: int) -> dict[str, tuple[int, int]]:
    """Where each keyword's value begins and ends; a keyword that repeats counts once."""
    found: dict[str, tuple[int, int]] = {}
    while at + 3 <= end and len(found) < _MAX_FIELDS:
        first, last = at + 3, at + 3 + data[at + 2]
        if last > end:
            break
        found.setdefault(_text(data[at : at + 2]), (first, last))
        at = last
    return found


def _text(data: bytes) -> str:
    stripped = data.rstrip(b"\0 \xff")
    if stripped.isascii() and (text := stripped.decode("ascii")).isprintable():
        return text
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in stripped)
