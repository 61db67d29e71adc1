"""One path, several servers: one of them listens, and none takes another's socket away."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.virtio.test_serve import connect
from vfiotool.errors import Refused, UsageError
from vfiotool.virtio import listener
from vfiotool.virtio.listener import listen, unlink_socket


def stale(path: Path) -> None:
    """A socket that a dead server left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))


def reached(path: Path, owner: socket.socket) -> bool:
    """Whether who connects to the path comes to this listener."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        owner.setblocking(False)
        try:
            owner.accept()[0].close()
        except BlockingIOError:
            return False
    return True


def test_private_sockets_of_threads_leave_the_umask_alone(tmp_path: Path) -> None:
    """Each of two that change it and put back what they found may put back the other's."""
    before = os.umask(0o022)
    barrier = threading.Barrier(4)

    def begin(number: int) -> None:
        for turn in range(50):
            barrier.wait()
            path = tmp_path / f"{number}-{turn}"
            with listen(str(path), private=True):
                assert path.stat().st_mode & 0o777 == 0o600

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.umask(before) == 0o022
    assert len(list(tmp_path.iterdir())) == 200


@pytest.mark.parametrize("left", [True, False])
def test_of_servers_that_begin_at_once_one_listens_and_is_reached(
    tmp_path: Path, left: bool
) -> None:
    path = tmp_path / "one.sock"
    for _ in range(50):
        if left:
            stale(path)
        won: list[socket.socket] = []
        barrier = threading.Barrier(4)

        def begin(won: list[socket.socket] = won, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with suppress(Refused):
                won.append(listen(str(path)))

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (only,) = won
        assert reached(path, only)
        only.close()
        unlink_socket(str(path))
        assert not path.exists()


def test_a_bound_socket_that_does_not_listen_yet_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "one.sock", []
    real = socket.socket.listen

    def late(self: socket.socket, *arguments: int) -> None:
        if not seen:
            seen.append(other := threading.Thread(target=second))
            other.start()
            # Long enough to look, were it not kept from it.
            other.join(0.3)
        real(self, *arguments)

    refused: list[str] = []

    def second() -> None:
        try:
            listen(str(path)).close()
        except Refused as error:
            refused.append(error.message)

    monkeypatch.setattr(socket.socket, "listen", late)
    first = listen(str(path))
    seen[0].join()
    assert refused and "another program listens there" in refused[0]
    assert reached(path, first)
    first.close()


def test_a_socket_that_another_server_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "one.sock"
    old = listen(str(path))
    os.unlink(path)
    new = listen(str(path))
    old.close()
    unlink_socket(str(path))
    assert reached(path, new)
    new.close()
    path.unlink()
    path.write_text("no socket")
    unlink_socket(str(path))
    assert path.read_text() == "no socket"
    with pytest.raises(UsageError, match="not a socket"):
        listen(str(path))


def test_a_folder_that_somebody_keeps_locked_delays_a_server_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_LOCK_S", 0.05)
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    made = listen(str(tmp_path / "one.sock"))
    assert reached(tmp_path / "one.sock", made)
    made.close()
    os.close(folder)


def test_a_server_that_ends_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    line = [sys.executable, "-m", "vfiotool", "serve", "vhost-user"]
    line += ["vfiotool.virtio.entropy:EntropySource", "--socket-path", str(path)]
    servers = []
    try:
        for _ in range(2):
            path.unlink(missing_ok=True)
            servers.append(subprocess.Popen(line))
            connect(path, servers[-1]).close()
        servers[0].terminate()
        assert servers[0].wait(60) == 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
    finally:
        for server in servers:
            server.terminate()
            server.wait(60)
    assert not path.exists()


@pytest.mark.parametrize("path", ["", "\0abstract", "a\0b", "x" * 108])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="path"):
        listen(path)
