"""What a rehearsal makes of what its commands did, without a guest."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.served import serving
from vfiotool.cli import lab_rehearse
from vfiotool.cli.main import main
from vfiotool.errors import KernelError, NotFound
from vfiotool.lab import rehearse_run, twin_run
from vfiotool.lab.channel import Kind
from vfiotool.lab.guest import GuestTimeout
from vfiotool.lab.inside import rehearsal as inside
from vfiotool.lab.inside import vm
from vfiotool.lab.rehearse import (
    ACTS,
    Done,
    Rehearsal,
    findings,
    said,
    taken,
    translated,
    translated_json,
)
from vfiotool.lab.twin_facts import read_twin_host
from vfiotool.lab.twin_plan import plan_twin
from vfiotool.lab.twin_run import Twin
from vfiotool.models.edu import EduModel
from vfiotool.models.nvme import NvmeModel

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
CARD = "0000:2b:00.0"


def kinds(*done: Done) -> list[tuple[str, str | None]]:
    return [(one.kind, one.device) for one in findings(done)]


def planned(name: str, code: int | None, found: Any = None, text: str = "") -> Done:
    return Done(ACTS[0], name, code, 1.0, found, text)


def test_addresses_are_translated_both_ways_and_nothing_else_is() -> None:
    there = {CARD: "0000:02:00.0", "0000:02:00.0": "0000:03:00.0"}
    text = f'match = {{ address = "{CARD}" }} # 2b:00.0, mac 52:54:00:2b:00:01, 0000:02:00.0'
    assert translated(text, there) == (
        'match = { address = "0000:02:00.0" } # 02:00.0, mac 52:54:00:2b:00:01, 0000:03:00.0'
    )
    back = {new: old for old, new in there.items()}
    assert translated(translated(text, there), back) == text
    assert translated_json({"a": [CARD, 1, None]}, there) == {"a": ["0000:02:00.0", 1, None]}


def test_a_refusal_is_found_reason_by_reason_and_once() -> None:
    row = {"kind": "mounted", "device": CARD, "detail": "sda is mounted on /", "evidence": "x"}
    plan = planned("plan", 4, {"steps": [], "refusals": [row]})
    (found,) = findings([plan, planned("apply", 4, {"error": {"message": "refused"}})])
    assert (found.kind, found.device) == ("refused", CARD)
    assert "sda is mounted on /" in found.detail and found.next == f"vfiotool why {CARD}"
    assert said(plan) == "0 steps, refused for 1 reasons"


def test_a_serial_number_that_is_lost_a_second_start_that_fails_and_a_reset_that_hangs() -> None:
    gone = {"error": {"message": "no device matches serial S", "hint": "", "device": None}}
    assert kinds(planned("status after a reboot", 3, gone)) == [("serial-lost", None)]
    assert kinds(planned("start twice", 0, {"kept": [CARD]})) == [("second-start", CARD)]
    assert kinds(planned("start twice", 5, {"error": "EIO", "device": CARD})) == [
        ("second-start", CARD)
    ]
    hangs = planned("start twice", None)
    log = planned("kernel log", 0, None, f"vfio-pci {CARD}: not ready 1023ms after FLR; waiting\n")
    (found,) = findings([hangs, log])
    assert (found.kind, found.device) == ("reset-hangs", CARD)
    assert found.evidence.startswith("vfio-pci") and said(hangs) == "did not end in 1 s"
    assert kinds(hangs) == [("reset-hangs", None)], "the kernel need not say which"


def test_what_else_goes_wrong() -> None:
    blocker = {
        "severity": "blocker", "device": CARD, "detail": "no", "evidence": "", "next": None,
        "remedy": "do",
    }  # fmt: skip
    assert kinds(planned("vm check", 1, {"findings": [blocker]})) == [("not-ready", CARD)]
    assert kinds(planned("status", 1, {"steps": []})) == [("not-in-sync", None)]
    assert kinds(planned("undo", 6, {"error": {"message": "stuck", "device": CARD}})) == [
        ("stuck", CARD)
    ]
    assert kinds(planned("plan", 3, {"error": {"message": "no device"}})) == [("no-match", None)]
    assert kinds(planned("plan", 2, None, "bad\n")) == [("failed", None)]
    assert kinds(planned("qemu", 1, None, "vfio: no\n")) == [("failed", None)]
    changed = Done(ACTS[1], "compare", 1, 0, {CARD: [["nvme"], ["vfio-pci"]]})
    assert kinds(changed) == [("not-restored", CARD)]
    assert said(changed) == "1 functions are not as before"


def test_what_is_no_fault_of_the_host_is_not_found() -> None:
    for one in (
        planned("plan", 0, {"steps": [1]}),
        planned("status after a reboot", 0, {}),
        planned("vm check", 0, {"findings": []}),
        planned("qemu", 127, None, "not found"),
        planned("qemu", None),
        Done(ACTS[1], "apply, killed", -9),
        # In the last act a fault is made on purpose: only its end counts.
        Done(ACTS[2], "undo", 6, 5.0, {"error": {"message": "stuck", "device": CARD}}),
        Done(ACTS[2], "compare", 0, 0, {}),
    ):
        assert findings([one]) == (), one
    assert said(Done(ACTS[1], "apply, killed", -9)) == "killed"
    rows = [{"title": "apply p", "result": "rolled-back"}]
    assert said(planned("recover", 0, {"recovered": rows})) == "apply p: rolled-back"


def test_what_a_policy_takes() -> None:
    steps = [
        {"verb": "load-module", "target": "vfio-pci"},
        {"verb": "bind-driver", "target": CARD},
    ]
    assert taken({"steps": steps}) == [CARD] and taken(None) == []


@pytest.mark.parametrize("fault", ["none", "nothing"])
@pytest.mark.parametrize("kind", [EduModel, NvmeModel])
def test_what_stands_in_for_a_vm_sees_a_device_that_is_not_reset(
    kind: Any, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = kind()
    model.faults.reset = fault
    with serving(model) as server:
        marks: vm.Marks = {}
        vm.start([server.name], lambda one: vm.mark(one, marks))
        assert list(marks) == [server.name]
        # As the kernel does between two users.
        model.reset()
        seen: list[bool] = []
        vm.start([server.name], lambda one: seen.append(vm.has_mark(one, marks[one.name])))
        assert seen == [fault == "nothing"]
        assert vm.main([server.name]) == 0
    assert json.loads(capsys.readouterr().out) == {"kept": [], "marked": []}


def test_a_device_that_cannot_be_opened_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm.main(["vfio-user:/nowhere.sock"]) == 5
    assert "error" in json.loads(capsys.readouterr().out)


def test_a_command_that_does_not_end_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    done = inside.played("slow", inside.program("sleep", "600"), 0.2)
    assert done["exit_code"] is None
    # Here it is a child of ours that ends; in a twin it may wait in the kernel.
    # Popen may have done so already.
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(done["pid"], 0)[0] == done["pid"]
    quick = inside.program("sh", "-c", "echo '{}'; exit 3")
    assert inside.played("quick", quick, 60)["exit_code"] == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["slow", "quick"] and rows[1]["json"] == {}


def test_a_policy_with_faults_is_refused_before_a_twin_boots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearse_run, "rehearse", lambda *_, **__: pytest.fail("it boots"))
    policy = tmp_path / "policy.toml"
    policy.write_text("version = 1\n[[device]]\nmatch = { address = 5 }\n")
    host = Path(__file__).resolve().parents[2] / "fixtures/hosts/intel-workstation"
    assert main(["lab", "rehearse", str(policy), "--host", str(host)]) == 2
    told = capsys.readouterr().err
    assert f"{policy}:3" in told and "boots" not in told


def test_commands_of_the_tool_are_forks_that_answer_as_the_tool_does() -> None:
    """In a process of its own: a fork of pytest's would take its state along."""
    code = (
        "from vfiotool.lab.inside import rehearsal as inside\n"
        f"root = ['--root', {str(HOSTS / 'storage-in-use')!r}]\n"
        "inside.played('groups', inside.tool(*root, 'groups'), 60)\n"
        "inside.played('none', inside.tool('nonsense'), 60)\n"
        "inside.Part({'policy': 'p'}).tool('--debug', 'status', '/nowhere.toml', name='status')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    groups, none, status = [json.loads(line) for line in done.stdout.splitlines()]
    assert groups["exit_code"] == 0 and groups["json"]["groups"]
    assert none["exit_code"] == 2 and none["json"]["error"]["kind"] == "usage"
    assert status["exit_code"] == 3 and "errors.NotFound" in status["text"]


def test_a_fault_is_of_a_device_that_a_model_plays(tmp_path: Path) -> None:
    snapshot = str(HOSTS / "storage-in-use")
    host = read_twin_host(snapshot)
    with pytest.raises(NotFound, match="not played by a model"):
        rehearse_run.rehearse(
            host, plan_twin(host), "version = 1\n", "6.12", faults={"0000:09:00.0": "gone"}
        )
    policy = tmp_path / "p.toml"
    policy.write_text("version = 1\n")
    assert main(["lab", "rehearse", str(policy), "--host", snapshot, "--fault", "1:2"]) == 2
    assert main(["lab", "rehearse", str(tmp_path / "none"), "--host", snapshot]) == 2


def test_the_page_and_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text("version = 1\n")
    done = (
        planned("plan", 0, {"steps": [1]}),
        planned("start twice", 0, {"kept": [CARD]}),
        Done(ACTS[2], "apply", 0),
        Done(ACTS[2], "compare", 0, 0, {}),
    )
    asked: dict[str, Any] = {}

    def played(*words: Any, **more: Any) -> Rehearsal:
        asked.update(more)
        return Rehearsal(done, CARD, (f"{CARD}: differs",), findings(done))

    monkeypatch.setattr(rehearse_run, "rehearse", played)
    monkeypatch.setattr(twin_run, "refuse_unready", lambda *_: None)
    words = ["lab", "rehearse", str(policy), "--host", str(HOSTS / "amd-desktop")]
    assert main([*words, "--fault", "05:00.0=reset-nothing", "--no-qemu"]) == 1
    asked.pop("report")(done[0])
    assert asked == {"faults": {"0000:05:00.0": "reset-nothing"}, "qemu": False}
    told = capsys.readouterr().out
    assert "As planned" in told and f"A device that does not let go: {CARD}" in told
    assert "On the host this would go wrong" in told and "second-start" in told
    assert f"{CARD}: differs" in told
    assert main([*words, "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["kind"] == "second-start"
    # Without --host this machine is captured first; nothing of it is changed.
    done = ()
    assert main(["lab", "rehearse", str(policy)]) == 0
    assert "taken back as it was" in capsys.readouterr().out
    assert lab_rehearse._SNAPSHOT_LIMIT_S > 0


def no_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse_run, "rehearse", lambda *_, **__: pytest.fail("it boots"))
    monkeypatch.setattr(twin_run, "running_twin", lambda *_, **__: pytest.fail("it boots"))


def rehearse(policy: Path, rules: str, host: str, *more: str) -> int:
    policy.write_text(f"version = 1\n{rules}")
    return main(["lab", "rehearse", str(policy), "--host", str(HOSTS / host), *more])


@pytest.mark.parametrize(
    ("faults", "code", "said"),
    [
        (("00:1f.2=gone",), 3, "0000:00:1f.2 is not played by a model in the twin"),
        (("nonsense=gone",), 3, "not played by a model"),
        (("05:00.0=gone", "0000:05:00.0=mute"), 2, "0000:05:00.0 has two of them, gone and mute"),
        (("05:00.0=hangs",), 2, "is not DEVICE=FAULT"),
    ],
)
def test_a_fault_that_cannot_be_is_refused_before_anything_boots(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faults: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    no_boot(monkeypatch)
    words = [word for fault in faults for word in ("--fault", fault)]
    assert rehearse(tmp_path / "p.toml", "", "amd-desktop", *words) == code
    told = capsys.readouterr().err
    assert said in told and "boots" not in told


def test_a_kernel_that_cannot_be_had_is_told_before_anything_boots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_boot(monkeypatch)
    kernel = ("--kernel", "/no/such/kernel")
    assert rehearse(tmp_path / "p.toml", "", "amd-desktop", *kernel) == 3
    assert main(["lab", "twin", *kernel, str(HOSTS / "amd-desktop")]) == 3
    told = capsys.readouterr().err
    assert "no kernel named /no/such/kernel" in told
    assert "boots" not in told and "twin: host-bridge" not in told


def test_an_option_behind_the_snapshot_is_not_taken_for_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_boot(monkeypatch)
    assert main(["lab", "twin", str(HOSTS / "amd-desktop"), "--plan"]) == 2
    assert "--plan" in capsys.readouterr().err


def test_a_policy_that_matches_nothing_on_the_host_boots_no_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_boot(monkeypatch)
    rules = '[[device]]\nmatch = { address = "0000:77:00.0" }\n'
    assert rehearse(tmp_path / "p.toml", rules, "amd-desktop") == 1
    told = capsys.readouterr()
    assert "no twin has to boot" in told.err
    assert "the policy: no-match:" in told.out and "0000:77:00.0" in told.out


def test_a_host_without_an_iommu_gives_its_page_without_a_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_boot(monkeypatch)
    address = read_twin_host(str(HOSTS / "no-iommu")).functions[-1].address
    rules = f'[[device]]\nmatch = {{ address = "{address}" }}\n'
    assert rehearse(tmp_path / "p.toml", rules, "no-iommu") == 1
    told = capsys.readouterr()
    assert f"{address} is in no IOMMU group" in told.out and "doctor" in told.out
    assert "no twin has to boot" in told.err


def test_a_policy_for_what_the_twin_cannot_have_boots_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the twin it would match nothing, which says nothing of the host."""
    no_boot(monkeypatch)
    host = read_twin_host(str(HOSTS / "vfs-enabled"))
    plan = plan_twin(host)
    lost = next(one.address for one in host.functions if one.address not in plan.addresses)
    monkeypatch.setattr(lab_rehearse, "planned", lambda _: (host, plan))
    rules = f'[[device]]\nmatch = {{ address = "{lost}" }}\n'
    assert rehearse(tmp_path / "p.toml", rules, "vfs-enabled") == 3
    told = capsys.readouterr().err
    assert f"the twin cannot have {lost}" in told and "boots" not in told


def test_refusals_on_the_host_are_told_before_the_twin_boots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(twin_run, "refuse_unready", lambda *_: None)
    monkeypatch.setattr(rehearse_run, "rehearse", lambda *_, **__: Rehearsal(()))
    rules = '[[device]]\nmatch = { address = "0000:05:00.0" }\ngroup = "whole"\n'
    assert rehearse(tmp_path / "p.toml", rules, "amd-desktop") == 0
    told = capsys.readouterr().err
    assert "on that host apply refuses: 0000:02:00.1" in told
    assert told.index("refuses") < told.index("boots")


class SlowGuest:
    """A guest whose one command answers with `rows`, and which waits for a processor meanwhile."""

    def __init__(self, rows: list[dict[str, Any]], waits_s: float) -> None:
        self.rows, self.waits_s, self._waited_s = rows, waits_s, 0.0

    def waited_s(self) -> float:
        return self._waited_s

    def begin(self, command: list[str]) -> int:
        assert command[-1] == inside.__name__
        return 7

    def tell(
        self, number: int, data: bytes, sink: Any, over: Callable[[], bool], timeout_s: float
    ) -> int | None:
        assert number == 7 and data.endswith(b"\n") and not over()
        for row in [*self.rows, {"end": json.loads(data)["part"]}]:
            self._waited_s += self.waits_s
            sink(Kind.OUTPUT, json.dumps(row).encode() + b"\n")
        return None if over() else 1


def played_by(guest: SlowGuest, rows: int) -> list[Done]:
    twin = Twin(guest, {}, {})  # type: ignore[arg-type]
    told: list[Done] = []
    plan = plan_twin(read_twin_host(str(HOSTS / "storage-in-use")))
    play = rehearse_run._Play(twin, plan, False, told.append)
    play.actor = rehearse_run._Actor(guest)  # type: ignore[arg-type]
    play.part("as-planned", ACTS[0])
    assert len(told) == rows
    return told


def test_what_a_busy_machine_keeps_from_its_end_is_no_finding() -> None:
    stuck = {"name": "undo", "exit_code": None, "seconds": inside.COMMAND_LIMIT_S + 1}
    with pytest.raises(GuestTimeout, match=r"undo did not end in 121 s, of which .* 90 s"):
        played_by(SlowGuest([stuck], 90.0), 1)
    # The device's own fault: the twin had its processor.
    assert findings(played_by(SlowGuest([stuck], 1.0), 1))[0].kind == "stuck"
    # Slow, but at its end.
    done = {"name": "undo", "exit_code": 0, "seconds": 119.0}
    assert not findings(played_by(SlowGuest([done], 100.0), 1))


def test_parts_are_played_by_one_process_that_says_when_each_is_over(tmp_path: Path) -> None:
    lines = "".join(
        json.dumps({"part": part, "policy": "/nowhere"}) + "\n" for part in ("as-planned", "nope")
    )
    code = (
        "from pathlib import Path\n"
        "from vfiotool.lab.inside import rehearsal as inside\n"
        f"inside.BEFORE = Path({str(tmp_path / 'before')!r})\n"
        "inside.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, check=False, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("name") or row["end"] for row in rows] == ["plan", "as-planned"]
    # A part that there is not ends it, which the host's side tells.
    assert done.returncode == 1 and "KeyError" in done.stderr
    with pytest.raises(KernelError, match="broke off"):
        guest = SlowGuest([], 0.0)
        guest.tell = lambda *_: 1  # type: ignore[method-assign, assignment]
        rehearse_run._Actor(guest).play("held", {}, lambda _: None)  # type: ignore[arg-type]


def test_a_program_in_python_is_a_fork_too_in_a_session_of_its_own() -> None:
    code = (
        "import os, sys, tempfile\n"
        "from vfiotool.lab.inside.forked import ForkedCommand\n"
        "with tempfile.TemporaryFile() as out:\n"
        "    child = ForkedCommand(['vfio-user:/nowhere'], out, out, module=sys.argv[1])\n"
        "    assert os.getsid(0) != child.pid and child.wait(60) == 5\n"
        "    out.seek(0)\n"
        "    print(out.read().decode())\n"
    )
    words = [sys.executable, "-c", code, inside.VM]
    done = subprocess.run(words, capture_output=True, check=True)
    assert "no such socket" in json.loads(done.stdout)["error"]
