"""Configuration spaces made to order, for tests and the laid-out hosts of the benchmarks."""

from __future__ import annotations

import struct
from collections.abc import Iterable

COMMAND, STATUS, POINTER = 0x04, 0x06, 0x34
CAPABILITY_LIST = 0x10

Standard = tuple[int, bytes]
Extended = tuple[int, int, bytes]


def build(
    standard: Iterable[Standard] = (),
    extended: Iterable[Extended] = (),
    *,
    vendor: int = 0x8086,
    device: int = 0x10C9,
    class_code: int = 0x020000,
    bridge: bool = False,
    size: int = 4096,
) -> bytearray:
    """A configuration space with these capabilities, each four-byte aligned, lists closed.

    A standard capability is its id and the bytes after its two-byte header; an extended one its
    id, version and the bytes after its four-byte header.
    """
    data = bytearray(size)
    struct.pack_into("<HHHH", data, 0, vendor, device, 0x0006, 0)
    data[8:12] = bytes([1, *class_code.to_bytes(3, "little")])
    data[0x0E] = 1 if bridge else 0
    at, link = 0x40, POINTER
    for id_, body in standard:
        data[link] = at
        data[STATUS] |= CAPABILITY_LIST
        data[at] = id_
        data[at + 2 : at + 2 + len(body)] = body
        link = at + 1
        at += (2 + len(body) + 3) & ~3
    assert at <= 256, "more standard capabilities than fit"
    at, previous = 0x100, None
    for id_, version, body in extended:
        if previous is not None:
            head = struct.unpack_from("<I", data, previous)[0]
            struct.pack_into("<I", data, previous, head & 0xFFFFF | at << 20)
        struct.pack_into("<I", data, at, id_ | version << 16)
        data[at + 4 : at + 4 + len(body)] = body
        previous = at
        at += (4 + len(body) + 3) & ~3
    assert at <= size or not previous, "more extended capabilities than fit"
    return data


def dump(functions: dict[str, bytes | bytearray]) -> str:
    """The functions in the form of `lspci -xxxx`, which `lspci -F` reads."""
    lines = []
    for address, data in functions.items():
        lines.append(f"{address} Function")
        lines += [
            f"{at:02x}: {' '.join(f'{byte:02x}' for byte in data[at : at + 16])}"
            for at in range(0, len(data), 16)
        ]
        lines.append("")
    return "\n".join(lines) + "\n"
