"""docs/model-guide.md, run: its blocks, put together, are a model and a driver that work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vfiotool.vfio import Interrupt

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "model-guide.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_guide_s_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What the guide waits for in vain need not take five seconds here.
    whole = Interrupt.wait
    monkeypatch.setattr(Interrupt, "wait", lambda self, limit: whole(self, min(limit, 0.2)))
    found = blocks()
    assert len(found) == 5
    names: dict[str, Any] = {"__name__": "checksum"}
    for block in found:
        exec(compile(block, str(GUIDE), "exec"), names)


def test_the_model_has_at_most_fifty_lines() -> None:
    declared, model = blocks()[:2]
    lines = [line for line in (declared + model).splitlines() if line.strip()]
    assert len(lines) <= 50
