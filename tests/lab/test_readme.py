"""The README's tour in the guest that it names: what it shows is what comes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.lab import tour
from tests.lab.commands import restore
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.12",)
PROOF = "it wants a guest as it is after its start, in which no other file has been"
SECTION = "Five minutes"


@pytest.fixture
def put_back() -> Iterator[None]:
    """The guest as it was, whatever became of the tour."""
    yield
    subprocess.run(["umount", "/run/data"], check=False, capture_output=True)
    restore(Host.local())


@pytest.mark.usefixtures("put_back")
def test_each_command_prints_what_the_readme_shows() -> None:
    wrong = [
        words
        for step in tour.section(SECTION)
        if (words := tour.differs(step, tour.run(step.command))) is not None
    ]
    assert not wrong, "\n\n".join(wrong)
