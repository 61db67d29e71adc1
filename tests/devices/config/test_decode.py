"""Configuration space: decoded as lspci decodes it, and proof against whatever a device says."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.config_space import POINTER, build, dump
from tests.oracles.lspci import Comparison, compare, parse
from vfiotool.devices.config.decode import (
    EXTENDED_HOPS,
    STANDARD_HOPS,
    Capability,
    ConfigSpace,
    parse_config,
    read_config,
)
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree

PCIE_ENDPOINT = struct.pack("<H", 0x0002) + bytes(56)
# Bodies of a random function's capabilities: id -> bytes after the header.
STANDARD_SIZES = {0x01: 6, 0x05: 22, 0x09: 10, 0x0A: 2, 0x0D: 6, 0x11: 10, 0x13: 4}
EXTENDED_SIZES = {
    0x0001: 52,
    0x0002: 104,
    0x0003: 8,
    0x000B: 12,
    0x000D: 4,
    0x000E: 4,
    0x000F: 4,
    0x0010: 60,
    0x0012: 44,
    0x0013: 12,
    0x0015: 48,
    0x0017: 8,
    0x0018: 4,
    0x0019: 8,
    0x001B: 4,
    0x001D: 8,
    0x001E: 12,
    0x001F: 8,
    0x0023: 8,
    0x0025: 8,
    0x002E: 20,
}
PORT_TYPES = (0, 1, 4, 5, 6, 7, 8, 9, 10)


def without_reserved_codes(id_: int, body: bytearray, random_: random.Random) -> bytes:
    """Replace what the specification reserves, where lspci guesses and we say None."""
    if id_ == 0x0018:  # LTR: two latencies, scales up to 5.
        for at in (0, 2):
            word = struct.unpack_from("<H", body, at)[0] & 0x3FF
            struct.pack_into("<H", body, at, word | random_.randint(0, 5) << 10)
    elif id_ == 0x0019:  # Lane errors: sixteen lanes.
        body[6:8] = bytes(2)
    elif id_ == 0x0010:  # VF BARs: memory of 32 or 64 bits.
        for at in range(32, 56, 4):
            body[at] = body[at] & 0xF8 | random_.choice((0, 4))
    return bytes(body)


def random_space(random_: random.Random) -> bytearray:
    """A function with many capabilities, every register of them random."""
    kind, version = random_.choice(PORT_TYPES), random_.choice((1, 2, 2, 2))
    express = struct.pack(
        "<H", version | kind << 4 | random_.getrandbits(1) << 8 | random_.getrandbits(5) << 9
    )
    ids = random_.sample(sorted(STANDARD_SIZES), 4)
    registers = bytearray(random_.randbytes(56))
    # Link Capabilities 2: a port supports every speed up to its highest.
    registers[40] = (1 << random_.randint(0, 5)) - 1 << 1 | random_.getrandbits(1)
    standard = [(0x10, express + bytes(registers))]
    standard += [(id_, random_.randbytes(STANDARD_SIZES[id_])) for id_ in ids]
    random_.shuffle(standard)
    extended = [
        (
            id_,
            random_.randint(1, 3),
            without_reserved_codes(id_, bytearray(random_.randbytes(size)), random_),
        )
        for id_, size in random_.sample(sorted(EXTENDED_SIZES.items()), 12)
    ]
    data = build(standard, extended, bridge=kind in (4, 5, 6, 7, 8))
    data[4:6] = random_.randbytes(2)
    data[6] = random_.getrandbits(8) | 0x10
    data[7] = random_.getrandbits(8)
    data[0x3D] = random_.randint(0, 4)
    return data


def lspci(tmp_path: Path, functions: dict[str, bytearray]) -> str:
    if shutil.which("lspci") is None:
        pytest.skip("lspci is not installed (package pciutils)")
    path = tmp_path / "dump"
    path.write_text(dump(dict(functions)))
    done = subprocess.run(
        ["lspci", "-F", str(path), "-vvv", "-xxxx", "-nn"], capture_output=True, check=True
    )
    return done.stdout.decode("utf-8", "replace")


def test_random_registers_are_decoded_as_lspci_decodes_them(tmp_path: Path) -> None:
    random_ = random.Random(0x5EED)
    functions = {
        f"{bus:02x}:{device:02x}.{function}": random_space(random_)
        for bus in range(2)
        for device in range(32)
        for function in range(8)
    }
    found = parse(lspci(tmp_path, functions))
    assert len(found) == len(functions)
    total = Comparison()
    for function in found:
        assert bytes(function.data) == bytes(functions[function.address])
        result = compare(function, parse_config(bytes(function.data)))
        total.compared += result.compared
        total.wrong += result.wrong
    assert total.wrong == []
    assert total.compared > 50_000


def test_the_comparison_with_lspci_notices_a_wrong_bit(tmp_path: Path) -> None:
    data = build([(0x10, PCIE_ENDPOINT)], [(0x000D, 1, bytes(4))])
    (function,) = parse(lspci(tmp_path, {"00:00.0": data}))
    assert compare(function, parse_config(bytes(data))).wrong == []
    data[0x104] ^= 1
    assert len(compare(function, parse_config(bytes(data))).wrong) == 1


def only(space: ConfigSpace, name: str) -> Capability:
    capability = space.find(name)
    assert capability is not None
    return capability


def test_a_reader_without_privilege_sees_the_header_and_is_told_so() -> None:
    space = parse_config(bytes(build([(0x10, PCIE_ENDPOINT)])[:64]))
    assert (space.size, space.complete, space.capabilities) == (64, False, ())
    assert space.header is not None and space.header.vendor == "8086"


def test_a_function_without_capabilities_is_complete_in_64_bytes() -> None:
    assert parse_config(bytes(build()[:64])).complete


def test_a_list_that_loops_ends_at_the_loop_and_is_named() -> None:
    data = build([(0x01, bytes(6)), (0x05, bytes(22))])
    data[data[POINTER + 0] + 1] = data[POINTER]
    space = parse_config(bytes(data))
    assert [item.name for item in space.capabilities] == ["pm"]
    assert space.problems == ("the capability list loops at 0x40",)


def test_an_extended_list_that_loops_ends_at_the_loop_and_is_named() -> None:
    data = build([(0x10, PCIE_ENDPOINT)], [(0x000D, 1, bytes(4)), (0x000E, 1, bytes(4))])
    struct.pack_into("<I", data, 0x108, 0x000E | 1 << 16 | 0x100 << 20)
    space = parse_config(bytes(data))
    assert [item.name for item in space.capabilities] == ["pcie", "acs", "ari"]
    assert space.problems == ("the extended capability list loops at 0x100",)


@pytest.mark.parametrize("pointer", [0x04, 0x3C])
def test_a_pointer_into_the_header_is_refused(pointer: int) -> None:
    data = build([(0x01, bytes(6))])
    data[POINTER] = pointer
    space = parse_config(bytes(data))
    assert space.capabilities == ()
    assert "out of bounds" in space.problems[0]


def test_a_chain_of_all_ones_is_named_broken() -> None:
    data = build([(0x01, bytes(6))])
    data[0x40] = 0xFF
    assert "broken" in parse_config(bytes(data)).problems[0]


def test_a_device_that_does_not_answer_has_no_capabilities() -> None:
    space = parse_config(b"\xff" * 4096)
    assert space.header is None and not space.complete
    assert space.problems == ("the device does not answer",)


def test_a_virtual_functions_ids_are_all_ones_and_its_capabilities_are_read() -> None:
    data = build([(0x10, PCIE_ENDPOINT)], vendor=0xFFFF, device=0xFFFF)
    space = parse_config(bytes(data))
    assert space.problems == () and space.find("pcie") is not None


def test_a_truncated_capability_has_empty_fields_and_no_error() -> None:
    space = parse_config(bytes(build([(0x10, PCIE_ENDPOINT)])[:0x50]))
    express = only(space, "pcie")
    assert express.fields["device_control"] is not None
    assert express.fields["link_control_2"] is None


def test_the_serial_number_is_written_most_significant_byte_first() -> None:
    serial = bytes.fromhex("703c4cfeff111a00")
    space = parse_config(bytes(build([(0x10, PCIE_ENDPOINT)], [(0x0003, 1, serial)])))
    assert space.serial == "00-1a-11-ff-fe-4c-3c-70"


def test_extended_capabilities_of_a_conventional_function_are_not_looked_for() -> None:
    space = parse_config(bytes(build([(0x01, bytes(6))], [(0x000D, 1, bytes(4))])))
    assert [item.name for item in space.capabilities] == ["pm"]


def test_an_unknown_capability_keeps_its_place_and_version() -> None:
    space = parse_config(bytes(build([(0x10, PCIE_ENDPOINT)], [(0x7777, 3, bytes(4))])))
    unknown = space.capabilities[-1]
    assert (unknown.name, unknown.offset, unknown.version) == ("unknown-7777", 0x100, 3)
    assert unknown.fields == {}


def test_an_absent_or_unreadable_file_is_none() -> None:
    tree = MemoryTree({"/sys/bus/pci/devices/0000:00:01.0/config": 5}, {})
    host = Host(tree, live=False, name="test")
    assert read_config(host, "0000:00:01.0") is None
    assert read_config(host, "0000:00:02.0") is None


def check_bounded(space: ConfigSpace) -> None:
    standard = [item for item in space.capabilities if not item.extended]
    assert len(standard) <= STANDARD_HOPS
    assert len(space.capabilities) - len(standard) <= EXTENDED_HOPS
    json.dumps([dict(item.fields) for item in space.capabilities])


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=512))
def test_any_bytes_are_decoded_without_an_error(data: bytes) -> None:
    check_bounded(parse_config(data))


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.data())
def test_a_damaged_space_is_decoded_without_an_error(
    random_: random.Random, data: st.DataObject
) -> None:
    space = random_space(random_)
    for _ in range(data.draw(st.integers(0, 16))):
        space[data.draw(st.integers(0, 1023))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, 4096))
    check_bounded(parse_config(bytes(space[:length])))
