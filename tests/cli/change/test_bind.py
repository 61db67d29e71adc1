"""The changing commands on snapshots: shapes, exit codes, and that they change nothing there."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.change.changing import furnished
from vfiotool.cli.main import main
from vfiotool.errors import UsageError
from vfiotool.policy.export import export_policy
from vfiotool.policy.parse import parse_policy

ROOT = Path(__file__).resolve().parents[3]
HOSTS = ROOT / "fixtures/hosts"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def run(capsys: pytest.CaptureFixture[str], host: str, *arguments: str) -> tuple[int, Any, str]:
    code = main(["--root", str(HOSTS / host), "--json", *arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["bind", "02:02.0"],
        ["release", "02:01.0"],
        ["undo"],
        ["recover"],
        ["history"],
        ["confirm"],
        ["apply", str(ROOT / "fixtures/plans/whole-group/policy.toml")],
        ["apply", str(ROOT / "fixtures/plans/whole-group/policy.toml"), "--confirm-within", "5"],
    ],
)
def test_another_hosts_root_is_never_changed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, payload, _ = run(capsys, "shared-group", *arguments)
    assert code == 2
    assert payload["error"]["kind"] == "usage"
    assert "not the running host" in payload["error"]["message"]


def test_dry_runs_have_the_contracts_shape(capsys: pytest.CaptureFixture[str]) -> None:
    code, payload, _ = run(capsys, "shared-group", "bind", "02:02.0", "--dry-run")
    assert code == 0
    assert list(payload) == ["format_version", "steps", "in_sync", "notes"]
    step = payload["steps"][-1]
    assert list(step) == ["number", "verb", "target", "from", "to", "undo"]
    assert (step["target"], step["from"], step["to"]) == ("0000:02:02.0", None, "vfio-pci")
    assert payload["in_sync"] is False
    code, payload, _ = run(capsys, "shared-group", "bind", "02:01.0", "--dry-run")
    assert (code, payload["steps"], payload["in_sync"]) == (0, [], True)


def test_a_dry_run_refuses_what_the_command_would_refuse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, payload, _ = run(capsys, "storage-in-use", "bind", "01:00.0", "--dry-run")
    assert code == 4
    assert payload["error"]["device"] == "0000:01:00.0"
    assert "--allow" in payload["error"]["hint"]


def test_vfs_and_mdevs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, payload, _ = run(capsys, "vfs-enabled", "vf", "list", "02:00.0")
    assert code == 0
    assert payload["vfs"][0] == {
        "pf": "0000:02:00.0",
        "index": 0,
        "address": "0000:02:10.0",
        "driver": "igbvf",
        "iommu_group": 10,
        "mac": None,
        "vlan": None,
        "trust": None,
    }
    assert payload["pfs"] == [
        {
            "address": "0000:02:00.0",
            "driver": "igb",
            "num_vfs": 3,
            "total_vfs": 7,
            "autoprobe": True,
        }
    ]
    code, payload, _ = run(capsys, "mdev-parents", "mdev", "list")
    assert payload["mdevs"][0]["uuid"] == UUID
    code, payload, _ = run(capsys, "mdev-parents", "mdev", "types")
    keys = ["parent", "type", "name", "device_api", "available_instances", "description"]
    assert all(list(entry) == keys for entry in payload["types"])


@pytest.mark.parametrize(
    ("host", "arguments", "expected"),
    [
        ("shared-group", ["bind", "00:1d.7", "--dry-run"], 3),
        ("shared-group", ["bind", "nonsense", "--dry-run"], 2),
        ("shared-group", ["bind", "02:02.0", "--driver", "a/b", "--dry-run"], 2),
        ("shared-group", ["bind", "02:02.0", "--timeout", "0", "--dry-run"], 2),
        ("shared-group", ["bind", "02:02.0", "--timeout", "nan", "--dry-run"], 2),
        ("shared-group", ["bind", "02:02.0", "--allow", "x", "--dry-run"], 2),
        ("shared-group", ["bind", "01:00.0", "--dry-run"], 4),
        ("shared-group", ["vf", "set", "02:02.0", "1", "--dry-run"], 8),
        ("shared-group", ["vf", "list", "02:02.0"], 8),
        ("no-iommu", ["bind", "00:01.0", "--dry-run"], 8),
        ("vfs-enabled", ["vf", "set", "02:00.0", "8", "--dry-run"], 2),
        ("vfs-enabled", ["bind", "02:00.0", "--dry-run"], 4),
        ("mdev-parents", ["mdev", "create", "mtty", "nope", "--dry-run"], 3),
        ("mdev-parents", ["mdev", "create", "nope", "mtty-1", "--dry-run"], 3),
        ("mdev-parents", ["mdev", "create", "mtty", "mtty-1", "--uuid", "x", "--dry-run"], 2),
        ("mdev-parents", ["mdev", "create", "mtty", "mtty-1", "--uuid", UUID, "--dry-run"], 2),
        ("mdev-parents", ["mdev", "remove", UUID[:-1] + "9", "--dry-run"], 3),
    ],
)
def test_exit_codes(
    host: str, arguments: list[str], expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code, payload, _ = run(capsys, host, *arguments)
    assert code == expected, payload
    assert payload["error"]["message"]


def test_removing_a_pfs_vfs_lists_what_they_lose(capsys: pytest.CaptureFixture[str]) -> None:
    code, payload, _ = run(capsys, "vfs-enabled", "vf", "set", "02:00.0", "1", "--dry-run")
    assert code == 0
    assert [step["target"] for step in payload["steps"]] == [
        "0000:02:10.0",
        "0000:02:10.2",
        "0000:02:10.4",
        "0000:02:00.0",
    ]


def test_plan_status_and_export_work_on_a_snapshot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy = str(ROOT / "fixtures/plans/whole-group/policy.toml")
    code, payload, _ = run(capsys, "shared-group", "plan", policy)
    assert (code, payload["in_sync"]) == (0, False)
    assert run(capsys, "shared-group", "status", policy)[0] == 1
    for host in ("shared-group", "vfs-enabled", "mdev-parents"):
        exported = tmp_path / f"{host}.toml"
        exported.write_text(run(capsys, host, "export")[1]["policy"])
        assert run(capsys, host, "status", str(exported))[0] == 0


def test_plan_tells_what_apply_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    policy = str(ROOT / "fixtures/plans/nvme/policy.toml")
    code, payload, notes = run(capsys, "storage-in-use", "plan", policy)
    assert (code, payload["in_sync"]) == (4, False)
    assert "apply would refuse: 0000:01:00.0" in notes
    (refusal,) = payload["refusals"]
    assert (refusal["kind"], refusal["device"]) == ("mounted", "0000:01:00.0")
    assert "/mnt/a" in refusal["detail"]
    assert "mountinfo" in refusal["evidence"]


def test_a_bad_policy_is_one_error_with_every_fault(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy = tmp_path / "bad.toml"
    policy.write_text('version = 1\n[[device]]\nmatch = { addres = "x" }\ndriver = 3\n')
    code, payload, _ = run(capsys, "shared-group", "plan", str(policy))
    assert code == 2
    assert payload["error"]["kind"] == "policy"
    assert "bad.toml:3:11: unknown key 'addres'" in payload["error"]["message"]
    assert "bad.toml:4:1: driver must be a string" in payload["error"]["message"]


def test_a_saved_plan_is_recognised_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy = str(ROOT / "fixtures/plans/whole-group/policy.toml")
    saved = tmp_path / "group.plan"
    assert run(capsys, "shared-group", "plan", policy, "--out", str(saved))[0] == 0
    assert run(capsys, "shared-group", "status", str(saved))[0] == 1
    assert run(capsys, "shared-group", "apply", str(saved), "--dry-run")[0] == 0
    assert run(capsys, "vfs-enabled", "apply", str(saved), "--dry-run")[0] in (3, 4)
    assert run(capsys, "shared-group", "plan", policy, "--out", str(tmp_path / "x"))[0] == 2


def test_a_plan_that_cannot_be_written_is_an_error_without_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = str(ROOT / "fixtures/plans/whole-group/policy.toml")
    code, payload, _ = run(capsys, "shared-group", "plan", policy, "--out", "/nowhere/x.plan")
    assert code == 5
    assert payload["error"]["errno"] == "ENOENT"
    assert payload["error"]["message"].startswith("write /nowhere/x.plan")


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"kind": "vfiotool-plan", "policy": {"text": "version = 1", "name": "x"}, '
     '"steps": [{"verb": "make-coffee"}]}', "[" * 100_000],
)  # fmt: skip
def test_a_saved_plan_of_nonsense_is_bad_usage(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.plan"
    path.write_text(text)
    code, payload, _ = run(capsys, "shared-group", "status", str(path))
    assert code == 2
    assert payload["error"]["kind"] in ("usage", "policy")
    os.mkfifo(tmp_path / "pipe.plan")
    code, payload, _ = run(capsys, "shared-group", "status", str(tmp_path / "pipe.plan"))
    assert (code, payload["error"]["kind"]) == (2, "usage")


def test_names_of_a_hostile_host_cannot_write_rules_into_an_export() -> None:
    """A snapshot may come from anybody; its export may be applied by root."""
    evil = 'x"\nuuid = "a"\n[[device]]\nmatch = { address = "0000:00:00.0" }\n#'
    kernel = furnished()
    kernel.add_parent(evil, 4, {"t": 1})
    kernel._create_mdev(f"/sys/class/mdev_bus/{evil}/mdev_supported_types/t/create", UUID)
    with pytest.raises(UsageError):
        parse_policy(export_policy(kernel.host()))
    assert tomllib.loads(export_policy(kernel.host()))["mdev"][0]["parent"] == evil


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["bind", "02:02.0", "--dry-run", "--timeout"],
        ["recover", "--timeout"],
        ["undo", "--timeout"],
        ["apply", str(ROOT / "fixtures/plans/whole-group/policy.toml"), "--confirm-within"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_no_time_to_wait_is_bad_usage(
    arguments: list[str], seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, payload, _ = run(capsys, "shared-group", *arguments, seconds)
    assert code == 2
    assert "is not a valid time" in payload["error"]["message"]
