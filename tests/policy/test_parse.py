"""Reading policies: the contract's example, and every fault with its place."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.errors import NotFound, Refused, UsageError
from vfiotool.policy.parse import PolicyError, parse_policy, read_policy
from vfiotool.policy.toml_places import key_places

CONTRACT = """
version = 1

[[device]]
match  = { id = "10de:2684" }
expect = { count = 1 }
driver = "vfio-pci"
group  = "whole"

[[sriov]]
match     = { address = "0000:01:00.0" }
vfs       = 4
autoprobe = false
vf        = [ { index = 0, mac = "52:54:00:00:00:01", vlan = 10, trust = true, driver = "vfio-pci" } ]

[[mdev]]
parent = "mtty"
type   = "mtty-2"
uuid   = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"

[[vdpa]]
name    = "vdpa0"
parent  = "vdpasim_blk"
driver  = "vhost_vdpa"
"""  # noqa: E501


def faults_of(text: str) -> list[tuple[int, int, str]]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.toml")
    assert caught.value.exit_code == 2
    return [(fault.line, fault.column, fault.message) for fault in caught.value.faults]


def device(line: str) -> str:
    return f'version = 1\n[[device]]\nmatch = {{ address = "01:00.0" }}\n{line}\n'


def test_the_contracts_example_is_read() -> None:
    policy = parse_policy(CONTRACT)
    assert policy.devices[0].match.id == "10de:2684"
    assert policy.devices[0].count == 1
    assert policy.devices[0].group == "whole"
    assert policy.sriov[0].vfs == 4
    assert policy.sriov[0].autoprobe is False
    assert policy.sriov[0].vf[0].mac == "52:54:00:00:00:01"
    assert policy.mdevs[0].type == "mtty-2"
    assert policy.vdpas[0].driver == "vhost_vdpa"


def test_an_unknown_key_is_told_with_its_place_and_what_was_meant() -> None:
    assert faults_of(device('drivr = "vfio-pci"')) == [
        (4, 1, "unknown key 'drivr' in [[device]]: did you mean driver?")
    ]


def test_all_faults_are_told_at_once_in_their_order() -> None:
    text = (
        'version = 1\n[[sriov]]\nmatch = { adress = "x", id = 3 }\nvfs = "four"\n'
        'vf = [\n  { index = 0, mac = "no" },\n  { index = 0, colour = 1 },\n]\n'
        "[[device]]\n"
    )
    found = [(line, column) for line, column, _ in faults_of(text)]
    assert found == [(3, 11), (3, 25), (4, 1), (6, 16), (7, 5), (7, 16), (9, 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('driver = "../vfio-pci"', "is not a driver's name"),
        ('driver = "/etc/passwd"', "is not a driver's name"),
        ('driver = "a\\nb"', "is not a driver's name"),
        (f'driver = "{"x" * 5000}"', "is not a driver's name"),
        ("driver = 7", "must be a string"),
        ('group = "some"', "must be one of whole, refuse"),
        ("expect = { count = -1 }", "-1 is not between 0 and 65536"),
        ("expect = { count = true }", "must be a number"),
        ("expect = 1", "must be a table"),
    ],
)
def test_wrong_values_are_refused_by_what_they_should_be(line: str, message: str) -> None:
    ((number, column, text),) = faults_of(device(line))
    assert (number, text[:6] != "") == (4, True)
    assert message in text
    assert column >= 1
    assert len(text) < 200


@pytest.mark.parametrize(
    "name", ["../../run/x", "/mtty", "a/b", "", ".", "..", "m\x00tty", "x" * 5000, "\x1b[31m"]
)
def test_names_that_leave_the_tree_are_refused(name: str) -> None:
    quoted = name.encode("unicode_escape").decode().replace("\\x", "\\u00")
    text = (
        f'version = 1\n[[mdev]]\nparent = "{quoted}"\ntype = "{quoted}"\n'
        f'uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"\nattrs = [ ["{quoted}", "1"] ]\n'
    )
    found = faults_of(text)
    # An attribute may lie in a folder of the mdev, so a/b is one.
    assert [line for line, _, _ in found] == ([3, 4] if name == "a/b" else [3, 4, 6])
    assert all("\x1b" not in message and "\x00" not in message for _, _, message in found)


def test_duplicates_and_impossible_combinations_are_refused() -> None:
    twice = device("") + '[[device]]\nmatch = { address = "0000:01:00.0" }\n'
    assert faults_of(twice)[0][2] == "address 0000:01:00.0 is there already, in line 3"
    text = (
        'version = 1\n[[sriov]]\nmatch = { address = "01:00.0" }\nvfs = 2\nvf = [{ index = 2 }]\n'
    )
    assert faults_of(text)[0][2] == "there is no VF 2 among 2 (from 0)"
    half = 'version = 1\n[[device]]\nmatch = { pf = "01:00.0" }\n'
    assert "pf and index go together" in faults_of(half)[0][2]


def test_a_syntax_error_has_its_place() -> None:
    assert faults_of("version = 1\n[[device]\n")[0][:2] == (2, 9)
    assert "version = 1 must be given" in faults_of("")[0][2]
    assert "version" in faults_of("version = 2\n")[0][2]


def test_attributes_keep_their_order_and_repetitions() -> None:
    text = CONTRACT.replace(
        'type   = "mtty-2"', 'type = "mtty-2"\nattrs = [["b", "1"], ["a", "2"], ["b", "3"]]'
    )
    assert parse_policy(text).mdevs[0].attrs == (("b", "1"), ("a", "2"), ("b", "3"))


def test_a_policy_that_anybody_can_write_is_refused_to_root(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root is refused")
    path = tmp_path / "p.toml"
    path.write_text("version = 1\n")
    path.chmod(0o666)
    with pytest.raises(Refused, match="anybody can write"):
        read_policy(str(path))
    path.chmod(0o644)
    assert read_policy(str(path)).devices == ()


def test_what_is_no_policy_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_policy(str(tmp_path / "absent.toml"))
    with pytest.raises(UsageError):
        read_policy(str(tmp_path))
    broken = tmp_path / "latin.toml"
    broken.write_bytes(b"version = 1 # \xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_policy(str(broken))


def test_places_survive_all_of_tomls_forms() -> None:
    text = (
        "# a comment with [ and {\n"
        'a."b.c" = """x\n[no]\n""" # end\n'
        "'d' = [ 1, # one\n  [2, 3],\n  { e = 'f', \"g\" = 4 } ]\n"
        "[t.u]\nk = 1979-05-27T07:32:00Z\n"
        "[[x]]\n[x.y]\nz = 0x1F\n[[x]]\nw.v = -inf\n"
    )
    places = key_places(text)
    assert places["a", "b.c"] == (2, 1)
    assert places["d", 1, 0] == (6, 4)
    assert places["d", 2, "g"] == (7, 14)
    assert places["t", "u", "k"] == (9, 1)
    assert places["x", 0, "y", "z"] == (12, 1)
    assert places["x", 1, "w", "v"] == (14, 1)


@given(st.text(max_size=300))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    try:
        parse_policy(text)
    except PolicyError as error:
        assert error.faults


@given(st.integers(), st.integers(min_value=1, max_value=8))
def test_a_garbled_policy_never_crashes_the_reader(seed: int, cuts: int) -> None:
    chance = random.Random(seed)
    text = CONTRACT
    for _ in range(cuts):
        at = chance.randrange(len(text))
        text = (
            text[:at]
            + chance.choice(['"', "[", "]", "{", "}", "=", "\n", ",", "x", "7"])
            + (text[at + chance.randrange(3) :])
        )
    try:
        parse_policy(text)
    except PolicyError as error:
        assert all(fault.line >= 1 and fault.column >= 1 for fault in error.faults)


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "device = " + "{a=" * 2000 + "1"])
def test_a_policy_without_end_in_depth_is_a_fault(text: str) -> None:
    with pytest.raises(PolicyError, match="nested too deeply"):
        parse_policy(f"version = 1\n{text}\n")


@pytest.mark.parametrize(
    "text",
    [
        "device = [1, 2]",
        'device = ["0000:01:00.0"]',
        "device = 7",
        "[device]\nmatch = 1",
        '[[sriov]]\nmatch = { address = "0000:01:00.0" }\nvfs = 2\nvf = [1]',
        '[[sriov]]\nmatch = { address = "0000:01:00.0" }\nvfs = 2\nvf = { index = 0 }',
    ],
)
def test_what_is_to_be_tables_and_is_none_is_a_fault_of_the_policy(text: str) -> None:
    with pytest.raises(PolicyError, match=r"must be (a list of )?tables"):
        parse_policy(f"version = 1\n{text}\n")


def test_a_pipe_that_the_caller_has_open_is_read_and_a_fifo_is_not(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"version = 1\n")
        os.close(writing)
        assert read_policy(f"/dev/fd/{reading}").devices == ()
    finally:
        os.close(reading)
    # A named one has a writer at any time, or none: nobody waits for it.
    os.mkfifo(tmp_path / "p.toml")
    with pytest.raises(UsageError, match="no regular file"):
        read_policy(str(tmp_path / "p.toml"))
