"""A tap interface as a port of the switch, in a network namespace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vfiotool.host.paths import DEV_TUN

SCRIPT = """
import asyncio, json, socket, subprocess, time
from vfiotool.virtio.frames import Frame
from vfiotool.virtio.net import Switch
from vfiotool.virtio.tap import TapPort

class Machine:
    def __init__(self):
        self.heard = []
    def deliver(self, frame):
        self.heard.append(frame.data)

async def until(holds):
    for _ in range(2000):
        if holds():
            return True
        await asyncio.sleep(0.01)
    return False

async def main():
    said, machine = [], Machine()
    switch = Switch(asyncio.get_running_loop().time)
    port = TapPort("tap-test", switch, said.append)
    switch.add(machine)
    subprocess.run(["ip", "link", "set", "tap-test", "up"], check=True)
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    wire.bind(("tap-test", 0))
    wire.setblocking(False)
    frame = b"\\xff" * 6 + b"\\x52\\x54\\0\\0\\0\\1" + b"\\x88\\xb5" + bytes(50)
    wire.send(frame)
    there = await until(lambda: frame in machine.heard)
    back = frame[6:12] + b"\\x52\\x54\\0\\0\\0\\2" + frame[12:]
    switch.forward(machine, Frame(back))
    def took():
        try:
            return wire.recv(2048) == back
        except BlockingIOError:
            return False
    here = await until(took)
    subprocess.run(["ip", "link", "delete", "tap-test"], check=True)
    gone = await until(lambda: said)
    began = time.process_time()
    await asyncio.sleep(0.5)
    busy = time.process_time() - began
    before = port.dropped
    switch.forward(machine, Frame(b"\\xff" * 6 + frame[6:]))
    left = len(said)
    port.close()
    print(json.dumps([there, here, gone, left, port.dropped - before, busy, said]))

asyncio.run(main())
"""


def namespace_of_ones_own() -> list[str]:
    line = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    try:
        done = subprocess.run([*line, "test", "-w", DEV_TUN], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode:
        pytest.skip("no tap interface can be made in a namespace here")
    return line


def test_a_tap_passes_frames_and_one_that_is_deleted_is_said_once() -> None:
    line = [*namespace_of_ones_own(), sys.executable, "-c", SCRIPT]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    there, here, gone, left, dropped, busy, said = json.loads(done.stdout)
    assert there and here and gone
    assert (left, dropped) == (1, 1)
    # A descriptor that stays ready would take all of half a second.
    assert busy < 0.1
    assert said[0].startswith("the tap interface tap-test is gone: ")
