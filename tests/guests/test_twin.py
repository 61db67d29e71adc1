"""Twins that run: groups, verdicts and plans are held against the host's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from vfiotool.cli.lab_twin import asked_here, compare_with, planned
from vfiotool.lab.twin_compare import is_explained
from vfiotool.lab.twin_run import running_twin

pytestmark = pytest.mark.lab

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
KERNEL = "6.12"
VFIOTOOL = str(Path(sys.prefix) / "bin/vfiotool")
# The others boot in `make proofs`. Twins of an Intel and an AMD host boot in test_rehearse.py too.
ALWAYS = ("storage-in-use", "amd-desktop")
CASES = [
    path.name if path.name in ALWAYS else pytest.param(path.name, marks=pytest.mark.proof)
    for path in sorted(HOSTS.iterdir())
]


@pytest.mark.parametrize("name", CASES)
def test_a_twin_has_the_host_s_groups_verdicts_and_plans(name: str) -> None:
    need_lab(KERNEL)
    snapshot = str(HOSTS / name)
    host, plan = planned(snapshot)
    devices = asked_here(snapshot, "devices")
    with running_twin(host, plan, KERNEL) as running:
        guest = running.guest
        found = compare_with(guest, snapshot, plan)
        assert [one.line() for one in found if not is_explained(one, plan.lacks)] == []
        done = guest.exec([VFIOTOOL, "devices", "--json"], timeout_s=120)
        theirs = {one["address"]: one for one in json.loads(done.stdout)["devices"]}
        for one in devices["devices"]:
            if one["address"] in {replay.original.address for replay in plan.replays}:
                twin = theirs[plan.addresses[one["address"]]]
                same = ("vendor", "device", "class")
                assert [twin[key] for key in same] == [one[key] for key in same], twin
        if name == "storage-in-use":
            refused = guest.exec([VFIOTOOL, "bind", "0000:01:00.0"], timeout_s=60, merge=True)
            assert refused.exit_code == 4 and "mounted" in refused.text
