"""Vital Product Data: fields, checksum, and bounds on what a device may say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.memory_host import HostBuilder
from vfiotool.devices.config.vpd import parse_vpd
from vfiotool.devices.details import read_vpd


def resource(tag: int, body: bytes) -> bytes:
    return bytes([tag]) + len(body).to_bytes(2, "little") + body


def field(keyword: bytes, value: bytes) -> bytes:
    return keyword + bytes([len(value)]) + value


def whole(name: bytes = b"Adapter", serial: bytes = b"MT1234") -> bytes:
    """Identifier, read-only part with its checksum, read-write part, end tag."""
    fields = field(b"PN", b"X-1") + field(b"SN", serial)
    head = resource(0x82, name)
    body = bytes([0x90]) + (len(fields) + 4).to_bytes(2, "little") + fields + b"RV\x01"
    checksum = -sum(head + body) & 0xFF
    return head + body + bytes([checksum]) + resource(0x91, field(b"V0", b"mine")) + b"\x78"


def test_fields_are_read_in_order_and_the_checksum_holds() -> None:
    vpd = parse_vpd(whole() + bytes(64))
    assert vpd.name == "Adapter"
    assert vpd.fields == (("PN", "X-1"), ("SN", "MT1234"), ("V0", "mine"))
    assert vpd.checksum_ok is True and vpd.problems == ()


def test_a_wrong_byte_breaks_the_checksum() -> None:
    data = bytearray(whole())
    data[4] ^= 1
    assert parse_vpd(bytes(data)).checksum_ok is False


def test_without_a_checksum_nothing_is_said_of_it() -> None:
    data = resource(0x90, field(b"SN", b"1")) + b"\x78"
    assert parse_vpd(data).checksum_ok is None


def test_unprintable_bytes_are_escaped_and_padding_is_dropped() -> None:
    vpd = parse_vpd(resource(0x82, b"\x1b[2Jred  \0\0") + b"\x78")
    assert vpd.name == "\\x1b[2Jred"


def test_a_resource_that_is_cut_off_is_named() -> None:
    vpd = parse_vpd(whole()[:12])
    assert vpd.name == "Adapter"
    assert "cut off" in vpd.problems[0] or "no resource" in vpd.problems[0]


def test_a_field_longer_than_its_resource_ends_the_fields() -> None:
    vpd = parse_vpd(resource(0x90, b"SN\xffshort") + b"\x78")
    assert vpd.fields == () and vpd.problems == ()


def test_missing_end_tag_is_named() -> None:
    assert parse_vpd(resource(0x82, b"x")).problems == ("there is no end tag",)


def test_rubbish_is_named_and_nothing_is_raised() -> None:
    assert parse_vpd(b"\xff" * 64).problems == ("no resource begins at 0x0",)


def test_vpd_that_cannot_be_read_is_none() -> None:
    builder = HostBuilder().function("0000:01:00.0", attributes={"vpd": 5})
    assert read_vpd(builder.host(), "0000:01:00.0") is None
    assert read_vpd(builder.host(), "0000:02:00.0") is None


@given(st.binary(max_size=600))
def test_any_bytes_are_read(data: bytes) -> None:
    vpd = parse_vpd(data)
    assert all(text.isprintable() for pair in vpd.fields for text in pair)


@given(st.binary(max_size=40), st.binary(max_size=20))
def test_what_is_written_is_read_back(name: bytes, serial: bytes) -> None:
    vpd = parse_vpd(whole(name, serial))
    assert vpd.checksum_ok is True and vpd.problems == ()
    assert [keyword for keyword, _ in vpd.fields] == ["PN", "SN", "V0"]
