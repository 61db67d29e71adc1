"""What the fuzzers found interesting once, replayed; and each fuzzer run for a moment."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS
from tests.oracles.snapshot_check import check, with_head

FOLDER = Path(__file__).resolve().parent
# Enough to see that a fuzzer works and to find what is wrong at once; a second each.
RUNS = 10_000


def kept(target: str) -> list[bytes]:
    texts = json.loads((FOLDER / f"{target}_corpus.json").read_text())
    return [base64.b64decode(text) for text in texts]


@pytest.mark.parametrize("target", TARGETS)
def test_the_parser_survives_all_that_was_kept(target: str) -> None:
    inputs = kept(target)
    assert len(inputs) >= len(TARGETS[target].seeds) / 2
    for data in (*inputs, *TARGETS[target].seeds):
        TARGETS[target].check(data)


def test_snapshots_are_kept_that_are_read_and_that_are_refused() -> None:
    read = [check(with_head(data)) for data in kept("snapshot")]
    assert len(read) > 50 and any(read) and not all(read)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: .[fuzz]")
@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_finds_nothing_in_a_bounded_run(target: str, tmp_path: Path) -> None:
    for number, data in enumerate(kept(target)):
        (tmp_path / str(number)).write_bytes(data)
    options = [f"-runs={RUNS}", "-seed=1"]
    command = [sys.executable, str(FOLDER / "fuzz.py"), target, *options, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Done {RUNS} runs" in done.stderr
