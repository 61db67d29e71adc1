"""VDUSE devices of an exports file, with the kernel's side played by a socket."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio.frontend import Frontend
from vfiotool.errors import UsageError
from vfiotool.virtio import vduse, vduse_service
from vfiotool.virtio import vduse_wire as wire
from vfiotool.virtio.daemon import Daemon
from vfiotool.virtio.exports import parse_exports
from vfiotool.virtio.server import Server
from vfiotool.virtio.status import status_of
from vfiotool.virtio.vduse import VduseDevice
from vfiotool.virtio.vduse_wire import IovaRegion, VduseQueue

MIB = 1 << 20
BASE, SIZE = 0x10_0000, 64
TEXT = """
version = 1
[[export]]
name = "host"
blk_file = "{folder}/image"
size = 1048576
vduse = "disk0"
attach = "virtio"
[[export]]
name = "vm"
ram = "1M"
socket_path = "{folder}/vm"
"""


class Kernel:
    """The kernel's end of a VDUSE device, and its driver's memory."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        self.ours.settimeout(30)
        self.memory = os.memfd_create("bounce")
        os.ftruncate(self.memory, MIB)
        self.kick = -1
        self.attached: list[tuple[str, str]] = []
        self.destroyed: list[str] = []

    def ask(self, kind: int, body: bytes) -> int:
        self.ours.send(struct.pack("<II16x", kind, 7) + body.ljust(128, b"\0"))
        return int(struct.unpack_from("<II", self.ours.recv(152))[1])

    def write(self, data: bytes) -> int:
        """One request of a driver: its status."""
        os.pwrite(self.memory, struct.pack("<IIQ", 1, 0, 0) + data + b"\xff", 0x8000)
        status = 0x8000 + 16 + len(data)
        table = struct.pack("<QIHH", BASE + 0x8000, 16 + len(data), 1, 1)
        table += struct.pack("<QIHH", BASE + status, 1, 2, 0)
        os.pwrite(self.memory, table, 0)
        os.pwrite(self.memory, struct.pack("<HHH", 0, 1, 0), 0x1000)
        os.eventfd_write(self.kick, 1)
        pause = threading.Event()
        for _ in range(1000):
            if os.pread(self.memory, 2, 0x2002) != b"\0\0":
                return os.pread(self.memory, 1, status)[0]
            pause.wait(0.02)
        raise AssertionError("no completion")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel()

    def kicked(_fd: int, _index: int, kick: int) -> None:
        made.kick = kick

    layout = (BASE, BASE + 0x1000, BASE + 0x2000)
    monkeypatch.setattr(vduse, "open_control", lambda: (os.open("/dev/null", os.O_RDONLY), 0))
    monkeypatch.setattr(VduseDevice, "_create", lambda *_: True)
    monkeypatch.setattr(VduseDevice, "_open", lambda *_: os.dup(made.theirs.fileno()))
    monkeypatch.setattr(wire, "setup_queue", lambda *_: None)
    monkeypatch.setattr(wire, "set_kick", kicked)
    monkeypatch.setattr(wire, "negotiated", lambda _: 1 << 32)
    monkeypatch.setattr(wire, "queue_info", lambda *_: VduseQueue(SIZE, *layout, 0, True))
    monkeypatch.setattr(wire, "destroy", lambda _, name: made.destroyed.append(name))
    monkeypatch.setattr(
        wire,
        "regions",
        lambda _: [IovaRegion(BASE, BASE + MIB - 1, 0, os.dup(made.memory), True)],
    )
    monkeypatch.setattr(
        vduse_service, "attach", lambda name, how, *_: made.attached.append((name, how))
    )
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    yield made
    made.ours.close()
    made.theirs.close()
    os.close(made.memory)


def test_one_process_serves_a_machine_and_this_host(tmp_path: Path, kernel: Kernel) -> None:
    (tmp_path / "image").write_bytes(bytes(2 * MIB))
    file = tmp_path / "exports.toml"
    file.write_text(TEXT.format(folder=tmp_path))
    said: list[str] = []
    with Server(report=said.append) as server:
        daemon = Daemon(server, str(file), None)
        daemon.start()
        assert kernel.attached == [("disk0", "virtio")]
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert kernel.ask(1, bytes([15])) == 0
            assert kernel.write(b"by the host".ljust(512)) == 0
            front = Frontend(str(tmp_path / "vm"))
            front.up()
            assert front.write(0, b"by the machine".ljust(512)) == 0
            front.close()
            status = {export["name"]: export for export in status_of(server)["exports"]}
            assert status["host"]["vduse"] == "disk0" and status["vm"]["vduse"] is None
            assert status["host"]["figures"]["writes"] == 1
            # The file says it no more: it ends, the other goes on.
            file.write_text(
                TEXT.format(folder=tmp_path)
                .replace('vduse = "disk0"', "")
                .replace('attach = "virtio"', f'socket_path = "{tmp_path}/host"')
            )
            done = threading.Event()
            server.soon(lambda: (daemon.follow(), done.set()))
            assert done.wait(30)
            assert kernel.destroyed == ["disk0"]
            front = Frontend(str(tmp_path / "host"))
            front.up()
            assert front.read(0, 512) == b"by the host".ljust(512)
            front.close()
        finally:
            server.stop()
            thread.join()
    assert (tmp_path / "image").read_bytes()[:512] == b"by the host".ljust(512)
    assert said == []


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ('vduse = "d"\nsocket_path = "/x"', "one of socket_path and vduse"),
        ('vduse = "a/b"', "letters, digits"),
        ('vduse = "d"\nattach = "x"', "not one of virtio, vhost, none"),
        ('socket_path = "/x"\nattach = "vhost"', "attach is of vduse"),
        ("vduse = 3", "not of type str"),
    ],
)
def test_what_is_wrong_with_a_vduse_export_is_said(lines: str, wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        parse_exports(f'version = 1\n[[export]]\nname = "a"\nram = "1M"\n{lines}\n', "f")
