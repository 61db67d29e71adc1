"""Reports from the field about the steps of `why`: they lead to the goal and hurt nobody."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.field.host import FIELD, ask, folder
from tests.field.readthrough import hosts
from vfiotool.cli import context
from vfiotool.cli.main import main
from vfiotool.devices.pci import list_addresses, read_functions
from vfiotool.snapshot.load import open_root
from vfiotool.usage.case import CaseReader
from vfiotool.usage.verdict import Verdict, explain


def verdicts(path: Path) -> list[Verdict]:
    """What `why` says of every function of a host."""
    host = open_root(str(path))
    cases = CaseReader(host)
    functions = read_functions(host, list_addresses(host))
    return [explain(cases.of(function, reasons=True)) for function in functions]


@pytest.mark.parametrize("path", hosts().values(), ids=hosts())
def test_the_first_step_is_one_that_its_command_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = open_root(str(path))
    monkeypatch.setattr(context, "open_host", lambda _: host)
    for verdict in verdicts(path):
        words = shlex.split(verdict.next[0]) if verdict.next else []
        if words[:2] in (["vfiotool", "bind"], ["vfiotool", "vf"]):
            code = main(["--root", str(path), *words[1:], "--dry-run"])
            told = capsys.readouterr()
            assert code == 0 and "nothing to do" not in told.out, (verdict.next[0], told.err)


def test_44_what_is_made_from_vfs_ends_before_they_do() -> None:
    answer = ask("44", "why", "0000:65:00.0")
    assert answer.steps[:3] == [
        "vfiotool vdpa remove vdpa0",
        "vfiotool vf set 0000:65:00.0 0",
        "vfiotool bind 0000:65:00.0",
    ]
    assert "0000:65:00.2: the vDPA device vdpa0 is made from it" in answer.text


def test_06_no_step_removes_the_vf_asked_about() -> None:
    answer = ask("06", "why", "0000:01:10.0")
    assert answer.code == 1
    assert answer.steps == []
    assert any("ACS" in note and "enable_sriov" in note for note in answer.lines("note:"))
    assert any("default route" in warning for warning in answer.lines("warning:"))


def test_07_nothing_is_offered_in_a_group_with_the_root_disk() -> None:
    answer = ask("07", "why", "0000:25:00.0")
    assert answer.steps == []
    assert any(note.endswith("more often)") and "slot" in note for note in answer.lines("note:"))
    first, second = answer.lines("warning:")
    assert first.startswith("/ is on 0000:03:00.1")
    assert second.startswith("enp34s0 on 0000:22:00.0 carries the default route")


def test_07_every_device_of_that_group_is_without_a_step() -> None:
    for verdict in verdicts(folder("07") / "root.txt"):
        assert verdict.next == (), verdict.address


@pytest.mark.parametrize(
    ("root", "device", "interface"),
    [("root", "0000:02:00.1", "eno1"), ("root-x710", "0000:44:00.3", "enp68s0f0")],
)
def test_09_the_default_route_on_a_sibling_port_is_a_warning(
    root: str, device: str, interface: str
) -> None:
    answer = ask("09", "why", device, root=root)
    assert answer.steps == []
    (warning,) = answer.lines("warning:")
    assert warning.startswith(interface)
    assert "cut this host off" in warning
    assert any("another slot" in note for note in answer.lines("note:"))


def test_10_remapping_comes_before_binding() -> None:
    assert ask("10", "why", "0000:00:1d.2").steps == ["vfiotool doctor"]


def test_11_the_boot_frame_buffer_is_kept_away_by_a_kernel_option() -> None:
    answer = ask("11", "why", "0000:04:00.0")
    assert "initcall_blacklist=sysfb_init" in answer.steps[0]
    assert answer.steps[-1] == "reboot"


@pytest.mark.parametrize("case", ["12", "49"])
def test_no_step_goes_through_the_controller_that_a_disk_lies_behind(case: str) -> None:
    answer = ask(case, "why", "10000:e1:00.0")
    assert answer.steps == []
    assert any("lies behind 0000:00:0e.0" in note for note in answer.lines("note:"))


def test_12_the_controller_itself_takes_its_disks_along() -> None:
    answer = ask("12", "why", "0000:00:0e.0")
    assert answer.steps[0] == "vfiotool bind 0000:00:0e.0"
    assert any("10000:e1:00.0 (nvme) lies behind" in note for note in answer.lines("note:"))


def test_47_a_disk_in_a_pool_is_exported_first() -> None:
    assert ask("47", "why", "0000:03:00.0").steps[:2] == [
        "zpool export tank",
        "vfiotool bind 0000:03:00.0",
    ]


def test_49_a_controller_with_the_root_disk_behind_it_has_no_step() -> None:
    answer = ask("49", "why", "0000:00:0e.0")
    assert answer.steps == []
    assert any("/ is on" in warning for warning in answer.lines("warning:"))


def test_51_reserved_memory_has_no_step_and_a_hint() -> None:
    answer = ask("51", "why", "0000:04:00.0")
    assert answer.steps == []
    assert any("firmware's setup" in note for note in answer.lines("note:"))
    assert "reserved-direct" not in ask("51", "why", "0000:00:1d.0").text


OPTIONS = [
    ("20", "root", "rpm-ostree kargs --append-if-missing=intel_iommu=on"),
    ("20", "root-bazzite", "rpm-ostree kargs --append-if-missing=intel_iommu=on"),
    ("22", "root", 'kernelstub -a "intel_iommu=on"'),
    ("24", "root", "/etc/default/grub"),
    ("26", "root", "/etc/kernel/cmdline"),
]


@pytest.mark.parametrize(("case", "root", "words"), OPTIONS)
def test_the_kernel_option_is_added_as_this_distribution_does(
    case: str, root: str, words: str
) -> None:
    steps = ask(case, "why", "0000:01:00.0", root=root).steps
    assert words in steps[0]
    assert steps[-1] == "reboot"
    doctor = ask(case, "doctor", root=root)
    for step in steps:
        assert step in doctor.text


@pytest.mark.parametrize("case", ["24", "26"])
def test_proxmox_copies_what_was_changed(case: str) -> None:
    assert ask(case, "why", "0000:01:00.0").steps[1:] == ["proxmox-boot-tool refresh", "reboot"]


DESTRUCTIVE = ("umount", "swapoff", "lvchange", "mdadm", "zpool", "ip ", "cryptsetup", "echo 0")


@pytest.mark.parametrize(
    "path", sorted(FIELD.glob("*/*.txt")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_what_has_to_stay_leaves_no_step_and_every_blocked_device_an_answer(path: Path) -> None:
    for verdict in verdicts(path):
        assert not (verdict.warnings and verdict.next)
        assert verdict.next or verdict.warnings or verdict.notes
        if any(blocker.kind == "no-iommu" for blocker in verdict.blockers):
            assert not [step for step in verdict.next if step.startswith(DESTRUCTIVE)]
