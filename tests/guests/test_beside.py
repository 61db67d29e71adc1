"""The guests' schedule, without a guest: how many at a time, which first, and when they begin."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.guests import begin
from tests.guests.runs import BESIDE, GuestRuns, Place

PLACES = [(Place("basic", kernel), "tests/lab/test_bind.py") for kernel in ("a", "b", "c")]


class Boots(GuestRuns):
    """Boots that end when they are let go, and how many there are at a time."""

    def __init__(
        self, chosen: Iterable[tuple[Place, str]] = PLACES, *, around: bool = False
    ) -> None:
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.order: list[Place] = []
        super().__init__(chosen, around=around)

    def _run_place(self, place: Place, files: list[str]) -> None:
        self.order.append(place)
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


def test_tests_around_guests_of_their_own_count_as_one(beside: Path) -> None:
    runs = Boots(around=True)
    # One beside this machine's tests: theirs.
    assert not runs.begun.acquire(timeout=0.5)
    beside.unlink()
    assert runs.begun.acquire(timeout=30)
    assert not runs.begun.acquire(timeout=0.5)
    # With the first wait for an outcome they are over.
    waiting = threading.Thread(target=runs.outcome, args=PLACES[0], daemon=True)
    waiting.start()
    assert runs.begun.acquire(timeout=30)
    end_all(runs)
    waiting.join(30)
    assert not waiting.is_alive()


def test_the_guest_with_most_files_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIOTOOL_LAB_JOBS", "1")
    runs = Boots([*PLACES, (PLACES[1][0], "tests/lab/test_uses.py")])
    end_all(runs)
    assert runs.order == [PLACES[1][0], PLACES[0][0], PLACES[2][0]]


@pytest.mark.parametrize(
    ("items", "begun"),
    [
        # Each test: is it a file in a guest, does it want a guest at all.
        ([(True, True)], [False]),
        ([(False, True), (True, True)], [True]),
        ([(False, False), (True, True)], []),
    ],
    ids=["files", "files-and-around", "with-tests-of-this-machine"],
)
def test_guests_begin_with_a_session_of_guests_alone(
    monkeypatch: pytest.MonkeyPatch, items: list[tuple[bool, bool]], begun: list[bool]
) -> None:
    made: list[bool] = []
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(begin, "is_file_in_guest", lambda item: item.in_guest)
    monkeypatch.setattr(begin, "chosen", lambda items: PLACES)
    monkeypatch.setattr(begin, "GuestRuns", lambda _, around: made.append(around))
    session: Any = SimpleNamespace(
        items=[
            SimpleNamespace(in_guest=in_guest, get_closest_marker=lambda _, lab=lab: lab)
            for in_guest, lab in items
        ],
        config=SimpleNamespace(option=SimpleNamespace(collectonly=True)),
        stash=pytest.Stash(),
    )
    begin.begin_at_once(session)
    assert made == []
    session.config.option.collectonly = False
    begin.begin_at_once(session)
    assert made == begun
    # What asks for an outcome finds the guests that have begun.
    begin.guest_runs(session)
    assert len(made) == 1
