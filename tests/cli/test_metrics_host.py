"""`metrics`: the host's own part, from a recorded host and from the audit trail."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiotool.change.audit import AuditTrail, read_audit
from vfiotool.cli import metrics
from vfiotool.cli.main import main
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.saved import DesiredState
from vfiotool.snapshot.load import open_root

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


def test_drift_is_counted_from_the_policy_that_was_applied_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "version = 1\n"
    for address in ("0000:02:01.0", "0000:77:00.0"):
        text += f'[[device]]\nmatch = {{ address = "{address}" }}\n'
        text += 'driver = "vfio-pci"\ngroup = "whole"\n'
    kept = DesiredState(str(tmp_path))
    monkeypatch.setattr("vfiotool.policy.saved.DesiredState", lambda: kept)
    monkeypatch.setattr("vfiotool.change.journal.Journal.existing", lambda host: None)
    host = open_root(str(HOSTS / "shared-group"))
    assert metrics._drift(host) == []
    kept.save(parse_policy(text, "p.toml"), None)
    steps, refused = metrics._drift(host)
    ((_, count),) = steps.samples
    assert count > 0
    ((_, count),) = refused.samples
    assert count > 0


def test_a_policy_that_cannot_be_read_is_no_failure_of_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "applied.json").write_text("{")
    monkeypatch.setattr("vfiotool.policy.saved.DesiredState", lambda: DesiredState(str(tmp_path)))
    assert metrics._drift(open_root(str(HOSTS / "shared-group"))) == []
    assert "no drift in the metrics" in capsys.readouterr().err
