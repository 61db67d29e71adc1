"""What must not cost a server its machines: full tables, readers that go, files that are wrong."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.frontend import Closed, Frontend
from tests.virtio.test_region_share import add_region
from tests.virtio.test_serve import VFIOTOOL, connect
from vfiotool.errors import KernelError, Refused
from vfiotool.virtio import control
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.server import Export, Server

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    made = tmp_path / "exports.toml"
    write(made, "vm1", "vm2")
    return made


def write(file: Path, *names: str, **changed: str) -> None:
    """An exports file of these; `changed` has another image for some."""
    text = "version = 1\n"
    for name in names:
        image = changed.get(name, f"{file.parent}/{name}.raw")
        if name not in changed:
            with open(image, "ab") as raw:
                raw.truncate(MIB)
        text += f'[[export]]\nname = "{name}"\nblk_file = "{image}"\n'
        text += f'socket_path = "{file.parent}/{name}"\n'
    file.write_text(text)


@contextmanager
def serving(
    file: Path, *options: str, files: int | None = None, **pipes: Any
) -> Iterator[subprocess.Popen[str]]:
    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [*VFIOTOOL, "serve", "exports", str(file), *options]
    pipes.setdefault("stderr", subprocess.PIPE)
    with subprocess.Popen(command, text=True, preexec_fn=limit, **pipes) as process:
        try:
            for name in ("vm1", "vm2"):
                connect(file.parent / name, process).close()
            yield process
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait(timeout=20)


def works(front: Frontend) -> bool:
    return front.write(0, b"w" * 512) == 0 and front.read(0, 512) == b"w" * 512


def reload(process: subprocess.Popen[str]) -> str:
    """The first line that is said of a file that was read again."""
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.mark.parametrize(
    "text", ["version = " + "1" * 5000, "version = 0x" + "f" * 5000, "version" + ".a" * 5000 + "=1"]
)
def test_a_file_that_is_absurd_ends_nobody(file: Path, text: str) -> None:
    with serving(file) as process:
        front = connect(file.parent / "vm1", process)
        front.up()
        file.write_text(text)
        assert "is not followed" in reload(process)
        assert works(front)
        front.close()


def test_exports_that_there_are_no_descriptors_for_are_named_and_the_others_go_on(
    file: Path,
) -> None:
    with serving(file, files=48) as process:
        front = connect(file.parent / "vm1", process)
        front.up()
        write(file, "vm1", "vm2", *(f"more{number}" for number in range(24)))
        said = reload(process)
        assert "is not served as the file says" in said and "EMFILE" in said
        assert works(front)
        front.close()


def test_an_export_whose_change_fails_is_served_as_it_was(file: Path) -> None:
    with serving(file) as process:
        other = connect(file.parent / "vm2", process)
        other.up()
        write(file, "vm1", "vm2", vm1=f"{file.parent}/absent.raw")
        assert "vm1 is not served as the file says: open" in reload(process)
        assert works(other)
        front = connect(file.parent / "vm1", process)
        front.up()
        assert works(front)
        # And its image is still its own.
        with pytest.raises(Refused):
            BlockDisk(DiskSettings(path=str(file.parent / "vm1.raw")))
        front.close()
        other.close()


def test_a_process_that_handed_over_does_not_follow_the_file_any_more(file: Path) -> None:
    from vfiotool.virtio.daemon import Daemon

    with Server(report=print) as server:
        daemon = Daemon(server, str(file), None)
        daemon.start()
        write(file, "vm1", "vm3")
        server.handed_over = True
        daemon.follow()
        assert sorted(server.exports) == ["vm1", "vm2"]
        server.handed_over = False


def test_what_comes_with_the_end_is_left_to_the_process_that_took_over(tmp_path: Path) -> None:
    """Of one look at the sockets: the control connection that hands over, then a message."""
    server = Server(report=print)
    path = str(tmp_path / "s")
    server.add(Export("e", BlockDisk(DiskSettings(size=MIB)), listen(path), path))
    ours, theirs = socket.socketpair()
    server.watch(ours, server.stop)
    front = Frontend(path)
    front.send(1)  # GET_FEATURES
    theirs.send(b"x")
    found = {key.fileobj: (key, 1) for key in server._selector.get_map().values()}
    export = server.exports["e"]
    assert export.listener is not None
    ready = [found[ours], found[export.listener]]
    server._selector.select = lambda *_: ready  # type: ignore[method-assign]
    server.run()
    assert export.connections == []
    del server._selector.select
    front.close()
    server.unwatch(ours)
    server.close()


def busy_s(process: subprocess.Popen[str]) -> float:
    text = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")


def test_a_control_socket_without_descriptors_left_turns_away_and_does_not_spin(
    file: Path,
) -> None:
    with serving(file, files=40) as process:
        path = control.control_path(str(file))
        clients = []
        for name in ("vm1", "vm2") * 6:
            # A message that is never whole keeps what it brought.
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(file.parent / name))
            socket.send_fds(client, [b"\1"], [0, 0])
            clients.append(client)
        assert waited(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) > 35, 10)
        for _ in range(8):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            clients.append(client)
        ended = [one for one in clients[12:] if waited(lambda one=one: gone(one), 1.0)]
        assert ended
        before = busy_s(process)
        select.select([], [], [], 1.0)
        assert busy_s(process) - before < 0.3
        for client in clients:
            client.close()


def waited(condition: Callable[[], bool], seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        select.select([], [], [], 0.01)
    return True


def gone(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_spare_descriptor_that_another_program_took_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfiotool.virtio.listener import Spare

    spare = Spare()

    class Full:
        def accept(self) -> tuple[socket.socket, object]:
            raise OSError(23, "Too many open files in system")

    def none_left(*_: object) -> int:
        raise OSError(23, "Too many open files in system")

    monkeypatch.setattr(os, "open", none_left)
    for _ in range(2):
        with pytest.raises(Refused):
            spare.accept(Full())  # type: ignore[arg-type]
    spare.close()


def test_no_tenant_uses_up_the_descriptors_of_another(file: Path) -> None:
    with serving(file, files=256) as process:
        greedy = connect(file.parent / "vm1", process)
        greedy.negotiate()
        taken = 0
        while taken < 256 and add_region(greedy, taken):
            taken += 1
        assert 16 < taken < 128
        honest = connect(file.parent / "vm2", process)
        honest.up()
        assert works(honest)
        greedy.close()
        honest.close()


def fill(writer: int) -> None:
    """Leave no room in a pipe; not by a mode, which the process that has it would share."""
    while select.select([], [writer], [], 0)[1]:
        os.write(writer, bytes(4096))


def test_a_standard_error_that_nobody_reads_holds_nobody_up(file: Path) -> None:
    reader, writer = os.pipe()
    with serving(file, stderr=writer) as process:
        fill(writer)
        for _ in range(3):
            rude = Frontend(str(file.parent / "vm1"))
            rude.send(99)
            with pytest.raises(Closed):
                rude.receive()
            rude.close()
        front = connect(file.parent / "vm1", process)
        front.up()
        assert works(front)
        front.close()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("stays", [True, False])
def test_statistics_that_nobody_reads_hold_nobody_up(file: Path, stays: bool) -> None:
    reader, writer = os.pipe()
    with serving(file, "--stats", "0.1", stdout=writer) as process:
        os.read(reader, 100)
        if stays:
            fill(writer)
        os.close(writer)
        if not stays:
            os.close(reader)
            assert process.stderr is not None
            assert "standard output cannot be written" in process.stderr.readline()
        ends = time.monotonic() + 0.3
        while time.monotonic() < ends:
            # Each connection needs the thread that prints.
            front = connect(file.parent / "vm1", process)
            front.up()
            assert works(front)
            front.close()
    if stays:
        os.close(reader)


def test_what_fails_in_a_running_server_is_said_and_not_its_end() -> None:
    said: list[str] = []
    with Server(report=said.append) as server:
        server.add(Export("e", BlockDisk(DiskSettings(size=MIB)), socket.socket(socket.AF_UNIX)))

        def wrong() -> None:
            raise RuntimeError("ours")

        server.soon(wrong)
        server.every(0.01, wrong)
        thread = threading.Thread(target=server.run)
        thread.start()
        assert waited(lambda: len(said) > 2, 10)
        server.stop()
        thread.join()
    assert all("RuntimeError: ours" in one for one in said)


def test_a_file_that_is_to_be_read_again_and_again_holds_nobody_up() -> None:
    ours, theirs = socket.socketpair()
    with Server(report=print) as server, ours, theirs:
        server.add(Export("e", BlockDisk(DiskSettings(size=MIB)), socket.socket(socket.AF_UNIX)))
        read: list[int] = []

        def follow() -> None:
            read.append(1)
            if len(read) < 100:
                # As signals do that come meanwhile.
                server.soon(follow)
                server.soon(follow)

        server.soon(follow)
        server.watch(ours, server.stop)
        theirs.send(b"x")
        server.run()
        server.unwatch(ours)
    assert len(read) < 3


@pytest.mark.parametrize(
    ("lock", "read_only", "claims"),
    [("always", False, True), ("always", True, False), ("running", False, False)],
)
def test_a_block_device_that_this_host_uses_is_not_given_to_a_machine(
    monkeypatch: pytest.MonkeyPatch, lock: str, read_only: bool, claims: bool
) -> None:
    asked: list[int] = []

    def busy(path: str, flags: int) -> int:
        asked.append(flags)
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    monkeypatch.setattr(os, "open", busy)
    settings = DiskSettings(path="/", lock=lock, read_only=read_only)
    error, said = (Refused, "in use by this host") if claims else (KernelError, "open /: ")
    with pytest.raises(error, match=said):
        BlockDisk(settings)
    assert bool(asked[0] & os.O_EXCL) is claims
