"""What the fuzzers found interesting once, replayed."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from snapshot_check import check, with_head

KEPT = Path(__file__).resolve().parent / "fuzz" / "snapshot_corpus.json"


def test_the_snapshot_parser_survives_all_that_was_kept() -> None:
    inputs = [base64.b64decode(text) for text in json.loads(KEPT.read_text())]
    read = [check(with_head(data)) for data in inputs]
    assert len(inputs) > 50 and any(read) and not all(read)
