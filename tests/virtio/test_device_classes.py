"""The devices that are shipped as Python classes: storage, entropy, console; and the command."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.virtio.frontend import (
    DATA,
    SIZE,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_ZEROES,
    Frontend,
)
from tests.virtio.test_device import ask, connected, served
from vfiotool.virtio.console import Console, TerminalConsole
from vfiotool.virtio.entropy import EntropySource
from vfiotool.virtio.message import VhostRequest
from vfiotool.virtio.storage import MemoryStorage

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.sock"


class Coroutines(MemoryStorage):
    """The same disk, whose answers take a turn of the loop."""

    async def read(self, offset: int, into: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().read(offset, into)

    async def write(self, offset: int, data: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().write(offset, data)


@pytest.mark.parametrize("kind", [MemoryStorage, Coroutines])
def test_a_disk_in_python_does_what_the_one_in_c_does(
    path: Path, kind: type[MemoryStorage]
) -> None:
    with served(kind(16 * MIB, serial="a-serial"), path) as (_, said), connected(path) as front:
        front.up()
        data = random.Random(1).randbytes(64 * 1024)
        assert front.write(100, data) == 0
        assert front.read(100, len(data)) == data
        assert front.request(T_FLUSH)[0] == 0
        assert front.request(T_GET_ID, room=20) == (0, b"a-serial".ljust(20, b"\0"))
        assert front.request(77)[0] == 2
        last = 16 * MIB // 512 - 1
        assert front.write(last, bytes(512)) == 0
        assert front.write(last, bytes(1024)) == 1
        assert front.write((1 << 64) - 1, bytes(1024)) == 1
        assert front.write(0, bytes(100)) == 1
        assert front.request(T_IN, 0, room=511)[0] == 1
        for request, flags in ((T_ZEROES, 0), (T_ZEROES, 1), (T_DISCARD, 0)):
            assert front.write(0, b"\x5a" * 24 * 512) == 0
            assert front.request(request, data=struct.pack("<QII", 8, 8, flags))[0] == 0
            found = front.read(0, 24 * 512)
            assert found == b"\x5a" * 4096 + bytes(4096) + b"\x5a" * 4096
        assert front.request(T_DISCARD, data=struct.pack("<QII", 0, 8, 1))[0] == 2
        assert front.request(T_ZEROES, data=struct.pack("<QII", 1 << 62, 8, 0))[0] == 1
        assert front.request(T_ZEROES, data=bytes(17))[0] == 1
    assert said == []


def test_any_framing_of_a_request_is_one_stream_of_bytes(path: Path) -> None:
    with served(MemoryStorage(MIB), path), connected(path) as front:
        front.up()
        ring, data = front.rings[0], random.Random(2).randbytes(1024)
        front.memory[DATA : DATA + 16 + 1024] = struct.pack("<IIQ", T_OUT, 0, 7) + data
        front.put(ring, 0, [(DATA, 5, False), (DATA + 5, 1035, False), (DATA + 2048, 1, True)])
        front.add(ring, 0)
        assert front.wait(ring) == [(0, 1)] and front.memory[DATA + 2048] == 0
        front.memory[DATA : DATA + 16] = struct.pack("<IIQ", T_IN, 0, 7)
        front.put(ring, 0, [(DATA, 16, False), (DATA + 4096, 500, True), (DATA + 8192, 525, True)])
        front.add(ring, 0)
        assert front.wait(ring) == [(0, 1025)]
        got = front.memory[DATA + 4096 : DATA + 4596] + front.memory[DATA + 8192 : DATA + 8716]
        assert got == data and front.memory[DATA + 8716] == 0


def test_a_read_only_disk_and_errors_of_the_class(path: Path) -> None:
    class Failing(MemoryStorage):
        def read(self, offset: int, into: memoryview) -> None:
            raise OSError(5, "the medium is bad")

        def flush(self) -> None:
            raise RuntimeError("a fault")

    with served(Failing(MIB, read_only=True), path) as (_, said), connected(path) as front:
        front.up()
        assert front.write(0, bytes(512)) == 1
        assert front.request(T_IN, 0, room=512)[0] == 1
        assert front.request(T_FLUSH)[0] == 1
    (told,) = said
    assert told.startswith(
        "Failing.handle, queue 0: RuntimeError: a fault (test_device_classes.py:"
    )


def test_a_disk_that_grows_tells_its_driver(path: Path) -> None:
    device = MemoryStorage(MIB)
    with served(device, path) as (loop, _), connected(path) as front:
        front.up()
        done = asyncio.run_coroutine_threadsafe(_call(lambda: device.resize(MIB // 2)), loop)
        done.result(10)
        assert front.write(MIB // 1024, bytes(512)) == 1
        config = front.ask(VhostRequest.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))[12:]
        assert struct.unpack("<Q", config)[0] == MIB // 1024


async def _call(function: object) -> None:
    function()  # type: ignore[operator]


def test_what_a_killed_server_had_not_answered_is_done_by_the_next(tmp_path: Path) -> None:
    """By the in-flight log: its memory is ours, so it outlives the server."""
    path, log = tmp_path / "device.sock", tmp_path / "file.py"
    log.write_text(
        "import asyncio\n"
        "from vfiotool.virtio.storage import MemoryStorage\n"
        "class Half(MemoryStorage):\n"
        "    count = 0\n"
        "    def write(self, offset, data):\n"
        "        self.count += 1\n"
        "        if self.count % 2 == 0:\n"
        "            return asyncio.Event().wait()\n"
    )
    first = _start("--socket-path", str(path), name=f"{log}:Half")
    with ExitStack() as stack:
        stack.callback(first.kill)
        front = stack.enter_context(connected(path))
        front.negotiate()
        front.send(VhostRequest.GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, 1, SIZE))
        _, answer, fds = front.receive()
        assert front.acknowledged(VhostRequest.SET_INFLIGHT_FD, answer, fds) == 0
        front.share()
        front.start()
        ring = front.rings[0]
        for number in range(8):
            _lay_write(front, number)
            front.add(ring, 4 * number)
        assert sorted(head // 4 for head, _ in front.wait(ring, 4)) == [0, 2, 4, 6]
        first.kill()
        first.wait()
        device = MemoryStorage(MIB)
        path = tmp_path / "next.sock"
        with served(device, path), connected(path) as again:
            again.memory, again.rings = front.memory, front.rings
            again.negotiate()
            assert again.acknowledged(VhostRequest.SET_INFLIGHT_FD, answer, fds) == 0
            assert again.acknowledged(VhostRequest.SET_MEM_TABLE, again.table(), [front.fd]) == 0
            again.start(base=0)
            assert sorted(head // 4 for head, _ in again.wait(ring, 4)) == [1, 3, 5, 7]
            assert again.read(3, 512) == b"\3" * 512
            again.memory, again.rings = front.memory, []
        for descriptor in fds:
            os.close(descriptor)


def _lay_write(front: Frontend, number: int) -> None:
    at = DATA + 0x2000 * number
    front.memory[at : at + 16] = struct.pack("<IIQ", T_OUT, 0, number)
    front.memory[at + 16 : at + 528] = bytes([number]) * 512
    front.put(front.rings[0], 4 * number, [(at, 528, False), (at + 1024, 1, True)])


def test_entropy_fills_buffers(path: Path) -> None:
    with served(EntropySource(), path), connected(path) as front:
        front.up()
        ring = front.rings[0]
        front.memory[DATA : DATA + 64] = bytes(64)
        front.put(ring, 0, [(DATA, 64, True)])
        front.add(ring, 0)
        assert front.wait(ring) == [(0, 64)]
        assert len(set(front.memory[DATA : DATA + 64])) > 20


def test_a_console_says_and_hears(path: Path) -> None:
    heard: list[bytes] = []

    class Echoing(Console):
        def received(self, data: bytes) -> None:
            heard.append(data)
            self.send(b"you said " + data)

    with served(Echoing(), path), connected(path, queues=2) as front:
        front.up()
        to_driver, from_driver = front.rings
        front.memory[DATA : DATA + 3] = b"abc"
        front.put(from_driver, 0, [(DATA, 3, False)])
        front.add(from_driver, 0)
        assert front.wait(from_driver) == [(0, 0)]
        # Two buffers of 8 bytes for 12: what did not fit into the first comes in the second.
        for number in (0, 1):
            front.put(to_driver, number, [(DATA + 64 + 16 * number, 8, True)])
            front.add(to_driver, number)
        assert front.wait(to_driver, 2) == [(0, 8), (1, 4)]
        assert front.memory[DATA + 64 : DATA + 72] + front.memory[DATA + 80 : DATA + 84] == (
            b"you said abc"
        )
    assert heard == [b"abc"]


def test_what_a_console_hears_comes_in_pieces_however_much_a_request_claims(path: Path) -> None:
    heard: list[int] = []

    class Counting(Console):
        def received(self, data: bytes) -> None:
            heard.append(len(data))

    with served(Counting(), path), connected(path, queues=2) as front:
        front.up()
        ring = front.rings[1]
        front.put(ring, 0, [(DATA, 3 * MIB // 2, False)] * 3)
        front.add(ring, 0)
        assert front.wait(ring) == [(0, 0)]
    assert heard == [MIB] * 4 + [MIB // 2]


def test_a_console_is_a_terminal_of_the_host(path: Path) -> None:
    device = TerminalConsole()
    with served(device, path), connected(path, queues=2) as front:
        front.up()
        to_driver, from_driver = front.rings
        terminal = os.open(device.terminal, os.O_RDWR | os.O_NOCTTY)
        try:
            front.memory[DATA : DATA + 6] = b"login:"
            front.put(from_driver, 0, [(DATA, 6, False)])
            front.add(from_driver, 0)
            assert os.read(terminal, 64) == b"login:"
            front.put(to_driver, 0, [(DATA + 64, 16, True)])
            front.add(to_driver, 0)
            os.write(terminal, b"root\n")
            assert front.wait(to_driver) == [(0, 5)]
            assert front.memory[DATA + 64 : DATA + 69] == b"root\n"
        finally:
            os.close(terminal)


# The command


def _start(*options: str, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vfiotool", "serve", "vhost-user", name, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for(process, options[1])
    return process


def wait_for(process: subprocess.Popen[bytes], path: str) -> None:
    """Wait until a server listens, or has ended."""
    while process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(path)
            return
        os.sched_yield()


def test_the_command_serves_a_file_of_ones_own_until_sigterm(tmp_path: Path) -> None:
    path, file = tmp_path / "device.sock", tmp_path / "shout.py"
    file.write_text(
        "from vfiotool.virtio.device import VirtioDevice\n"
        "class Shout(VirtioDevice):\n"
        "    id = 42\n"
        "    def handle(self, queue, requests):\n"
        "        for request in requests:\n"
        "            request.complete(request.write(request.data().upper()))\n"
    )
    process = _start("--socket-path", str(path), name=f"{file}:Shout")
    try:
        with connected(path) as front:
            front.up()
            assert ask(front, b"hello", 5) == (5, b"HELLO")
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, b"")
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("nosuchmodule:Dice", 3, "there is no module nosuchmodule"),
        ("dice", 2, "not MODULE:CLASS"),
        ("vfiotool.virtio.entropy:Nothing", 3, "has no class Nothing"),
        ("vfiotool.virtio.block:BlockDisk", 2, "not a subclass of"),
        ("vfiotool.virtio.storage:Storage", 2, "without arguments"),
        ("/nowhere/at/all.py:Dice", 3, "/nowhere/at/all.py"),
    ],
)
def test_bad_names_are_one_clear_error(tmp_path: Path, name: str, code: int, said: str) -> None:
    path = tmp_path / "device.sock"
    process = _start("--socket-path", str(path), name=name)
    _, text = process.communicate(timeout=30)
    assert process.returncode == code, text
    assert said in text.decode() and b"Traceback" not in text
    assert not path.exists()


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "dice.py"
    file.write_text("raise SystemExit(77)\n")
    file.chmod(0o666)
    process = _start("--socket-path", str(tmp_path / "device.sock"), name=f"{file}:Dice")
    _, text = process.communicate(timeout=30)
    assert process.returncode == 2 and b"others may write to it" in text
    with suppress(FileNotFoundError):
        (tmp_path / "device.sock").unlink()
