"""Many cycles leave nothing behind, and a driver killed in mid-DMA leaves the device usable."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, IommuFaults, bind_vfio
from vfiotool.drivers.edu import ADDRESS_BITS, BUFFER_START, Edu
from vfiotool.native import library as native
from vfiotool.vfio import Device

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

HERE = Path(__file__).resolve().parent
KILLS = 200
PAGE = 4096
CANARY = b"\xc3" * PAGE
# edu moves its data in one piece, 100 ms after it was told to.
TRANSFER_S = 0.1
MIDDLE = 0x800000


@pytest.mark.parametrize("backend", BACKENDS)
def test_descriptors_pinned_memory_and_resident_size_come_back(backend: str) -> None:
    bind_vfio(EDU)
    command = [sys.executable, str(HERE / "soak_vfio.py"), "--backend", backend]
    command += ["--maps", "20000", "--buffers", "2000", "--interrupts", "2000", "--opens", "200"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 4


def test_a_transfer_to_what_is_not_mapped_is_seen_as_a_fault() -> None:
    """The log that the next test reads would show one."""
    bind_vfio(EDU)
    faults = IommuFaults()
    assert faults.seen() == []
    with Device.open(EDU) as device:
        Edu(device).dma(0x400000, 0, 64, to_memory=True)
    assert any("00:01.0" in line and "0x400000" in line for line in faults.seen())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_driver_killed_in_mid_dma_leaves_the_device_usable(backend: str) -> None:
    bind_vfio(EDU)
    faults = IommuFaults()
    moments = random.Random(backend)
    inside = use_again(backend)
    in_the_middle = 0
    # Where the guest gets little of the machine, its sleep outlasts many a transfer.
    for turn in range(4 * KILLS):
        to_memory = bool(turn % 4)
        landed = kill_in_mid_dma(backend, to_memory, moments.uniform(0, TRANSFER_S), inside)
        in_the_middle += to_memory and not landed
        inside = use_again(backend)
        assert faults.seen() == []
        if turn + 1 >= KILLS and in_the_middle > KILLS // 2:
            break
    assert in_the_middle > KILLS // 2


def kill_in_mid_dma(backend: str, to_memory: bool, delay_s: float, inside: bytes) -> bool:
    """A child starts a transfer and is killed; whether what the device has inside had come before.

    The memory is shared, so that what the device writes to it is seen here when the child is dead.
    """
    memory = mmap.mmap(-1, 3 * PAGE)
    untouched = b"\x5a" * PAGE
    memory[:] = CANARY + untouched + CANARY
    child = start_transfer(backend, memory, to_memory)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    dead = memory[:]
    assert dead in (CANARY + untouched + CANARY, CANARY + inside + CANARY)
    assert to_memory or dead[PAGE : 2 * PAGE] == untouched
    # Only once the device is done with the transfer: it may not write to memory taken away.
    with Device.open(EDU, backend=backend) as device:
        Edu(device)
    assert memory[:] == dead
    memory.close()
    return dead[PAGE : 2 * PAGE] == inside


def start_transfer(backend: str, memory: mmap.mmap, to_memory: bool) -> int:
    """The process id of a child in whose middle page of `memory` a transfer is under way."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            edu = Edu(Device.open(EDU, backend=backend))
            address = native.address_of(memory) + PAGE
            edu.device.space.map(address, MIDDLE, PAGE, read=True, write=True)
            source, destination = (BUFFER_START, MIDDLE) if to_memory else (MIDDLE, BUFFER_START)
            edu.registers.dma_source.write(source)
            edu.registers.dma_destination.write(destination)
            edu.registers.dma_count.write(PAGE)
            edu.registers.dma_command.set(run=1, to_memory=int(to_memory))
            os.write(writer, b"r")
            while True:
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as ready:
        assert ready.read(1) == b"r"
    return child


def use_again(backend: str) -> bytes:
    """The device is quiet, opens, and moves data between canaries; what it has inside now."""
    with Device.open(EDU, backend=backend) as device:
        assert not device.bus_master
        edu = Edu(device)
        # The killed driver's transfer ends of itself; nothing of it may reach our memory.
        memory = device.dma.alloc(3 * PAGE, limit_bits=ADDRESS_BITS)
        memory.view[:] = CANARY * 3
        edu.wait_idle()
        assert edu.interrupt.wait(0.0) == 0
        assert bytes(memory.view) == CANARY * 3
        sent = os.urandom(PAGE)
        memory.view[PAGE : 2 * PAGE] = sent
        edu.dma(memory.iova + PAGE, 0, PAGE, to_memory=False)
        memory.view[PAGE : 2 * PAGE] = bytes(PAGE)
        edu.dma(memory.iova + PAGE, 0, PAGE, to_memory=True)
        assert bytes(memory.view) == CANARY + sent + CANARY
        return sent
