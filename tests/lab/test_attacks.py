"""Attacks from outside that once went through: state files, names and callers that mean harm.

The others are, by what they are about:

- a disk, interface or VF that comes into use before or in the middle of a change, of `undo`, of
  `recover` either way, of the watcher of --confirm-within; a second signal; an `apply` that was
  stopped; settings of VFs in use: test_uses.py (their number: here), and a sample of all at once in
  test_uses_sweep.py;
- containers' links on a card, an observation that cannot fork, a node outside /dev, a disk whose
  node has gone: test_blockers_unseen.py;
- the boot display, with and without a driver: test_blockers_display.py;
- another device at the address of a half-done change: tests/guests/test_replaced.py;
- a cache of the lab that others can write to, which no guest has: tests/guests/test_cache.py.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.change.changing import binding
from tests.change.test_damage import HOSTILE, edited
from tests.lab.commands import Ran, driver_of, modprobe, override_of, vfiotool
from tests.lab.test_uses import (
    EDU,
    NIC,
    TESTDEV,
    VF,
    end,
    held,
    killed,
    put_back,
    run,
    vf,
    vfiotool_confirm_state,
    wait_for,
)
from vfiotool.change.journal import RUN_FOLDER
from vfiotool.change.sealed import seal, unseal

__all__ = ["vf"]  # A fixture.

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "some hundred commands"

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(Path(sys.prefix) / "bin" / "vfiotool")
STRANGER = 65534
FLIPS = 40
PCI = "/sys/bus/pci"


@pytest.fixture(autouse=True)
def guest() -> Iterator[None]:
    modprobe("vfio-pci")
    yield
    put_back()


def state() -> tuple[object, ...]:
    """What no attack may change: all drivers and overrides of the guest, and who is trusted."""
    devices = sorted(os.listdir(f"{PCI}/devices"))
    drivers = tuple((name, driver_of(name), override_of(name)) for name in devices)
    return (*drivers, Path("/etc/passwd").read_bytes())


def answered(*arguments: str) -> Ran:
    """The command's own answer: an emulated guest on a busy machine may be too slow for a read."""
    for _ in range(5):
        done = vfiotool(*arguments)
        if done.code != 6 or "gave no answer" not in done.err:
            break
    return done


def records() -> list[Path]:
    return sorted(Path(RUN_FOLDER).glob("boot-*/*.open"))


def test_boot_enable_through_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "bob" / "bin"
    place.mkdir(parents=True)
    (place / "vfiotool").symlink_to(TOOL)
    for path in (place / "vfiotool", place, place.parent):
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    policy = tmp_path / "p.toml"
    policy.write_text(f'version = 1\n[[device]]\nmatch = {{ address = "{EDU}" }}\n')
    command = [str(place / "vfiotool"), "boot", "enable", str(policy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done
    assert str(place.parent) in done.stderr
    assert not list(Path("/etc/systemd/system").glob("vfiotool*"))


def test_a_flipped_bit_of_a_journal_is_named_and_changes_nothing() -> None:
    killed(2, binding(EDU))
    (path,) = records()
    whole, before, luck = path.read_bytes(), state(), random.Random(30)
    for _ in range(FLIPS):
        at = luck.randrange(len(whole))
        flipped = whole[at] ^ 1 << luck.randrange(8)
        path.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        done = vfiotool("recover")
        assert done.code == 5, done
        assert path.name in done.err
        assert state() == before
    path.write_bytes(whole)
    assert vfiotool("recover").code == 0
    assert driver_of(EDU) is None


def test_a_hostile_journal_under_a_right_checksum_leads_nowhere() -> None:
    killed(2, binding(EDU))
    (path,) = records()
    whole, luck = path.read_bytes(), random.Random(15)
    others = state()[-1], driver_of(TESTDEV), override_of(TESTDEV)
    for _ in range(FLIPS):
        lines = whole.splitlines()
        at = luck.randrange(len(lines))
        lines[at] = seal(edited(luck, unseal(lines[at])) or {}).rstrip(b"\n")
        path.write_bytes(b"\n".join(lines) + b"\n")
        done = vfiotool("recover")
        assert done.code in (0, 2, 3, 4, 5, 6), done
        assert (state()[-1], driver_of(TESTDEV), override_of(TESTDEV)) == others
        if not path.exists():
            put_back()
            killed(2, binding(EDU))
            (path,) = records()
            whole = path.read_bytes()
    assert not Path("/tmp/evil").exists()


def test_few_descriptors_are_no_free_device() -> None:
    """An interface lives in another namespace, and the tool may open too little to see it."""
    (name,) = os.listdir(f"{PCI}/devices/{NIC}/net")
    libc = "import ctypes; assert ctypes.CDLL(None).unshare(0x40000000) == 0"
    script = f"{libc}\nprint('ready', flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as container:
        assert container.stdout is not None and container.stdout.readline() == "ready\n"
        inside = ("nsenter", "-t", str(container.pid), "-n")
        subprocess.run(["ip", "link", "set", name, "netns", str(container.pid)], check=True)
        address = (*inside, "ip", "addr", "add", "10.3.3.1/24", "dev", name)
        subprocess.run(address, check=True)
        for limit in range(6, 22, 3):
            command = ["prlimit", f"--nofile={limit}", TOOL, "bind", NIC]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode not in (0, 70), (limit, done)
            assert driver_of(NIC) == "igb", limit
        shown = subprocess.run([*inside, "ip", "-br", "addr"], capture_output=True, text=True)
        assert "10.3.3.1" in shown.stdout
        container.communicate("")


def damages() -> list[bytes]:
    foreign = {"identity": {}, "binding": {"driver": "../../../../tmp/evil", "override": "x\ny"}}
    values: list[object] = [[], {}, {"identity": {"x": 1}}, foreign, {"transaction": "x"}]
    values += [{"transaction": 999}, {"transaction": None, "pid": "a", "since": 1, "after": 0}]
    texts = [b"", b"{", b"\xff\xfe\n", b"[" * 100_000]
    return [*texts, *(json.dumps(value).encode() for value in values), *map(sealed, values)]


def sealed(value: object) -> bytes:
    return seal(value) if isinstance(value, dict) else b"[]\n"


def test_a_damaged_origin_is_named_and_release_does_not_believe_it() -> None:
    assert vfiotool("bind", EDU).code == 0
    (origin,) = Path(RUN_FOLDER).glob("boot-*/origins/*")
    for text in damages():
        origin.write_bytes(text)
        done = answered("release", EDU)
        assert done.code == 5, (text[:100], done)
        assert origin.name in done.err
        assert (driver_of(EDU), override_of(EDU)) == ("vfio-pci", "vfio-pci")


def test_a_damaged_entry_of_what_waits_is_named_and_nothing_is_kept_for_it() -> None:
    assert vfiotool("bind", EDU).code == 0
    (boot,) = Path(RUN_FOLDER).glob("boot-*")
    (boot / "pending").mkdir(mode=0o700, exist_ok=True)
    entry = boot / "pending" / "token"
    for text in damages():
        entry.write_bytes(text)
        entry.chmod(0o600)
        done = vfiotool("confirm")
        assert done.code in (3, 5), (text[:100], done)
        assert "kept" not in done.out
        assert done.code == 3 or entry.name in done.err


def test_a_policy_whose_name_holds_a_line_forges_none_of_the_history(tmp_path: Path) -> None:
    policy = tmp_path / "a\n9  2001-01-01 00:00:00  committed  bind \x1b[31mfake.toml"
    policy.write_text(f'version = 1\n[[device]]\nmatch = {{ address = "{EDU}" }}\n')
    assert vfiotool("apply", str(policy)).code == 0
    shown = vfiotool("history").out
    assert "fake.toml" in shown and "\x1b" not in shown
    assert not [line for line in shown.splitlines() if line.startswith("9 ")]


def test_a_foreign_trace_is_shown_without_its_escapes_or_refused(tmp_path: Path) -> None:
    event = {"t": 1, "event": "read\x1b]0;x\x07\x1b[2J", "device": "x", "note": "a\nFAKE LINE"}
    trace = tmp_path / "trace"
    trace.write_text(json.dumps(event) + "\n")
    other = tmp_path / "other"
    other.write_text('{"t":1,"event":"write","a":2}\n')
    for arguments in ((str(trace),), (str(trace), "--compare", str(other))):
        done = vfiotool("device", "trace", *arguments)
        assert done.code in (0, 1), done
        assert "\x1b" not in done.out + done.err
        assert not [line for line in done.out.splitlines() if line.startswith("FAKE")]
    for text in (b"\xff\xfe\n", b"[" * 100_000, b"[]\n", b'{"t":[]}\n'):
        trace.write_bytes(text)
        assert vfiotool("device", "trace", str(trace)).code == 2, text[:20]


def test_the_callers_environment_brings_no_program_and_no_code(tmp_path: Path) -> None:
    called, programs, code = tmp_path / "called", tmp_path / "bin", tmp_path / "code"
    programs.mkdir()
    code.mkdir()
    for name in ("modprobe", "lspci", "systemd-run", "udevadm", "ip", "sh"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {called}\n")
        (programs / name).chmod(0o755)
    mark = f"open({str(called)!r}, 'a').write(__file__)\n"
    for name in ("sitecustomize.py", "json.py", "vfiotool.py"):
        (code / name).write_text(mark)
    subprocess.run(["modprobe", "-r", "vfio-pci"], check=False, capture_output=True)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(code),
    }
    commands = (("bind", EDU), ("doctor",), ("show", EDU), ("boot", "status"), ("history",))
    for words in commands:
        done = subprocess.run(
            [TOOL, *words, "--json"], env=environment, cwd=code, capture_output=True, check=False
        )
        assert done.returncode in (0, 1) and (words[0] != "bind" or not done.returncode), (
            words,
            done,
        )
    assert driver_of(EDU) == "vfio-pci"
    assert not called.exists(), called.read_text()


def test_a_host_whose_names_are_no_text_is_listed_and_a_foreign_plan_refused(
    tmp_path: Path,
) -> None:
    snapshot = tmp_path / "host.txt"
    assert vfiotool("snapshot", str(snapshot)).code == 0
    text = snapshot.read_bytes()
    assert b"drivers/nvme" in text
    snapshot.write_bytes(text.replace(b"drivers/nvme", b"drivers/nv\xb2\xff"))
    for command in ("tree", "groups", "devices", "doctor"):
        done = vfiotool("--root", str(snapshot), command)
        assert done.code in (0, 1, 2), (command, done)
    plan = tmp_path / "foreign.plan"
    for value in ({"name": 1, "text": 2}, *HOSTILE[:12]):
        plan.write_text(json.dumps({"kind": "vfiotool-plan", "policy": value, "steps": []}))
        assert vfiotool("status", str(plan)).code == 2, value


def test_another_number_of_vfs_is_refused_while_a_vm_has_one(vf: str, tmp_path: Path) -> None:
    """The kernel destroys all VFs to make another number of them."""
    assert vfiotool("bind", VF).code == 0
    child = held(VF)
    policy = tmp_path / "p.toml"
    policy.write_text(
        f'version = 1\n[[sriov]]\nmatch = {{ address = "{NIC}" }}\nvfs = 3\nautoprobe = false\n'
    )
    try:
        for words in (("vf", "set", NIC, "0"), ("vf", "set", NIC, "2"), ("apply", str(policy))):
            done = vfiotool(*words)
            assert done.code == 4, done
            assert f"{VF} open-file" in done.err
            assert f"pid {child.pid}" in done.err
        assert len(list(Path(f"{PCI}/devices/{NIC}").glob("virtfn*"))) == 1
        assert driver_of(VF) == "vfio-pci"
    finally:
        end(child)
    assert vfiotool("vf", "set", NIC, "0").code == 0


def test_a_vf_that_comes_into_use_keeps_its_number_from_being_rolled_back(
    vf: str, tmp_path: Path
) -> None:
    """The count is changed, a VF is addressed, and then what comes next fails."""
    policy = tmp_path / "p.toml"
    policy.write_text(
        f'version = 1\n[[sriov]]\nmatch = {{ address = "{NIC}" }}\nvfs = 2\n'
        f'[[device]]\nmatch = {{ address = "{EDU}" }}\n'
    )
    held_back = vfiotool("bind", EDU, "--driver", "none")
    assert held_back.code == 0, held_back
    applied = vfiotool("apply", str(policy), "--confirm-within", "40")
    assert applied.code == 0, applied
    wait_for(lambda: list(Path(f"{PCI}/devices/{VF}").glob("net/*")))
    (found,) = Path(f"{PCI}/devices/{VF}").glob("net/*")
    run("ip", "addr", "add", "10.9.9.1/24", "dev", found.name)
    wait_for(lambda: "rolling it back failed" in vfiotool_confirm_state(), 240)
    assert "10.9.9.1" in run("ip", "-br", "addr", "show", "dev", found.name)
    assert f"route:{found.name}" in vfiotool("undo").err
    assert vfiotool("confirm").code == 0
