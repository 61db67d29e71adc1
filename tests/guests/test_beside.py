"""The guests' schedule, without a guest."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.guests.runs import BESIDE, GuestRuns, Place

PLACES = [(Place("basic", kernel), "tests/lab/test_bind.py") for kernel in ("a", "b", "c")]


class Boots(GuestRuns):
    """Boots that end when they are let go, and how many there are at a time."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        super().__init__(PLACES)

    def _run_place(self, place: Place, files: list[str]) -> None:
        self.begun.release()
        assert self.may_end.acquire(timeout=30)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "beside"
    file.touch()
    monkeypatch.setenv(BESIDE, str(file))
    monkeypatch.setenv("VFIOTOOL_LAB_JOBS", "2")
    return file


def end_all(runs: Boots) -> None:
    for _ in PLACES:
        runs.may_end.release()
    for place, file in PLACES:
        assert runs.outcomes[place, file].done.wait(30)
        assert runs.outcomes[place, file].lost is None


def test_one_guest_at_a_time_beside_the_tests_of_this_machine(beside: Path) -> None:
    runs = Boots()
    assert runs.begun.acquire(timeout=30)
    # The second would have begun at once.
    assert not runs.begun.acquire(timeout=0.2)
    beside.unlink()
    assert runs.begun.acquire(timeout=30)
    end_all(runs)


def test_guests_run_side_by_side_when_nothing_runs_beside(beside: Path) -> None:
    beside.unlink()
    runs = Boots()
    assert runs.begun.acquire(timeout=30)
    assert runs.begun.acquire(timeout=30)
    end_all(runs)
