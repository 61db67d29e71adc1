"""Decoding what the kernel tells of devices and regions: hostile buffers, sparse areas."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.errors import KernelError
from vfiotool.vfio.caps import (
    Area,
    names,
    parse_device,
    parse_region,
    parse_type1,
    walk,
)


def region(
    flags: int, size: int, *capabilities: tuple[int, bytes], cap_offset: int | None = None
) -> bytes:
    head = struct.calcsize("=IIIIQQ")
    chain = b""
    for number, (identifier, body) in enumerate(capabilities):
        end = head + len(chain) + 8 + len(body)
        following = end if number + 1 < len(capabilities) else 0
        chain += struct.pack("=HHI", identifier, 1, following) + body
    first = cap_offset if cap_offset is not None else (head if capabilities else 0)
    return struct.pack("=IIIIQQ", head + len(chain), flags, 0, first, size, 1 << 40) + chain


def sparse(*areas: tuple[int, int]) -> tuple[int, bytes]:
    return 1, struct.pack("=II", len(areas), 0) + b"".join(struct.pack("=QQ", *a) for a in areas)


def test_a_mappable_region_without_sparse_areas_is_one_area() -> None:
    info = parse_region(region(7, 0x4000), 2)
    assert info.areas == (Area(0, 0x4000),)
    assert (info.index, info.position, info.readable, info.writable) == (2, 1 << 40, True, True)
    assert info.flags == ("read", "write", "mmap")


def test_sparse_areas_type_and_msix_are_read_from_the_chain() -> None:
    raw = region(
        15,
        0x4000,
        sparse((0, 0x1000), (0x3000, 0x1000)),
        (3, b""),
        (2, bytes([5, 0, 0, 0, 1, 0, 0, 0])),
    )
    info = parse_region(raw, 0)
    assert info.areas == (Area(0, 0x1000), Area(0x3000, 0x1000))
    assert info.msix_mappable
    assert (info.type, info.subtype) == (5, 1)


def test_a_sparse_list_without_areas_means_nothing_can_be_mapped() -> None:
    assert parse_region(region(15, 0x4000, sparse()), 0).areas == ()


def test_caps_flag_with_offset_zero_is_no_chain() -> None:
    assert parse_region(region(15, 0x1000, cap_offset=0), 0).areas == (Area(0, 0x1000),)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (region(15, 0x1000, sparse((0, 0x2000))), "outside it"),
        (region(15, 0x1000, sparse(((1 << 64) - 1, 2))), "outside it"),
        (region(15, 0x1000, (1, struct.pack("=II", 9, 0))), "cut short"),
        (region(15, 0x1000, (1, struct.pack("=II", 0xFFFFFFFF, 0))), "cut short"),
        (region(15, 0x1000, (1, b"")), "cut short"),
        (region(15, 0x1000, cap_offset=4), "outside the answer"),
        (region(15, 0x1000, cap_offset=1 << 31), "outside the answer"),
        (b"\0" * 31, "cut short"),
    ],
)
def test_malformed_answers_are_errors_not_guesses(raw: bytes, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        parse_region(raw, 0)


def test_a_chain_that_loops_is_an_error() -> None:
    raw = bytearray(region(15, 0x1000, (9, b""), (9, b"")))
    struct.pack_into("=HHI", raw, 40, 9, 1, 32)
    with pytest.raises(KernelError, match="loops"):
        parse_region(bytes(raw), 0)


def test_a_chain_of_more_links_than_any_kernel_makes_is_an_error() -> None:
    raw = region(15, 0x1000, *[(9, b"")] * 65)
    with pytest.raises(KernelError, match="loops"):
        parse_region(raw, 0)


@given(st.binary(max_size=256), st.integers(0, 300))
def test_walking_any_bytes_ends_with_links_inside_or_an_error(buffer: bytes, offset: int) -> None:
    with contextlib.suppress(KernelError):
        found = walk(buffer, offset, 0, "test")
        assert len(found) <= 64
        assert all(len(capability.body) <= len(buffer) for capability in found)


@given(st.binary(min_size=20, max_size=200))
def test_any_answer_is_decoded_or_refused(buffer: bytes) -> None:
    for parse in (parse_device, parse_type1, lambda raw: parse_region(raw, 0)):
        with contextlib.suppress(KernelError):
            parse(buffer)


def test_container_info_tells_ranges_and_how_many_mappings_are_left() -> None:
    ranges = struct.pack("=HHI", 1, 1, 24 + 48) + struct.pack(
        "=IIQQQQ", 2, 0, 0, 0xFEDFFFFF, 0xFEF00000, (1 << 39) - 1
    )
    left = struct.pack("=HHII", 3, 1, 0, 65535)
    raw = struct.pack("=IIQII", 24 + len(ranges + left), 3, 0x40201000, 24, 0) + ranges + left
    info = parse_type1(raw)
    assert info.ranges == ((0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1))
    assert info.mappings_left == 65535
    assert info.page_sizes == 0x40201000


def test_a_container_of_mdevs_alone_tells_no_ranges() -> None:
    assert parse_type1(struct.pack("=IIQII", 24, 1, 4096, 0, 0)).ranges is None


def test_flags_without_a_name_are_shown_as_numbers() -> None:
    assert names(0b1001, {1: "one"}) == ("one", "0x8")
    assert parse_device(struct.pack("=IIIII", 20, 3, 9, 5, 0)).kinds == ("reset", "pci")
    for flags, kind in ((4, "platform"), (16, "ccw"), (32, "ap"), (64, "fsl-mc"), (256, "cdx")):
        info = parse_device(struct.pack("=IIIII", 20, flags, 1, 1, 0))
        assert (info.kinds, info.is_pci) == ((kind,), False)
