"""What `metrics` prints, held against Prometheus' own promtool."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracles.promtool import faults, promtool
from vfiotool.cli.main import main
from vfiotool.virtio.prometheus import Family, format_families, server_families

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"


@pytest.fixture(autouse=True)
def _need_promtool() -> None:
    program, reason = promtool()
    if program is None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", sorted(path.name for path in HOSTS.iterdir() if path.is_dir()))
def test_every_recorded_host(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(HOSTS / name), "metrics"]) == 0
    assert not faults(capsys.readouterr().out)


def test_servers_drift_and_changes() -> None:
    export = {
        "name": 'vm"1\n',
        "size": 1 << 20,
        "figures": {"reads": 1, "writes": 2, "flushes": 0, "discards": 0, "failed": 0},
        "connections": [{"queues": [{"broken": False}]}],
        "iops_limit": None,
        "bandwidth_limit": 1.5e6,
        "waits": 0,
    }
    counts = dict.fromkeys(("queues", "requests", "batches", "signals", "kicks", "sleeps"), 3)
    server = {"pid": 1, "exports": [export], "workers": [counts]}
    # Two servers may have exports of one name.
    paths = ("/run/a.sock", "/run/b.sock")
    servers = [{**server, "pid": n, "control_path": path} for n, path in enumerate(paths)]
    found = server_families(servers)
    drift = Family("vfiotool_policy_drift_steps", "Steps.")
    drift.add(2)
    assert not faults(format_families([*found, drift]))


def test_it_finds_what_is_wrong() -> None:
    assert "invalid escape" in faults('# TYPE a gauge\na{b="\\x1b"} 1\n')
