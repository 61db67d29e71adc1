"""Rehearsals that are played: what each finds before a real host is touched. One boot each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from vfiotool.cli.lab_twin import planned
from vfiotool.lab.rehearse import ACTS, Rehearsal, said
from vfiotool.lab.rehearse_run import rehearse

pytestmark = pytest.mark.lab

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
KERNEL = "6.12"
SPARE = "0000:03:00.0"
BY_SERIAL = 'version = 1\n[[device]]\nmatch = { serial = "BUILT-980-0002" }\n'


def rehearsed(name: str, policy: str, *, qemu: bool = False, fault: str = "") -> Rehearsal:
    need_lab(KERNEL)
    host, plan = planned(str(HOSTS / name))
    wrong = {SPARE: fault} if fault else {}
    return rehearse(host, plan, policy, KERNEL, faults=wrong, qemu=qemu)


def kinds(found: Rehearsal) -> set[tuple[str, str | None]]:
    return {(one.kind, one.device) for one in found.findings}


def page(found: Rehearsal) -> list[tuple[str, str, int | None, str]]:
    return [(one.act, one.name, one.exit_code, said(one)) for one in found.done]


def test_a_group_with_the_root_disk_in_it_is_found() -> None:
    policy = 'version = 1\n[[device]]\nmatch = { address = "0000:05:00.0" }\ngroup = "whole"\n'
    found = rehearsed("amd-desktop", policy)
    refused = [one for one in found.findings if one.kind == "refused"]
    assert any(one.device == "0000:02:00.1" and "mounted" in one.detail for one in refused), page(
        found
    )
    assert {one.kind for one in found.findings} == {"refused"}, kinds(found)
    assert [one.name for one in found.done] == ["plan", "apply", "compare"]


@pytest.mark.proof
def test_a_serial_that_is_lost_and_a_second_start_that_fails_are_found() -> None:
    found = rehearsed("intel-workstation", BY_SERIAL, qemu=True, fault="reset-nothing")
    assert kinds(found) == {("serial-lost", None), ("second-start", SPARE)}, page(found)
    # Killed on the way it is as before, and so at the end of the last act.
    assert [one.exit_code for one in found.done if one.name == "compare"] == [0, 0, 0], page(found)
    assert any(one.act == ACTS[1] and one.name == "recover" for one in found.done)
    stuck = [one for one in found.done if one.act == ACTS[2] and one.name == "undo"]
    assert found.held == SPARE and stuck[0].exit_code != 0, page(found)


def test_a_reset_that_hangs_is_found_and_the_twin_ends_as_it_began() -> None:
    policy = f'version = 1\n[[device]]\nmatch = {{ address = "{SPARE}" }}\n'
    found = rehearsed("intel-workstation", policy, fault="reset-hangs")
    assert ("reset-hangs", SPARE) in kinds(found), page(found)
    assert not any(one.kind == "not-restored" for one in found.findings), page(found)
    assert [one.exit_code for one in found.done if one.name == "compare"] == [0]
