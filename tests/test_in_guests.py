"""tests/lab on real kernels: one host test a file, kernel and machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from guest_runs import GuestRuns, Outcome, Place, left_out, places

CASES = places()


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> GuestRuns:
    """The guests of all chosen tests, at work from here on."""
    chosen = []
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == "test_file_in_guest":
            place, file = item.callspec.params["place"], item.callspec.params["file"]
            if not left_out(file):
                chosen.append((place, file))
    return GuestRuns(chosen)


@pytest.mark.lab
@pytest.mark.parametrize(
    ("place", "file"),
    CASES,
    ids=[f"{case.kernel}-{case.machine}-{file.rpartition('/')[2]}" for case, file in CASES],
)
def test_file_in_guest(
    place: Place, file: str, runs: GuestRuns, record_property: Callable[[str, object], None]
) -> None:
    if reason := left_out(file):
        pytest.skip(f"left to make proofs: {reason}")
    outcome = runs.outcome(place, file)
    if outcome.unavailable:
        pytest.skip(f"no lab guest with {place.kernel} as {place.machine}: {outcome.unavailable}")
    record_property("guest", _tally(place, outcome))
    failed = outcome.of("failed")
    if failed or outcome.lost:
        parts = [f"{row['test']}\n{row['text']}" for row in failed]
        parts += [f"the guest was lost: {outcome.lost}"] if outcome.lost else []
        pytest.fail("\n\n".join(parts), pytrace=False)
    if not outcome.of("passed"):
        reasons = Counter(row["text"] for row in outcome.of("skipped"))
        assert reasons, f"{file} has no tests"
        pytest.skip("; ".join(reasons))


def _tally(place: Place, outcome: Outcome) -> dict[str, object]:
    return {
        "kernel": place.kernel,
        "machine": place.machine,
        "passed": len(outcome.of("passed")),
        "failed": len(outcome.of("failed")),
        "skipped": [row["text"] for row in outcome.of("skipped")],
        "seconds": sum(row.get("seconds", 0.0) for row in outcome.rows),
    }
