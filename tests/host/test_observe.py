"""The observations of a live host, made on this machine without changing it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vfiotool.host import namespaces, observe_files, observe_net, probe
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    BLOCK_CLAIM,
    MOUNTS,
    NET_CALLER,
    NET_LINKS,
    NET_ROUTES,
    OPEN_NODES,
    PROC,
)
from vfiotool.host.processes import command, plain, processes
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


def test_kernel_threads_are_looked_into_once_and_programs_always() -> None:
    """A program may call itself what it likes, also so that it looks like another's line."""
    name = "x) S 2 0 0 0 -1 2097152 ("
    say = f"import ctypes; ctypes.CDLL(None).prctl(15, {name[:15].encode()!r}, 0, 0, 0)"
    program = [sys.executable, "-c", f"{say}; print(flush=True); input()"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        listed = {int(entry) for entry in os.listdir(PROC) if entry.isdecimal()}
        found = set(processes())
        left_out = {pid for pid in listed - found if os.path.exists(f"{PROC}/{pid}")}
        child.communicate(b"\n")
    assert {child.pid, os.getpid(), 1} <= found
    assert all(not os.listdir(f"{PROC}/{pid}/fd") for pid in left_out)
    assert not any(os.path.exists(f"{PROC}/{pid}/exe") for pid in left_out)
    # In a container that sees no kernel thread there is none to leave out.
    assert left_out or command(2) != "kthreadd"


def test_terminals_memory_and_the_own_process_are_no_open_nodes() -> None:
    with open("/dev/null"), open("/dev/zero"):
        text = Host.local().read(OPEN_NODES) or ""
    assert "/dev/null" not in text
    assert f"{os.getpid()}\t" not in text


@pytest.mark.parametrize("name", ["..", "../../etc/passwd", ".x", "a/b"])
def test_a_claim_is_asked_of_plain_names_alone(name: str) -> None:
    assert probe.block_claim(name) == "unknown EINVAL\n"


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

    assert probe.ask_child(hang, timeout_s=0.2) is None
    assert time.monotonic() - started < 4


def test_a_question_that_fails_has_no_answer() -> None:
    def fail() -> str:
        raise OSError("no")

    assert probe.ask_child(fail) is None


def test_an_empty_answer_is_not_taken_for_none() -> None:
    assert probe.ask_child(lambda: "") == ""


def test_namespaces_that_do_not_answer_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """No empty observation: it would say that nothing lives there."""
    own = os.readlink("/proc/self/ns/mnt")
    found = namespaces.Found(0, {1: [namespaces.Place("/proc/self/ns/net", "9", "9")]})
    monkeypatch.setattr(observe_net, "find_namespaces", lambda kind: found)
    monkeypatch.setattr(probe, "ask_child", lambda question, keep=(): None)
    assert own
    with pytest.raises(OSError, match="no answer"):
        Host.local().read_bytes(NET_LINKS)


FAILURES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN)


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("name", [OPEN_NODES, MOUNTS, NET_LINKS])
def test_an_observation_that_fails_half_way_is_no_shorter_one(
    monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    """The processes before the failure were seen; those after it may be the users."""
    real, calls = os.readlink, []

    def readlink(path: str, **kwargs: Any) -> str:
        calls.append(path)
        if len(calls) > 8:
            raise OSError(number, os.strerror(number), path)
        return str(real(path, **kwargs))

    monkeypatch.setattr(os, "readlink", readlink)
    with pytest.raises(OSError) as raised:
        Host.local().read_bytes(name)
    assert raised.value.errno == number


@pytest.mark.parametrize("number", FAILURES)
def test_processes_that_cannot_be_listed_are_not_no_processes(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def listdir(path: str) -> list[str]:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "listdir", listdir)
    for name in (OPEN_NODES, MOUNTS, NET_LINKS):
        with pytest.raises(OSError):
            Host.local().read_bytes(name)


def test_a_child_that_cannot_be_made_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(BlockingIOError):
        Host.local().read_bytes(f"{BLOCK_CLAIM}/nosuchdisk")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tables_last_line_says_that_it_is_whole() -> None:
    for name in (MOUNTS, NET_LINKS, NET_ROUTES, OPEN_NODES):
        assert (Host.local().read_bytes(name).splitlines() or [b""])[-1] == b"."


def test_a_node_that_is_mapped_is_seen_though_its_descriptor_is_closed() -> None:
    """A text of maps as the kernel writes it, with a resource file of sysfs."""
    line = "7f00-7f10 rw-s 00000000 00:15 123    /sys/devices/pci0000:00/0000:00:03.0/resource0"
    match = observe_files._PCI_FILE.fullmatch(line.split(None, 5)[5])
    assert match is not None and match[1] == "/devices/pci0000:00/0000:00:03.0"


def test_a_long_answer_arrives_whole() -> None:
    assert probe.ask_child(lambda: "x" * 300_000) == "x" * 300_000


def test_names_cannot_break_the_format() -> None:
    assert plain("a\tb\nc\x1b[31m") == "a\\tb\\nc\\x1b[31m"
