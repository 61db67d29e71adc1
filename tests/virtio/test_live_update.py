"""Live update: one server takes another's place under load; nothing is lost, doubled or refused."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.frontend import DATA, SIZE, T_IN, T_OUT, Frontend
from tests.virtio.test_serve import VFIOTOOL, connect
from vfiotool.errors import KernelError, UsageError
from vfiotool.virtio import control, handover
from vfiotool.virtio.server import Server

MIB = 1 << 20
STRIDE = 2048
SECTORS = 4096


class Verified:
    """Writes of numbered contents at random places, each read back later and compared."""

    def __init__(self, front: Frontend, seed: int) -> None:
        self.front, self.rng = front, random.Random(seed)
        self.contents: dict[int, int] = {}
        self.flight: dict[int, tuple[int, int, int]] = {}
        self.free = [4 * number for number in range(SIZE // 4)]
        self.number = self.done = 0

    def fill(self) -> None:
        """Ask for as much as there is room for, at places that nothing is in flight for."""
        front, ring, busy = self.front, self.front.rings[0], {f[1] for f in self.flight.values()}
        while self.free:
            sector = self.rng.randrange(SECTORS)
            if sector in busy:
                continue
            busy.add(sector)
            head, self.number = self.free.pop(), self.number + 1
            kind = T_IN if sector in self.contents and self.rng.random() < 0.5 else T_OUT
            at = DATA + head // 4 * STRIDE
            front.memory[at : at + 16] = struct.pack("<IIQ", kind, 0, sector)
            front.memory[at + 16 : at + 528] = struct.pack("<II", sector, self.number) * 64
            front.memory[at + 528] = 0xFF
            if kind == T_OUT:
                front.put(ring, head, [(at, 528, False), (at + 528, 1, True)])
            else:
                front.put(ring, head, [(at, 16, False), (at + 16, 513, True)])
            self.flight[head] = (kind, sector, self.number)
            front.add(ring, head, kick=not self.free)

    def take(self) -> None:
        """Take one completion and check it."""
        ((head, _),) = self.front.wait(self.front.rings[0])
        kind, sector, number = self.flight.pop(head)
        at = DATA + head // 4 * STRIDE
        assert self.front.memory[at + 528] == 0
        if kind == T_OUT:
            self.contents[sector] = number
        else:
            found = self.front.memory[at + 16 : at + 528]
            assert found == struct.pack("<II", sector, self.contents[sector]) * 64
        self.free.append(head)
        self.done += 1

    def work(self, count: int) -> None:
        for _ in range(count):
            self.fill()
            self.take()

    def drain(self) -> None:
        while self.flight:
            self.take()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    text = "version = 1\n"
    for name in ("one", "two"):
        image = tmp_path / f"{name}.raw"
        with image.open("wb") as raw:
            raw.truncate(4 * MIB)
        text += f'[[export]]\nname = "{name}"\nblk_file = "{image}"\nqueues = 2\n'
        text += f'socket_path = "{tmp_path / name}"\niops_limit = 1000000\ngroup = "g"\n'
    text += f'[[export]]\nname = "ram"\nram = "4M"\nsocket_path = "{tmp_path / "ram"}"\n'
    made = tmp_path / "exports.toml"
    made.write_text(text)
    return made


def spawn(file: Path, *options: str) -> subprocess.Popen[str]:
    command = [*VFIOTOOL, "serve", "exports", str(file), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def running(file: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes; the last one serves."""
    processes = [spawn(file)]
    try:
        for name in ("one", "two"):
            connect(file.parent / name, processes[0]).close()
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=20)


def ended(process: subprocess.Popen[str], file: Path, loads: list[Verified]) -> tuple[int, str]:
    """The end of a process while its successor is under load."""
    while process.poll() is None:
        for load in loads:
            load.work(20)
    return process.returncode, process.communicate()[1]


def update_under_load(
    file: Path, processes: list[subprocess.Popen[str]], times: int
) -> list[Verified]:
    fronts = [connect(file.parent / name, processes[0]) for name in ("one", "two", "ram")]
    loads = [Verified(front, number) for number, front in enumerate(fronts)]
    for front in fronts:
        front.up()
    for _ in range(times):
        for load in loads:
            load.work(100)
        processes.append(spawn(file, "--take-over"))
        code, said = ended(processes[-2], file, loads)
        assert (code, said) == (0, ""), said
        assert processes[-1].poll() is None
    for load in loads:
        load.work(100)
        load.drain()
    return loads


def finish(file: Path, processes: list[subprocess.Popen[str]], loads: list[Verified]) -> None:
    """Everything is as was acknowledged, for the client and on the disk."""
    asked = control.ask(control.control_path(str(file)) or "", {"ask": "status"})
    assert asked["pid"] == processes[-1].pid
    for load, export in zip(loads, asked["exports"], strict=True):
        # The figures go on over all processes.
        figures = export["figures"]
        assert figures["reads"] + figures["writes"] == load.done and figures["failed"] == 0
        assert export["iops_limit"] == (None if export["name"] == "ram" else 1000000)
        load.front.close()
    processes[-1].send_signal(signal.SIGTERM)
    assert processes[-1].wait(timeout=20) == 0
    assert not (file.parent / "one").exists()
    for name, load in zip(("one", "two"), loads[:2], strict=True):
        stored = (file.parent / f"{name}.raw").read_bytes()
        for sector, number in load.contents.items():
            wanted = struct.pack("<II", sector, number) * 64
            assert stored[512 * sector : 512 * sector + 512] == wanted


def test_a_server_takes_anothers_place_under_load(
    file: Path, running: list[subprocess.Popen[str]]
) -> None:
    finish(file, running, update_under_load(file, running, 3))


@pytest.mark.proof
def test_twenty_servers_take_each_others_place_under_load(
    file: Path, running: list[subprocess.Popen[str]]
) -> None:
    loads = update_under_load(file, running, 20)
    print("requests verified", [load.done for load in loads])
    finish(file, running, loads)


def test_the_old_server_goes_on_if_the_new_one_dies_is_silent_or_talks_nonsense(
    file: Path, running: list[subprocess.Popen[str]]
) -> None:
    front = connect(file.parent / "one", running[0])
    front.up()
    path = control.control_path(str(file)) or ""
    before = len(os.listdir(f"/proc/{running[0].pid}/fd"))

    def offered() -> socket.socket:
        channel = control.connect(path)
        channel.sendall(b'{"ask": "take-over"}\n')
        value, unpacked = handover.receive(channel)
        assert len(value["exports"]) == 3
        unpacked.close()
        return channel

    for answer in (b"", b"\0" * 8, handover._HEAD.pack(1 << 31, 0), b"x" * 100):
        with offered() as channel:
            channel.sendall(answer)
        assert front.write(7, b"s" * 512) == 0
    for word in ("no", "started"):
        with offered() as channel:
            handover.send(channel, {"say": word})
            assert front.read(7, 512) == b"s" * 512
    assert running[0].poll() is None
    assert control.ask(path, {"ask": "status"})["pid"] == running[0].pid
    deadline = time.monotonic() + 20
    while len(os.listdir(f"/proc/{running[0].pid}/fd")) != before:
        assert time.monotonic() < deadline, "descriptors were left open"
    front.close()


def test_a_machine_whose_memory_is_gone_keeps_no_server_from_being_replaced(
    file: Path, running: list[subprocess.Popen[str]]
) -> None:
    honest, broken = (connect(file.parent / name, running[0]) for name in ("one", "two"))
    for front in (honest, broken):
        front.up()
        assert front.write(7, b"s" * 512) == 0
    os.ftruncate(broken.fd, 0)
    running.append(spawn(file, "--take-over"))
    assert running[0].wait(timeout=20) == 0
    assert honest.read(7, 512) == b"s" * 512
    assert broken.socket.recv(1) == b""
    again = connect(file.parent / "two", running[1])
    again.up()
    assert again.read(7, 512) == b"s" * 512
    for front in (honest, again):
        front.close()
    broken.socket.close()
    running[1].terminate()
    assert "two: connection ended: map" in running[1].communicate(timeout=20)[1]


def test_a_server_without_room_for_the_machines_takes_none_of_them(
    file: Path, running: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    front = connect(file.parent / "one", running[0])
    front.up()

    def full(*_: object) -> None:
        raise KernelError("map the front end's memory: Cannot allocate memory (ENOMEM)")

    monkeypatch.setattr("vfiotool.virtio.backend.MemoryMap", full)
    with Server(report=print) as server, pytest.raises(KernelError, match="ENOMEM"):
        channel = control.connect(control.control_path(str(file)) or "")
        channel.sendall(b'{"ask": "take-over"}\n')
        try:
            handover.take(server, channel)
        finally:
            channel.close()
    assert front.write(7, b"s" * 512) == 0
    front.close()


DIES_AFTER_GO = """
import os, sys, time
from vfiotool.virtio import control, handover
from vfiotool.virtio.server import Server
channel = control.connect(sys.argv[1])
channel.sendall(b'{"ask": "take-over"}\\n')
value, unpacked = handover.receive(channel)
handover.send(channel, {"say": "ready"})
print(handover.receive(channel)[0]["say"], flush=True)
if sys.argv[2] == "dies":
    os._exit(1)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.proof)])
def test_a_successor_that_fails_after_its_go_is_ended_first(
    file: Path, running: list[subprocess.Popen[str]], how: str
) -> None:
    front = connect(file.parent / "one", running[0])
    front.up()
    path = control.control_path(str(file)) or ""
    command = [sys.executable, "-c", DIES_AFTER_GO, path, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as successor:
        assert successor.stdout is not None and successor.stdout.readline() == "go\n"
        assert front.write(3, b"d" * 512) == 0
        assert successor.wait(20) in (1, -signal.SIGKILL)
    assert running[0].poll() is None
    front.close()


def test_damaged_state_is_refused_and_nothing_of_it_stays(
    file: Path, running: list[subprocess.Popen[str]]
) -> None:
    """Every value of what a server sends, replaced by what it cannot be."""
    front = connect(file.parent / "one", running[0])
    front.up()
    path = control.control_path(str(file)) or ""
    with control.connect(path) as channel:
        channel.sendall(b'{"ask": "take-over"}\n')
        value, unpacked = handover.receive(channel)
        fds = [unpacked.need(number) for number in range(len(unpacked._descriptors))]
    rng = random.Random(5)
    with Server(report=print) as server:
        before, refused = own_descriptors(), 0
        for _ in range(200):
            text = json.loads(json.dumps(value))
            spoil(text, rng)
            ours, theirs = socket.socketpair()
            with ours, theirs:
                handover.send(ours, text, fds)
                try:
                    taken = handover.take(server, theirs)
                except (UsageError, KernelError, Exception) as error:
                    assert isinstance(error, (UsageError, KernelError)) or hasattr(error, "message")
                    refused += 1
                else:
                    taken.unused.close()
        assert refused > 100
        assert own_descriptors() == before
    for fd in fds:
        os.close(fd)
    assert front.write(3, b"d" * 512) == 0
    front.close()


def offered(path: str) -> dict[str, Any]:
    """What a server would hand over; it goes on, as nobody takes it."""
    with control.connect(path) as channel:
        channel.sendall(b'{"ask": "take-over"}\n')
        value, unpacked = handover.receive(channel)
        unpacked.close()
    return value


def test_what_a_machine_owes_its_limit_is_not_forgiven_by_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    file = tmp_path / "exports.toml"
    file.write_text(
        f'version = 1\n[[export]]\nname = "slow"\nram = "1M"\nsocket_path = "{tmp_path}/slow"\n'
        'bandwidth_limit = 100\ngroup = "g"\n[[group]]\nname = "g"\nbandwidth_limit = 50\n'
    )
    path = control.control_path(str(file)) or ""
    processes = [spawn(file)]
    try:
        front = connect(tmp_path / "slow", processes[0])
        front.up()
        assert front.write(0, b"d" * 8192) == 0
        owed = [offered(path)]
        processes.append(spawn(file, "--take-over"))
        assert processes[0].wait(timeout=20) == 0
        assert control.ask(path, {"ask": "status"})["pid"] == processes[1].pid
        owed.append(offered(path))
        front.close()
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=20)
    # 8 KiB at 100 and at 50 bytes a second, less what has been earned since.
    passed = (owed[1]["clock"] - owed[0]["clock"]) / 1e9
    for found, wanted in zip(owed, (82, 82 - passed), strict=True):
        assert abs(found["exports"][0]["level"]["bytes_ns"] / 1e9 - wanted) < 2
        assert abs(found["groups"]["g"]["level"]["bytes_ns"] / 1e9 - wanted - 82) < 3


def test_an_older_server_that_says_nothing_of_levels_is_taken_over(
    file: Path, running: list[subprocess.Popen[str]]
) -> None:
    path = control.control_path(str(file)) or ""
    # Once it serves, it listens for this too.
    front = connect(file.parent / "one", running[0])
    front.up()
    front.close()
    with control.connect(path) as channel, Server(report=print) as server:
        channel.sendall(b'{"ask": "take-over"}\n')
        value, unpacked = handover.receive(channel)
        del value["clock"]
        for entry in (*value["exports"], *value["groups"].values()):
            del entry["level"]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fds = [unpacked.need(number) for number in range(len(unpacked._descriptors))]
            handover.send(ours, value, fds)
            for fd in fds:
                os.close(fd)
            taken = handover.take(server, theirs)
            assert [settings.name for settings, _, _ in taken.exports] == ["one", "two", "ram"]
            assert taken.levels.exports == taken.levels.groups == {}
            taken.unused.close()


def own_descriptors() -> int:
    """Those of this process, but for the workers' rings, which they make when they get to it."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += "io_uring" not in os.readlink(f"/proc/self/fd/{number}")
    return found


def spoil(value: object, rng: random.Random) -> None:
    """Replace one value somewhere inside."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))  # type: ignore
        if not keys:
            return
        key = rng.choice(keys)
        inner = value[key]  # type: ignore[index]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.9:
            value = inner
            continue
        wrong = [None, -1, 1 << 64, "x", [], {}, True, 3.5, 1 << 200, inner]
        value[key] = rng.choice(wrong)  # type: ignore[index]
        return
