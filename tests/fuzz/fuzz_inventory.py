"""Fuzz with atheris what is parsed of a device: configuration space, VPD, sysfs attributes.

    python tests/fuzz/fuzz_inventory.py config|vpd|sysfs -runs=100000 [libFuzzer options] [CORPUS…]

Any bytes must be read without an error, within the bounds that the modules promise. Inputs for
`config` name a decoder and give its bytes, or are patches (offset, length, bytes) of a whole
configuration space, or that space itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["vfiotool"]):
    from vfiotool import capabilities
    from vfiotool.capabilities_layout import read_registers
    from vfiotool.capabilities_vpd import parse_vpd
    from vfiotool.inventory_json import config_as_json, vpd_as_json
    from vfiotool.iommu_scan import parse_facts, parse_windows
    from vfiotool.names import Names
    from vfiotool.pci import parse_identity, parse_resource, parse_speed

from config_space import build

# Past the cache: a remembered answer would run no code.
parse_config = capabilities.parse_config.__wrapped__
capabilities._decode = capabilities._decode.__wrapped__  # type: ignore[assignment]
capabilities._decode_registers = capabilities._decode_registers.__wrapped__  # type: ignore[assignment]

_BASE = bytes(
    build([(0x10, b"\x42\x00" + bytes(56)), (0x01, bytes(6))], [(0x000D, 1, bytes(4))], size=1024)
)
_IDS = [*sorted(capabilities._STANDARD), *sorted(capabilities.extended.EXTENDED_REGISTERS)]
_DECODERS: list[Callable[[bytes], object]] = [
    *(decoder for _, decoder in capabilities._STANDARD.values()),
    *(decoder for _, decoder in capabilities._EXTENDED.values()),
    capabilities.standard.decode_ea_bridge,
    capabilities.extended.decode_aer_root,
    *(
        partial(read_registers, registers)
        for registers in capabilities.extended.EXTENDED_REGISTERS.values()
    ),
]
_WHOLE = 0xE0


def check_config(data: bytes) -> None:
    """Mostly one decoder on its own, which is fast; every eighth input a whole space."""
    kind = data[0] if data else 0
    if kind < _WHOLE:
        fields = _DECODERS[kind % len(_DECODERS)](data[1:])
        assert isinstance(fields, dict)
        if len(data) % 16 == 0:
            json.dumps(fields)
        return
    space = parse_config(patched(data[1:]) if kind < 0xF0 else data[1:])
    standard = [item.offset for item in space.capabilities if not item.extended]
    extended = [item.offset for item in space.capabilities if item.extended]
    assert len(standard) <= capabilities.STANDARD_HOPS
    assert len(extended) <= capabilities.EXTENDED_HOPS
    assert len(set(standard)) == len(standard) and len(set(extended)) == len(extended)
    assert all(64 <= offset < min(space.size, 256) for offset in standard)
    assert all(256 <= offset < space.size for offset in extended)
    if len(data) % 16 == 0:
        json.dumps(config_as_json(space))


def patched(data: bytes) -> bytes:
    space = bytearray(_BASE)
    at = 0
    while at + 3 <= len(data):
        offset = int.from_bytes(data[at : at + 2], "little") & 0x3FF
        length = data[at + 2] & 0x3F
        piece = data[at + 3 : at + 3 + length]
        space[offset : offset + len(piece)] = piece
        at += 3 + length
    return bytes(space[:1024])


def check_vpd(data: bytes) -> None:
    vpd = parse_vpd(data)
    texts = [vpd.name or "", *(text for field in vpd.fields for text in field)]
    assert all(text.isascii() and text.isprintable() for text in texts if text)
    if len(data) % 16 == 0:
        json.dumps(vpd_as_json(vpd))


def check_sysfs(data: bytes) -> None:
    text = data.decode("utf-8", "backslashreplace")
    facts = parse_facts(data)
    identity = parse_identity("0000:00:00.0", text)
    assert facts[4] in ("unbound", "vfio", "bridge", "host")
    assert (identity.vendor is None) == (facts[0] is None)
    for region in parse_resource(text):
        assert 0 <= region.index <= 6 and region.size > 0
    for _, _, kind in parse_windows(text):
        assert kind
    parse_speed(text)
    names = Names(data)
    names.lookup("8086", "10c9", "8086", "0001", "020000")


_TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "config": (
        check_config,
        [
            *(bytes([number]) + bytes(range(64)) for number in range(len(_DECODERS))),
            b"\xe0",
            b"\xe0" + b"\x34\x00\x01\x40",
            *(b"\xe0\x40\x00\x04" + bytes([id_, 0x60, 0xFF, 0xFF]) for id_ in _IDS if id_ < 256),
            *(b"\xe0\x00\x01\x04" + id_.to_bytes(2, "little") + b"\x01\x10" for id_ in _IDS),
            b"\xf0" + _BASE[:256],
        ],
    ),
    "vpd": (
        check_vpd,
        [
            b"\x82\x04\x00Card\x90\x0a\x00PN\x02XYRV\x01\x00\x78",
            b"\x82\x00\x00\x90\x00\x00\x91\x03\x00RW\x00\x78",
        ],
    ),
    "sysfs": (
        check_sysfs,
        [
            b"DRIVER=nvme\nPCI_CLASS=10802\nPCI_ID=8086:0010\nPCI_SUBSYS_ID=1AF4:1100\n"
            b"PCI_SLOT_NAME=0000:00:01.0\nMODALIAS=pci:v\n",
            b"0x00000000fee00000 0x00000000feefffff msi\n0x0 0x10 direct\n",
            b"0x00000000fe000000 0x00000000fe01ffff 0x0000000000040200\n",
            b"8.0 GT/s PCIe\n",
            b"8086  Intel\n\t10c9  Name\n\t\t8086 0001  Sub\nC 02  Net\n\t00  Ethernet\n",
        ],
    ),
}


def main() -> None:
    target = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if target not in _TARGETS:
        raise SystemExit(__doc__)
    check, seeds = _TARGETS[target]
    arguments = list(sys.argv)
    if not any(not argument.startswith("-") for argument in arguments[1:]):
        folder = Path(tempfile.mkdtemp())
        for number, seed in enumerate(seeds):
            (folder / str(number)).write_bytes(seed)
        arguments.append(str(folder))
    atheris.Setup(arguments, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
