"""Files that no table of open files shows, held by a process of this machine's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vfiotool.host import observe_files, processes
from vfiotool.host.namespaces import find_namespaces
from vfiotool.host.observe_files import open_nodes

NODE = "/dev/zero"
# What a holder's programs share: `held` tells that it holds, and waits for the end of its input.
HEAD = """
import ctypes, os, socket, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def held():
    print("held", flush=True)
    os.read(0, 1)
def send(end, *numbers):
    socket.send_fds(end, [b"x"], numbers)
def pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
def node():
    return os.open("/dev/zero", os.O_RDONLY)
"""


@contextmanager
def holding(program: str) -> Iterator[int]:
    """A process that runs the program until it holds what it is to hold; its id."""
    command = [sys.executable, "-c", HEAD + program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            assert child.stdout.readline() == b"held\n"
            yield child.pid
        finally:
            child.kill()


@pytest.fixture(autouse=True)
def any_node_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder has no disk of this machine's, but a node that is of no device otherwise."""
    monkeypatch.setattr(observe_files, "_COMMON_MAJORS", frozenset())


def lines_of(pid: int) -> list[str]:
    return [line for line in open_nodes().splitlines() if re.search(rf"\b{pid}\b", line)]


def test_a_file_in_a_socket_is_seen_and_stays_there() -> None:
    program = (
        "a, b = pair(); fd = node(); send(a, fd); os.close(fd); held()\n"
        "assert socket.recv_fds(b, 1, 1)[1]; print('taken', flush=True)"
    )
    with holding(program) as pid:
        assert [line.split("\t")[2] for line in lines_of(pid)] == [NODE]
        assert [line.split("\t")[2] for line in lines_of(pid)] == [NODE]


def test_a_file_in_a_socket_that_is_in_a_socket_is_seen() -> None:
    program = (
        "a, b = pair(); c, d = pair(); fd = node(); send(a, fd); os.close(fd)\n"
        "send(c, a.fileno(), b.fileno()); a.close(); b.close(); held()"
    )
    with holding(program) as pid:
        assert [line.split("\t")[2] for line in lines_of(pid)] == [NODE]


def test_files_behind_the_first_message_are_unknown() -> None:
    program = "a, b = pair(); fd = node(); send(a, 0); send(a, fd); os.close(fd); held()"
    with holding(program) as pid:
        text = "\n".join(lines_of(pid))
        assert f"!\t1 of its 2 files on their way through a socket of pid {pid}" in text


def test_files_in_a_connection_that_nobody_accepted_are_unknown() -> None:
    program = (
        "s = socket.socket(socket.AF_UNIX); s.bind('\\0vfiotool-test-%d' % os.getpid()); "
        "s.listen(); c = socket.socket(socket.AF_UNIX); c.connect(s.getsockname()); "
        "fd = node(); send(c, fd); os.close(fd); held()"
    )
    with holding(program) as pid:
        assert f"socket of pid {pid}" in "\n".join(lines_of(pid))


DEAD_FIRST = """
def other():
    {what}
    first.wait()
    held()
    os._exit(0)
class First:
    def wait(self):
        while open('/proc/self/stat').read().rpartition(')')[2].split()[0] != 'Z':
            pass
first = First()
threading.Thread(target=other).start()
libc.syscall(60, 0)
"""
needs_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="exit is 60")


@needs_x86
def test_a_process_whose_first_thread_ended_is_looked_into() -> None:
    mapping = "libc.mmap.restype = ctypes.c_void_p; fd = node(); "
    mapping += "libc.mmap(None, 4096, 1, 2, fd, ctypes.c_long(0)); os.close(fd)"
    for what in ("fd = node()", mapping):
        with holding(DEAD_FIRST.format(what=what)) as pid:
            assert NODE in "\n".join(lines_of(pid))


@needs_x86
@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace")
def test_namespaces_of_a_process_whose_first_thread_ended_are_found() -> None:
    with holding(DEAD_FIRST.format(what="libc.unshare(0x40000000)")) as pid:
        names = [place.name for found in find_namespaces("net").places.values() for place in found]
        assert any(name.startswith(f"{pid}/task/") for name in names)
        assert processes.living(pid) != pid


RING = """
number = libc.syscall(425, 4, ctypes.create_string_buffer(120))
if number < 0:
    print("none", flush=True); sys.exit()
libc.mmap.restype = ctypes.c_void_p
for place in PLACES:
    libc.mmap(None, 4096, 3, 1, number, ctypes.c_long(place))
os.close(number)
held()
"""


@pytest.mark.parametrize("places", [(0, 0x10000000), (0,), (0x8000000,), (0x10000000,)])
def test_a_ring_that_only_a_mapping_keeps_is_unknown(places: tuple[int, ...]) -> None:
    ring = RING.replace("PLACES", repr(places))
    probe = subprocess.run(
        [sys.executable, "-c", HEAD + ring], stdin=subprocess.DEVNULL, capture_output=True
    )
    if probe.stdout == b"none\n":
        pytest.skip("no io_uring here")
    with holding(ring) as pid:
        assert f"registered with io_uring by pid {pid}, which closed it" in "\n".join(lines_of(pid))


def test_a_function_is_known_by_its_file_below_any_proc_or_sys() -> None:
    for path in ("/proc/bus/pci/00/00.0", "/mnt/p/bus/pci/00/00.0", "/bus/pci/00/00.0"):
        found = observe_files._function_of(path)
        assert found is not None and found.endswith("/0000:00:00.0")
    found = observe_files._function_of("/proc/bus/pci/10000:e1/00.0")
    assert found is not None and found.endswith("/10000:e1:00.0")
    other = "/mnt/s/devices/pci0000:00/0000:00:03.0/resource0_wc"
    assert observe_files._function_of(other) == "/sys/devices/pci0000:00/0000:00:03.0"
    assert observe_files._function_of("/proc/bus/pci/devices") is None


def test_memory_that_is_mapped_is_the_functions_whose_registers_lie_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranges = [(0xFE000000, 0xFE000FFF, "/sys/a"), (0xFE001000, 0xFE001FFF, "/sys/b")]
    monkeypatch.setattr(observe_files, "_registers", lambda: iter(ranges))
    looked = observe_files._Nodes()
    assert list(looked.memory(0xFE000000, 0xFE000FFF)) == ["/sys/a"]
    assert list(looked.memory(0xFE000FFF, 0xFE001000)) == ["/sys/a", "/sys/b"]
    assert list(looked.memory(0, 0xFDFFFFFF)) == []


def test_processes_that_proc_does_not_list_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pid:[" in processes._FIRST_PID_NAMESPACE
    monkeypatch.setattr(processes, "_FIRST_PID_NAMESPACE", "pid:[1]")
    text = "the processes outside of this PID namespace"
    assert f"!\t{text}" in open_nodes().splitlines()
    assert text in find_namespaces("mnt").unknown
