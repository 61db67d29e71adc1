"""The published schemas against what the commands print, of every fixture and of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.cli.reading import reading_commands, run
from tests.oracles.printed import SCHEMA_OF, WITHOUT, command_of
from tests.oracles.schemas import FOLDER, NAMES, faults
from vfiotool.cli.commands import COMMANDS
from vfiotool.cli.look.watch import event_as_json
from vfiotool.cli.main import main
from vfiotool.cli.program import load
from vfiotool.errors import VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.monitor import Event
from vfiotool.snapshot.load import open_root

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
FIXTURES = sorted(path.name for path in HOSTS.iterdir())


def check(name: str, text: str) -> None:
    payload: dict[str, Any] = json.loads(text)
    assert next(iter(payload)) == "format_version"
    schema = "error" if "error" in payload else name
    assert not faults(schema, payload), f"{name}: {faults(schema, payload)[:5]}"


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_a_valid_schema_and_has_a_title(name: str) -> None:
    schema = json.loads((FOLDER / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    assert schema["title"] and schema["$id"] == f"{name}.json"


@pytest.mark.parametrize("fixture", FIXTURES)
def test_every_reading_command_prints_what_its_schema_describes(fixture: str) -> None:
    root = str(HOSTS / fixture)
    for name, command in reading_commands(open_root(root)).items():
        check(name.partition("/")[0], run(command, root)[1])


def test_on_this_machine_too() -> None:
    for name, command in reading_commands(Host.local()).items():
        check(name.partition("/")[0], run(command)[1])


def test_snapshot_and_its_comparison(tmp_path: Path) -> None:
    root, file = str(HOSTS / "vfs-enabled"), str(tmp_path / "a.gz")
    check("snapshot", run(["snapshot", file], root)[1])
    text = run(["snapshot", "diff", str(HOSTS / "mdev-parents"), file])[1]
    assert len(json.loads(text)["changes"]) > 50
    check("snapshot-diff", text)


def test_a_line_of_watch() -> None:
    for event in (
        Event("bind", "pci", "0000:01:00.0", driver="vfio-pci", time_s=1.25),
        Event("vf-add", "pci", "0000:01:00.1", pf="0000:01:00.0", vf_index=0, pci_id="8086:10ca"),
        Event("lost", None, None),
    ):
        check("watch", json.dumps(event_as_json(event)))


def test_lab_lists() -> None:
    check("lab-machines", run(["lab", "machines"])[1])
    check("lab-kernels", run(["lab", "kernels"])[1])


@pytest.mark.parametrize(
    ("schema", "command"),
    [
        ("vm-check", ["vm", "check", "0000:02:01.0"]),
        ("vm-arguments", ["vm", "qemu", "0000:02:01.0"]),
        ("vm-arguments", ["vm", "cloud-hypervisor", "0000:02:01.0"]),
        ("vm-libvirt", ["vm", "libvirt", "0000:02:01.0"]),
        ("plan", ["bind", "0000:02:02.0", "--dry-run"]),
        ("export", ["export"]),
    ],
)
def test_commands_that_only_plan(schema: str, command: list[str]) -> None:
    code, text = run(command, str(HOSTS / "shared-group"))
    assert code in (0, 1), text
    check(schema, text)


def kinds(base: type[VfiotoolError]) -> set[str]:
    return {base.kind}.union(*(kinds(branch) for branch in base.__subclasses__()))


def test_every_kind_of_error_is_described() -> None:
    import vfiotool.lab.guest  # noqa: F401  (defines kinds of its own)

    described = json.loads((FOLDER / "error.json").read_text())
    listed = described["properties"]["error"]["properties"]["kind"]["enum"]
    assert kinds(VfiotoolError) <= set(listed)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "no-such-thing"], 2),
        (["show", "ff:1f.7"], 3),
        (["show", "id:1b36:000c"], 3),
        (["groups", "999"], 3),
        (["groups", "--no-such-option"], 2),
    ],
)
def test_errors_have_the_published_shape_and_code(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", str(HOSTS / "shared-group"), "--json", *arguments]) == code
    payload = json.loads(capsys.readouterr().out)
    assert not faults("error", payload)


def test_an_undescribed_field_and_a_missing_one_are_found() -> None:
    good = json.loads(run(["groups"], str(HOSTS / "shared-group"))[1])
    good["groups"][0]["devices"][0]["surprise"] = 1
    assert faults("groups", good) and not faults("groups", good, strict=False)
    del good["groups"][0]["devices"][0]["role"]
    assert faults("groups", good, strict=False)


def leaves(command: Any, name: str) -> set[str]:
    """All commands by their full names."""
    if not hasattr(command, "commands"):
        return {name}
    return {
        leaf
        for below, inner in command.commands.items()
        for leaf in leaves(inner, f"{name} {below}")
    }


def test_every_command_has_a_schema_and_every_schema_a_command() -> None:
    commands = {leaf for name in COMMANDS for leaf in leaves(load(name), name)}
    # `snapshot diff A B` is told from `snapshot FILE` by its arguments.
    assert commands | {"snapshot diff"} == SCHEMA_OF.keys() | WITHOUT
    assert {*SCHEMA_OF.values(), "common", "error"} == set(NAMES)


def test_what_any_command_prints_during_a_test_is_held_against_its_schema(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vfiotool.usage import verdict

    monkeypatch.setattr(verdict.Verdict, "as_json", lambda _: {"passable": "perhaps"})
    with pytest.raises(pytest.fail.Exception, match="what `why` printed is not as published"):
        run(["why", "02:01.0"], str(HOSTS / "shared-group"))


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--json", "--root", "why", "show", "01:00.0"], "show"),
        (["device", "state", "save", "x", "--output", "f"], "device state save"),
        (["snapshot", "diff", "a", "b"], "snapshot diff"),
        (["snapshot", "file"], "snapshot"),
        (["--debug", "vf", "set", "01:00.0", "2"], "vf set"),
    ],
)
def test_the_command_is_known_by_its_words(arguments: list[str], command: str) -> None:
    assert command_of(arguments) == command
