"""TOML within bounds: what tomllib lets through and nobody expects is a fault of the file."""

from __future__ import annotations

import pytest

from vfiotool.errors import VfiotoolError
from vfiotool.host.toml import load_toml
from vfiotool.policy.parse import parse_policy
from vfiotool.virtio.exports import parse_exports

DIGITS = "1" * 5000
HEX = "0x" + "f" * 5000
DEEP = ".a" * 5000
TEXTS = [f"version = {DIGITS}", f"version = {HEX}", f"version{DEEP} = 1", "x = " + "[" * 20_000]


@pytest.mark.parametrize("text", [*TEXTS, f"x = [{{y = {1 << 63}}}]", "x = {}".format("[" * 40)])
def test_what_no_program_could_use_is_one_fault(text: str) -> None:
    with pytest.raises(ValueError, match=r"64 bits|nested|Unclosed|Invalid"):
        load_toml(text)


def test_the_number_is_named_and_64_bits_are_not_too_many() -> None:
    with pytest.raises(ValueError, match="weight: a number of more"):
        load_toml(f"[[export]]\nweight = {1 << 63}")
    assert load_toml(f"x = {(1 << 63) - 1}\ny = [[{-1 << 63}]]")["x"] == (1 << 63) - 1


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_of_ours_says_so(text: str) -> None:
    with pytest.raises(VfiotoolError, match=r"64 bits|nested"):
        parse_exports(text, "exports.toml")
    with pytest.raises(VfiotoolError, match=r"64 bits|nested"):
        parse_policy(text, "policy.toml")
