"""Rehearsals that are played: what each finds before a real host is touched. One boot each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from vfiotool.cli.lab_twin import planned
from vfiotool.cli.main import main
from vfiotool.devices.pci import list_addresses, read_functions
from vfiotool.host.host import Host
from vfiotool.lab.rehearse import ACTS, Rehearsal, said
from vfiotool.lab.rehearse_run import rehearse

pytestmark = pytest.mark.lab

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
KERNEL = "6.12"
SPARE = "0000:03:00.0"
TEN = (
    *("1b:00.0", "1c:00.0", "9b:00.0", "9c:00.0", "9d:00.0"),
    *("17:00.0", "17:00.1", "98:00.0", "98:00.1", "03:00.1"),
)
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


@pytest.mark.proof
def test_ten_devices_go_through_all_three_acts_and_are_as_before(
    record_property: Callable[[str, object], None],
) -> None:
    """Network cards, NVMe disks behind switches, and one whose pin the twin lacks."""
    rules = "".join(f'[[device]]\nmatch = {{ address = "0000:{one}" }}\n' for one in TEN)
    begun = time.monotonic()
    found = rehearsed("two-socket-server", f"version = 1\n{rules}", qemu=True)
    record_property("seconds", round(time.monotonic() - begun))
    assert not found.findings and found.held is not None, page(found)
    assert [one.exit_code for one in found.done if one.name == "compare"] == [0, 0, 0], page(found)
    qemu = next(one for one in found.done if one.name == "qemu")
    assert qemu.exit_code == 0, page(found)


@pytest.mark.proof
def test_without_a_host_this_machine_is_rehearsed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an IOMMU or without: the twin of a machine without one refuses as the machine would."""
    need_lab(KERNEL)
    functions = read_functions(Host.local(), list_addresses(Host.local()))
    if not functions:
        pytest.skip("this machine has no PCI functions")
    policy = tmp_path / "policy.toml"
    address = functions[-1].address
    policy.write_text(f'version = 1\n[[device]]\nmatch = {{ address = "{address}" }}\n')
    code = main(["--json", "lab", "rehearse", str(policy)])
    played = json.loads(capsys.readouterr().out)
    assert played["host"] is None and address in played["addresses"]
    assert code == int(bool(played["findings"]))
    planned = next(one for one in played["commands"] if one["name"] == "plan")
    if not any(function.iommu_group is not None for function in functions):
        assert planned["exit_code"] != 0 and played["findings"], played


def test_a_reset_that_hangs_is_found_and_the_twin_ends_as_it_began() -> None:
    policy = f'version = 1\n[[device]]\nmatch = {{ address = "{SPARE}" }}\n'
    found = rehearsed("intel-workstation", policy, fault="reset-hangs")
    assert ("reset-hangs", SPARE) in kinds(found), page(found)
    assert not any(one.kind == "not-restored" for one in found.findings), page(found)
    assert [one.exit_code for one in found.done if one.name == "compare"] == [0]
