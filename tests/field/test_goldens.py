"""What people read on every host, against what was read by eye once."""

from __future__ import annotations

import pytest

from tests.field.readthrough import GOLDENS, hosts, text_of


@pytest.mark.parametrize("name", hosts())
def test_every_reading_command_prints_what_was_read_by_eye(name: str) -> None:
    golden = (GOLDENS / f"{name}.txt").read_text(encoding="utf-8")
    hint = "read what changed; if it is meant: python -m tests.field.readthrough"
    assert text_of(hosts()[name]) == golden, hint


def test_each_golden_has_its_host() -> None:
    assert {path.stem for path in GOLDENS.glob("*.txt")} == set(hosts())


def test_no_line_says_none() -> None:
    """Python's word for what is not known has no place in a sentence."""
    for path in GOLDENS.glob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "None" not in line.split(), f"{path.name}: {line}"
