"""Names from pci.ids: the right block, the right depth, and nothing where there is nothing."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.memory_host import HostBuilder
from vfiotool.devices.names import DeviceNames, Names, read_names

TABLE = b"""\
# comment
0001  First Vendor
\t0010  First Device
8086  Intel Corporation
\t10c9  82576 Gigabit Network Connection
# a comment inside the block
\t\t8086 a03c  Gigabit ET Dual Port Server Adapter
\t10ca  82576 Virtual Function
\t\t1af4 1100  Of the next device
ffff  Illegal Vendor ID

C 02  Network controller
\t00  Ethernet controller
\t80  Network controller
C ff  Unassigned class
"""


def test_a_function_is_named_with_its_subsystem_and_class() -> None:
    found = Names(TABLE).lookup("8086", "10c9", "8086", "a03c", "020000")
    assert found == DeviceNames(
        vendor="Intel Corporation",
        device="82576 Gigabit Network Connection",
        subsystem="Gigabit ET Dual Port Server Adapter",
        class_name="Ethernet controller",
    )


def test_a_subsystem_of_another_device_is_not_taken() -> None:
    assert Names(TABLE).subsystem("8086", "10c9", "1af4", "1100") is None


def test_a_device_of_another_vendor_is_not_taken() -> None:
    assert Names(TABLE).device("0001", "10c9") is None


def test_a_subclass_without_a_name_falls_back_to_its_class() -> None:
    names = Names(TABLE)
    assert names.class_name("020700") == "Network controller"
    assert names.class_name("ff0000") == "Unassigned class"
    assert names.class_name("990000") is None
    assert names.class_name("02") is None


def test_the_last_vendor_of_a_table_without_a_final_newline_is_found() -> None:
    assert Names(b"abcd  Last").vendor("abcd") == "Last"


def test_no_table_names_nothing() -> None:
    names = Names(None)
    assert not names
    assert names.lookup("8086", "10c9", "8086", "a03c", "020000") == DeviceNames()


def test_bytes_that_are_no_text_are_kept_as_escapes() -> None:
    assert Names(b"8086  Int\xffel\n").vendor("8086") == "Int\\xffel"


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/usr/share/misc/pci.ids", TABLE),
        ("/usr/share/hwdata/pci.ids", TABLE),
        ("/usr/share/hwdata/pci.ids.gz", gzip.compress(TABLE)),
    ],
)
def test_the_table_inside_the_root_is_used(path: str, content: bytes) -> None:
    host = HostBuilder().file(path, content).host()
    assert read_names(host).vendor("0001") == "First Vendor"


def test_a_damaged_compressed_table_names_nothing() -> None:
    builder = HostBuilder().file("/usr/share/misc/pci.ids.gz", b"no gzip")
    assert (
        builder.file("/usr/share/misc/pci.ids", b"").host().read_bytes("/usr/share/misc/pci.ids.gz")
    )
    assert read_names(builder.host()).vendor("0001") is None


_LINES = st.sampled_from(
    [
        b"8086  V",
        b"\t10c9  D",
        b"\t\t8086 a03c  S",
        b"C 02  N",
        b"\t00  E",
        b"# c",
        b"",
        b"\t",
        b"C ",
    ]
)


@given(st.lists(st.one_of(_LINES, st.binary(max_size=20)), max_size=12))
def test_any_table_gives_names_of_one_line_or_none(lines: list[bytes]) -> None:
    found = Names(b"\n".join(lines)).lookup("8086", "10c9", "8086", "a03c", "020000")
    for name in (found.vendor, found.device, found.subsystem, found.class_name):
        assert name is None or "\n" not in name
