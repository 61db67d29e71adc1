"""The observations of a live host, made on this machine without changing it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vfiotool.host import observe as host_scan
from vfiotool.host.host import Host
from vfiotool.host.paths import BLOCK_CLAIM, MOUNTS, NET_CALLER, OPEN_NODES
from vfiotool.host.tree import MemoryTree, OsTree

PROGRAM = """
from vfiotool.host.host import Host
from vfiotool.host.paths import NET_CALLER
print(repr(Host.local().read(NET_CALLER)))
"""


def ask_caller(*wrapper: str, session: str) -> str:
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", PROGRAM],
        env={"PATH": os.environ["PATH"], "SSH_CONNECTION": session},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_ssh_session_is_found_in_the_own_environment() -> None:
    assert ask_caller(session="192.0.2.1 999 198.51.100.7 22") == "'198.51.100.7\\t192.0.2.1\\n.'"


def test_the_ssh_session_is_found_though_sudo_cleared_the_environment() -> None:
    wrapper = ("sh", "-c", 'env -u SSH_CONNECTION "$0" "$@"; true')
    found = ask_caller(*wrapper, session="192.0.2.1 999 198.51.100.7 22")
    assert found == "'198.51.100.7\\t192.0.2.1\\n.'"


def test_a_malformed_ssh_session_is_none() -> None:
    assert ask_caller(session="garbage") == "'.'"


def test_the_own_mount_table_comes_first_and_whole() -> None:
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    lines = (Host.local().read(MOUNTS) or "").splitlines()
    assert [line.partition("\t")[2] for line in lines if line.startswith("self\t")] == table
    assert lines[0].startswith("self\t")


def test_terminals_memory_and_the_own_process_are_no_open_nodes() -> None:
    with open("/dev/null"), open("/dev/zero"):
        text = Host.local().read(OPEN_NODES) or ""
    assert "/dev/null" not in text
    assert f"{os.getpid()}\t" not in text


@pytest.mark.parametrize("name", ["..", "../../etc/passwd", ".x", "a/b"])
def test_a_claim_is_asked_of_plain_names_alone(name: str) -> None:
    assert host_scan.block_claim(name) == "unknown EINVAL\n"


def test_the_claim_of_an_absent_disk_is_unknown() -> None:
    assert Host.local().read(f"{BLOCK_CLAIM}/vfiotool-none") == "unknown ENOENT"


def test_an_unknown_observation_is_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        OsTree().read("/proc/vfiotool/no-such-thing")


def test_observations_are_made_on_the_live_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    assert Host.at(str(tmp_path)).read(MOUNTS) is None
    assert Host(MemoryTree({}, {}), live=True, name="fake").read(NET_CALLER) is None


def test_a_question_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()

    def hang() -> str:
        time.sleep(5)
        return "never"

    assert host_scan._ask_child(hang, timeout_s=0.2) is None
    assert time.monotonic() - started < 4


def test_a_question_that_fails_has_no_answer() -> None:
    def fail() -> str:
        raise OSError("no")

    assert host_scan._ask_child(fail) is None


def test_an_empty_answer_is_not_taken_for_none() -> None:
    assert host_scan._ask_child(lambda: "") == ""


def test_a_namespace_that_does_not_answer_is_counted_as_unseen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_scan, "_ask_child", lambda question, keep: None)
    monkeypatch.setattr(host_scan, "_processes", lambda: iter([1, os.getpid()]))
    real = os.stat

    def stat(path: str, **options: object) -> os.stat_result:
        return real(path if "self" in str(path) else "/proc/self/ns/mnt")

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stat)
        found = host_scan.net_namespaces()
    assert f"!\tthe network namespace of pid {os.getpid()}" in found


def test_a_long_answer_arrives_whole() -> None:
    assert host_scan._ask_child(lambda: "x" * 300_000) == "x" * 300_000


def test_names_cannot_break_the_format() -> None:
    assert host_scan._plain("a\tb\nc\x1b[31m") == "a\\tb\\nc\\x1b[31m"
