"""tests/lab on real kernels: one host test a file, kernel and machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.guests.begin import guest_runs
from tests.guests.runs import Outcome, Place, left_out, places
from tests.oracles.printed import schema_of
from tests.oracles.schemas import faults

CASES = places()


@pytest.mark.lab
@pytest.mark.parametrize(
    ("place", "file"),
    CASES,
    ids=[f"{case.kernel}-{case.machine}-{file.rpartition('/')[2]}" for case, file in CASES],
)
def test_file_in_guest(
    place: Place,
    file: str,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    if reason := left_out(place, file):
        pytest.skip(f"left to make proofs: {reason}")
    outcome = guest_runs(request.session).outcome(place, file)
    if outcome.unavailable:
        pytest.skip(f"no lab guest with {place.kernel} as {place.machine}: {outcome.unavailable}")
    record_property("guest", _tally(place, file, outcome))
    failed = outcome.of("failed")
    unlike = list(_unlike_published(outcome))
    if failed or unlike or outcome.lost:
        parts = [f"{row['test']}\n{row['text']}" for row in failed] + unlike
        parts += [f"the guest was lost: {outcome.lost}"] if outcome.lost else []
        pytest.fail("\n\n".join(parts), pytrace=False)
    if not outcome.of("passed"):
        reasons = Counter(row["text"] for row in outcome.of("skipped"))
        assert reasons, f"{file} has no tests"
        pytest.skip("; ".join(reasons))


def _unlike_published(outcome: Outcome) -> Iterator[str]:
    """What commands printed in the guest that their schemas do not describe."""
    for row in outcome.of("printed"):
        wrong = faults(schema_of(row["command"], row["payload"]), row["payload"])
        if wrong:
            yield f"{row['test']}\nwhat `{row['command']}` printed: {'; '.join(wrong[:5])}"


def _tally(place: Place, file: str, outcome: Outcome) -> dict[str, object]:
    return {
        "file": file.rpartition("/")[2],
        "kernel": place.kernel,
        "machine": place.machine,
        "again": outcome.again,
        "passed": len(outcome.of("passed")),
        "failed": len(outcome.of("failed")),
        "skipped": [row["text"] for row in outcome.of("skipped")],
        "seconds": sum(row.get("seconds", 0.0) for row in outcome.rows),
        "measured": {row["test"]: row["measured"] for row in outcome.rows if row.get("measured")},
    }
