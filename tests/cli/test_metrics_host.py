"""`metrics`: the host's own part, from a recorded host and from the audit trail."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiotool.change.audit import AuditTrail, read_audit
from vfiotool.cli import metrics
from vfiotool.cli.main import main

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"


def test_vfs_are_counted_by_their_physical_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(HOSTS / "vfs-enabled"), "metrics"]) == 0
    text = capsys.readouterr().out
    assert 'vfiotool_vfs{pci_address="0000:02:00.0"} 3' in text
    assert 'vfiotool_vfs_on_vfio{pci_address="0000:02:00.0"} ' in text


def test_the_last_change_of_each_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trail = AuditTrail("b", str(tmp_path), log=False)
    for number, outcome in ((1, "committed"), (2, "rolled-back"), (3, "committed")):
        trail.begun(number, "bind", [], [], None)
        trail.ended(number, outcome)
    found = read_audit(folder=str(tmp_path))
    monkeypatch.setattr(metrics, "read_audit", lambda: found)
    (family,) = metrics._changes()
    assert family.samples == [
        ({"outcome": "committed"}, found[2].at),
        ({"outcome": "rolled-back"}, found[1].at),
    ]
