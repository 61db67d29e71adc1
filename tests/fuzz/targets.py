"""The parsers that are fuzzed: what must hold for any bytes, and inputs to begin with.

`tests/fuzz/fuzz.py` fuzzes them with atheris; `tests/test_fuzz_corpus.py` replays what that found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite

from tests.fakes.config_space import build
from tests.oracles.snapshot_check import HEAD, check, with_head
from vfiotool.devices.as_json import config_as_json, vpd_as_json
from vfiotool.devices.config import decode as capabilities
from vfiotool.devices.config.vpd import parse_vpd
from vfiotool.devices.identity import parse_facts, parse_windows
from vfiotool.devices.names import Names
from vfiotool.devices.pci import parse_identity, parse_resource, parse_speed

_BASE = bytes(
    build([(0x10, b"\x42\x00" + bytes(56)), (0x01, bytes(6))], [(0x000D, 1, bytes(4))], size=1024)
)
_IDS = [*sorted(capabilities._STANDARD), *sorted(capabilities._EXTENDED)]
_DECODERS: list[Callable[[bytes], object]] = [
    *(decoder for _, decoder in capabilities._STANDARD.values()),
    *(decoder for _, decoder in capabilities._EXTENDED.values()),
    capabilities.standard.decode_ea_bridge,
    capabilities.extended.decode_aer_root,
]
_WHOLE = 0xE0


def check_config(data: bytes) -> None:
    """Mostly one decoder on its own, which is fast; every eighth input a whole space.

    The first byte names a decoder and its bytes follow, or patches (offset, length, bytes) of a
    space follow, or that space itself.
    """
    kind = data[0] if data else 0
    if kind < _WHOLE:
        fields = _DECODERS[kind % len(_DECODERS)](data[1:])
        assert isinstance(fields, dict)
        if len(data) % 16 == 0:
            json.dumps(fields)
        return
    space = capabilities.parse_config(_patched(data[1:]) if kind < 0xF0 else data[1:])
    standard = [item.offset for item in space.capabilities if not item.extended]
    extended = [item.offset for item in space.capabilities if item.extended]
    assert len(standard) <= capabilities.STANDARD_HOPS
    assert len(extended) <= capabilities.EXTENDED_HOPS
    assert len(set(standard)) == len(standard) and len(set(extended)) == len(extended)
    assert all(64 <= offset < min(space.size, 256) for offset in standard)
    assert all(256 <= offset < space.size for offset in extended)
    if len(data) % 16 == 0:
        json.dumps(config_as_json(space))


def _patched(data: bytes) -> bytes:
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
    speed = parse_speed(text)
    assert speed is None or isfinite(speed)


def check_names(data: bytes) -> None:
    found = Names(data).lookup("8086", "10c9", "8086", "0001", "020000")
    for name in (found.vendor, found.device, found.subsystem, found.class_name):
        assert name is None or "\n" not in name


def check_snapshot(data: bytes) -> None:
    check(with_head(data))


@dataclass(frozen=True)
class Target:
    """What is fuzzed: `check` raises for a fault; inputs of up to `max_bytes`, the seeds first."""

    check: Callable[[bytes], None]
    max_bytes: int
    seeds: tuple[bytes, ...]


def _config_seeds() -> Iterable[bytes]:
    yield from (bytes([number]) + bytes(range(64)) for number in range(len(_DECODERS)))
    yield b"\xe0"
    yield b"\xe0\x34\x00\x01\x40"
    yield from (b"\xe0\x40\x00\x04" + bytes([id_, 0x60, 0xFF, 0xFF]) for id_ in _IDS if id_ < 256)
    yield from (b"\xe0\x00\x01\x04" + id_.to_bytes(2, "little") + b"\x01\x10" for id_ in _IDS)
    yield b"\xf0" + _BASE[:256]


TARGETS = {
    "config": Target(check_config, 320, tuple(_config_seeds())),
    "vpd": Target(
        check_vpd,
        160,
        (
            b"\x82\x04\x00Card\x90\x0a\x00PN\x02XYRV\x01\x00\x78",
            b"\x82\x00\x00\x90\x00\x00\x91\x03\x00RW\x00\x78",
        ),
    ),
    "sysfs": Target(
        check_sysfs,
        160,
        (
            b"DRIVER=nvme\nPCI_CLASS=10802\nPCI_ID=8086:0010\nPCI_SUBSYS_ID=1AF4:1100\n"
            b"PCI_SLOT_NAME=0000:00:01.0\nMODALIAS=pci:v\n",
            b"0x00000000fee00000 0x00000000feefffff msi\n0x0 0x10 direct\n",
            b"0x00000000fe000000 0x00000000fe01ffff 0x0000000000040200\n",
            b"8.0 GT/s PCIe\n",
        ),
    ),
    "names": Target(
        check_names,
        160,
        (b"8086  Intel\n\t10c9  Name\n\t\t8086 0001  Sub\nC 02  Net\n\t00  Ethernet\n",),
    ),
    "snapshot": Target(
        check_snapshot,
        256,
        (
            b"",
            HEAD,
            HEAD + b"[/sys/a]\nclass = 0x00ff00\nlabel ~ x\nempty ~\n[end 6]\n",
            HEAD + b"[/sys/a]\nuevent |\n| A=1\n| B=2\nraw | ~\n| \\x00\\\\\n|\n[end 9]\n",
            HEAD
            + b"[/sys/a]\nconfig # 64\n# 000: 8680\n# 03e: ffff\nvpd ! EIO\nodd ! 524\n"
            + b"rom ?\n[end 9]\n",
            HEAD + b"[/]\ndriver -> ../../x\n\n[/sys/a\\x20b]\n\\x5bx = 1\n[end 8]\n",
        ),
    ),
}
