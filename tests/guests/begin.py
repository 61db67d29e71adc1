"""When guests of a session begin: at once, beside tests that boot guests of their own."""

from __future__ import annotations

import os

import pytest

from tests.guests.runs import GuestRuns, Place, left_out

_RUNS = pytest.StashKey[GuestRuns]()


def is_file_in_guest(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and item.originalname == "test_file_in_guest"


def chosen(items: list[pytest.Item]) -> list[tuple[Place, str]]:
    """The files to run in guests of all tests that were chosen."""
    found = []
    for item in items:
        if isinstance(item, pytest.Function) and is_file_in_guest(item):
            place, file = item.callspec.params["place"], item.callspec.params["file"]
            if not left_out(place, file):
                found.append((place, file))
    return found


def begin_at_once(session: pytest.Session) -> None:
    """Begin where all tests want guests; what others do to this process must not reach one.

    A process of xdist leaves it to the first file: it may be given none.
    """
    if session.config.option.collectonly or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if all(item.get_closest_marker("lab") for item in session.items):
        guest_runs(session)


def guest_runs(session: pytest.Session) -> GuestRuns:
    """The guests of all chosen tests, at work from the first call on."""
    if _RUNS not in session.stash:
        around = not all(is_file_in_guest(item) for item in session.items)
        session.stash[_RUNS] = GuestRuns(chosen(session.items), around=around)
    return session.stash[_RUNS]
