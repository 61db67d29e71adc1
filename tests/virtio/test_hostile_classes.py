"""Hostile front ends against every device class in Python, beside an honest one and before it.

A disk, a source of random numbers and a console have one driver at a time: the honest one comes up
every 50 connections, is attacked by messages from beside, and goes again. The network's hostile
port has two honest machines beside it throughout, which hear each other.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA, Frontend
from tests.virtio.hostile import KINDS, attack
from tests.virtio.test_hostile import assert_flat, descriptors, resident_kib
from tests.virtio.test_net import ALL, Machine, ethernet
from tests.virtio.test_serve import connect

pytestmark = pytest.mark.slow

HUNDRED_THOUSAND = 100_000
EACH, BESIDE, WARM = 50, 5, 1000
CLASSES = {
    "vfiotool.virtio.storage:MemoryStorage": 1,
    "vfiotool.virtio.entropy:EntropySource": 1,
    "vfiotool.virtio.console:Console": 2,
    "net": 2,
}
NEIGHBOURS = ("one", "two")


def command(name: str, path: Path) -> list[str]:
    line = [sys.executable, "-m", "vfiotool", "serve"]
    if name != "net":
        return [*line, "vhost-user", name, "--socket-path", str(path)]
    line.append("vhost-user-net")
    for port in (path, *(path.with_name(neighbour) for neighbour in NEIGHBOURS)):
        line += ["--socket-path", str(port)]
    return line


def answers(front: Frontend, name: str) -> None:
    """The device does what it is for."""
    ring = front.rings[-1]
    if "Storage" in name:
        assert front.write(3, b"honest".ljust(512, b"\0")) == 0
        assert front.read(3, 512) == b"honest".ljust(512, b"\0")
        return
    written = "Entropy" in name
    front.memory[DATA : DATA + 64] = bytes(64)
    front.put(ring, 0, [(DATA, 64, written)])
    front.add(ring, 0)
    assert front.wait(ring) == [(0, 64 if written else 0)]
    assert any(front.memory[DATA : DATA + 64]) == written


def tell(sender: Machine, listener: Machine, number: int) -> None:
    """A frame of one honest machine is heard by the other, among whatever the hostile one sends."""
    frame = ethernet(ALL, b"\x52\x54\0\0\0\1", b"honest %d" % number)
    sender.transmit(frame)
    while listener.hear()[1] != frame:
        pass


@contextmanager
def honest(name: str, path: Path) -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """A function of the connection's number and of what is done beside the honest driver."""
    with ExitStack() as stack:
        machines = []
        for neighbour in NEIGHBOURS if name == "net" else ():
            machine = Machine(str(path.with_name(neighbour)), queues=2)
            stack.callback(machine.close)
            machine.prepare()
            machines.append(machine)

        def check(number: int, beside: Callable[[], None]) -> None:
            if machines:
                tell(*machines, number)
            front = Frontend(str(path), queues=CLASSES[name])
            front.up()
            answers(front, name)
            beside()
            answers(front, name)
            front.close()

        yield check


def bombard(tmp_path: Path, name: str, count: int, seed: int) -> None:
    """`count` hostile connections; an honest driver is answered beside them and in between."""
    path, rng, queues = tmp_path / "device.sock", random.Random(seed), CLASSES[name]
    sent = before = settled = number = 0

    def hostile() -> None:
        nonlocal sent, number
        sent += attack(str(path), rng, queues, number)
        number += 1

    def beside() -> None:
        for _ in range(BESIDE):
            hostile()

    with (tmp_path / "said").open("w") as said:
        server = subprocess.Popen(command(name, path), stderr=said)
    began = time.monotonic()
    try:
        for port in (path, *(path.with_name(n) for n in NEIGHBOURS if name == "net")):
            connect(port, server).close()
        with honest(name, path) as check:
            while number < count:
                hostile()
                if number % EACH == 0:
                    check(number, beside)
                if number >= WARM and not settled:
                    before, settled = descriptors(server.pid), resident_kib(server.pid)
            check(number, beside)
            assert server.poll() is None
            if settled:
                took = time.monotonic() - began
                print(f"{name}: {number} connections, {sent} messages and rings, {took:.0f} s,")
                assert_flat(server.pid, before, settled)
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert server.returncode == 0
    assert "Traceback" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_hostile_front_ends_take_no_device_class_down(tmp_path: Path, name: str) -> None:
    bombard(tmp_path, name, 10 * len(KINDS), seed=3)


@pytest.mark.proof
@pytest.mark.parametrize("name", CLASSES)
def test_a_hundred_thousand_hostile_connections(tmp_path: Path, name: str) -> None:
    bombard(tmp_path, name, int(os.environ.get("VFIOTOOL_HOSTILE", HUNDRED_THOUSAND)), seed=4)
