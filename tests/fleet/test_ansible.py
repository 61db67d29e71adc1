"""The Ansible collection, run by a real ansible-core on this machine against recorded hosts and a
stand-in for the program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.oracles import ansible

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / "fixtures" / "hosts"
PLAYBOOK = ansible.playbook()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PLAYBOOK is None,
        reason="there is no ansible-playbook here: make proofs fetches one, or ANSIBLE_PLAYBOOK",
    ),
]

# Stands in for the program where something is changed: three hosts, each with its own state.
STAND_IN = """\
#!{python}
import json, pathlib, sys
state, words = pathlib.Path(__file__).parent / "state", sys.argv[1:]
broken = (pathlib.Path(__file__).parent / "broken").exists()
words = [word for word in words if word != "--json"]
step = {{"number": 1, "verb": "bind", "target": "0000:01:00.0", "from": "igb", "to": "vfio-pci",
        "undo": "bind igb"}}
steps = [] if state.exists() else [step]
with (pathlib.Path(__file__).parent / "calls").open("a") as calls:
    calls.write(" ".join(words) + "\\n")
answer, code = {{"format_version": "1.0"}}, 0
if words[0] == "plan":
    answer.update(steps=steps, in_sync=not steps, notes=[], refusals=[])
elif words[0] == "apply" and broken:
    code = 5
    answer["error"] = {{"kind": "kernel", "message": "the kernel refused",
                       "hint": "dmesg", "device": None, "errno": "EBUSY"}}
elif words[0] == "apply":
    state.touch()
    answer.update(steps=steps, in_sync=True, notes=[], transaction=1, absent=[])
print(json.dumps(answer))
sys.exit(code)
"""


@pytest.fixture
def collections(tmp_path: Path) -> Path:
    place = tmp_path / "collections" / "ansible_collections" / "vfiotool"
    place.mkdir(parents=True)
    (place / "host").symlink_to(ROOT / "ansible")
    return tmp_path / "collections"


def play(
    tmp_path: Path,
    collections: Path,
    tasks: list[Any],
    *options: str,
    hosts: int = 1,
    inventory: Sequence[str] = (),
) -> tuple[int, dict[str, Any]]:
    """Run a play on the hosts of an inventory, or on so many that are all this machine; its exit
    code, what each host registered as `result`, and all that it printed as `text`."""
    names = [f"host{number}" for number in range(hosts)]
    lines = inventory or [
        f"{name} ansible_connection=local place={tmp_path}/{name}" for name in names
    ]
    (tmp_path / "hosts").write_text("\n".join(lines) + "\n")
    book = [{"hosts": "all", "gather_facts": False, "tasks": tasks}]
    (tmp_path / "play.yml").write_text(json.dumps(book))
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(collections),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"),
        "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote"),
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }
    environment["ANSIBLE_STDOUT_CALLBACK"] = "default"
    environment["ANSIBLE_CALLBACK_RESULT_FORMAT"] = "json"
    out = tmp_path / "results"
    out.mkdir(exist_ok=True)
    keep = {
        "ansible.builtin.copy": {
            "content": "{{ result | to_json }}",
            "dest": f"{out}/{{{{ inventory_hostname }}}}",
        },
        "check_mode": False,
        "delegate_to": "localhost",
    }
    book[0]["tasks"] = [*tasks, keep]
    (tmp_path / "play.yml").write_text(json.dumps(book))
    done = subprocess.run(
        [str(PLAYBOOK), "-i", str(tmp_path / "hosts"), str(tmp_path / "play.yml"), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    assert found or done.returncode, done.stdout + done.stderr
    return done.returncode, {**found, "text": done.stdout + done.stderr}


def ours(tmp_path: Path) -> str:
    program = tmp_path / "vfiotool"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vfiotool "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("module", ["vfiotool_policy", "vfiotool_facts", "vfiotool_check"])
def test_the_documentation_of_a_module_has_what_all_modules_take(
    module: str, tmp_path: Path, collections: Path
) -> None:
    assert PLAYBOOK is not None
    done = subprocess.run(
        [str(Path(PLAYBOOK).with_name("ansible-doc")), "--json", f"vfiotool.host.{module}"],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(collections), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    documented = json.loads(done.stdout)[f"vfiotool.host.{module}"]["doc"]["options"]
    assert documented["executable"]["default"] == "vfiotool" and "root" in documented
    text = (ROOT / f"ansible/plugins/modules/{module}.py").read_text()
    taken = re.findall(r"^ +(\w+)=\{\"type\"", text, re.MULTILINE)
    assert set(taken) <= documented.keys()


def test_facts_and_the_gate_of_a_recorded_host(tmp_path: Path, collections: Path) -> None:
    common = {"executable": ours(tmp_path), "root": str(HOSTS / "shared-group")}
    code, found = play(
        tmp_path,
        collections,
        [{"vfiotool.host.vfiotool_facts": common, "register": "result"}],
        "--check",
    )
    assert code == 0, found["text"]
    facts = found["host0"]["ansible_facts"]["vfiotool"]
    assert {device["address"] for device in facts["devices"]} >= {"0000:02:01.0"}
    assert facts["groups"] and facts["findings"]
    gate = {**common, "devices": ["02:01.0"], "memory": "16G", "vcpus": 2}
    code, found = play(
        tmp_path, collections, [{"vfiotool.host.vfiotool_check": gate, "register": "result"}]
    )
    assert code == 0 and found["host0"]["findings"], found["text"]
    shut = {**common, "devices": ["00:1e.0"]}
    code, found = play(
        tmp_path,
        collections,
        [{"vfiotool.host.vfiotool_check": shut, "register": "result", "ignore_errors": True}],
    )
    assert found["host0"]["failed"] and "not on a VFIO driver" in found["host0"]["msg"]
    # A name is a name: as an option `-h` printed help in place of JSON.
    dashed = {**common, "devices": ["-h"]}
    code, found = play(
        tmp_path,
        collections,
        [{"vfiotool.host.vfiotool_check": dashed, "register": "result", "ignore_errors": True}],
    )
    assert found["host0"]["failed"] and "not a device selector" in found["host0"]["msg"]


def test_check_mode_shows_the_steps_of_a_policy_and_changes_nothing(
    tmp_path: Path, collections: Path
) -> None:
    policy = 'version = 1\n[[device]]\nmatch = { address = "0000:02:02.0" }\ndriver = "vfio-pci"\n'
    options = {
        "executable": ours(tmp_path),
        "root": str(HOSTS / "shared-group"),
        "policy": policy,
    }
    task = {"vfiotool.host.vfiotool_policy": options, "register": "result"}
    code, found = play(tmp_path, collections, [task], "--check", "--diff")
    assert code == 0, found["text"]
    result = found["host0"]
    assert result["changed"] and result["steps"][0]["target"] == "0000:02:02.0"
    assert "vfio-pci" in result["diff"]["after"] and "0000:02:02.0" in found["text"]


def test_the_second_run_changes_nothing_and_a_host_that_fails_stops_no_other(
    tmp_path: Path, collections: Path
) -> None:
    for number in range(3):
        place = tmp_path / f"host{number}"
        place.mkdir()
        (place / "vfiotool").write_text(STAND_IN.format(python=sys.executable))
        (place / "vfiotool").chmod(0o755)
    (tmp_path / "host1" / "broken").touch()
    options = {"executable": "{{ place }}/vfiotool", "policy": "version = 1\n"}
    task = {"vfiotool.host.vfiotool_policy": options, "register": "result"}
    code, found = play(tmp_path, collections, [task], "--check", hosts=3)
    assert code == 0 and all(found[f"host{n}"]["changed"] for n in range(3)), found["text"]
    assert not any((tmp_path / f"host{n}" / "state").exists() for n in range(3))
    for path in (tmp_path / "results").iterdir():
        path.unlink()
    code, found = play(tmp_path, collections, [task], hosts=3)
    assert code == 2 and "the kernel refused; what had been done is rolled back" in found["text"]
    assert found["host0"]["changed"] and found["host2"]["transaction"] == 1
    assert "host1" not in found
    (tmp_path / "host1" / "broken").unlink()
    play(tmp_path, collections, [task], hosts=3)
    code, found = play(tmp_path, collections, [task], hosts=3)
    assert code == 0 and not any(found[f"host{n}"]["changed"] for n in range(3)), found["text"]
    assert [(tmp_path / f"host{n}" / "calls").read_text().count("apply") for n in range(3)] == [
        1,
        2,
        1,
    ]
