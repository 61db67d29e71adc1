"""Many cycles leave nothing behind, and a driver killed in mid-DMA leaves the device usable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vfio_guest import BACKENDS, EDU, bind_vfio

from vfiotool.drivers.edu import ADDRESS_BITS, Edu
from vfiotool.vfio import Device

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

HERE = Path(__file__).resolve().parent
KILLS = 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_descriptors_pinned_memory_and_resident_size_come_back(backend: str) -> None:
    bind_vfio(EDU)
    command = [sys.executable, str(HERE / "soak_vfio.py"), "--backend", backend]
    command += ["--maps", "2000", "--interrupts", "300", "--opens", "50"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_driver_killed_in_mid_dma_leaves_the_device_usable(backend: str) -> None:
    bind_vfio(EDU)
    for _ in range(KILLS):
        kill_in_mid_dma(backend)


def kill_in_mid_dma(backend: str) -> None:
    """A child starts a transfer and is killed while it runs; then all is tried again."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        device = Device.open(EDU, backend=backend)
        edu = Edu(device)
        memory = device.dma.alloc(3 * 4096, limit_bits=ADDRESS_BITS)
        edu.registers.dma_source.write(0x40000)
        edu.registers.dma_destination.write(memory.iova + 4096)
        edu.registers.dma_count.write(4096)
        edu.registers.dma_command.set(run=1, to_memory=1)
        os.write(writer, b"r")
        while True:
            time.sleep(60)
    os.close(writer)
    assert os.read(reader, 1) == b"r"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Device.open(EDU, backend=backend) as device:
        assert not device.bus_master
        edu = Edu(device)
        # The killed driver's transfer ends of itself; nothing of it may reach our memory.
        memory = device.dma.alloc(3 * 4096, limit_bits=ADDRESS_BITS)
        memory.view[:] = b"\xc3" * memory.size
        edu.wait_idle()
        assert edu.interrupt.wait(0.0) == 0
        assert bytes(memory.view) == b"\xc3" * memory.size
        sent = os.urandom(4096)
        memory.view[4096:8192] = sent
        edu.dma(memory.iova + 4096, 0, 4096, to_memory=False)
        memory.view[4096:8192] = bytes(4096)
        edu.dma(memory.iova + 4096, 0, 4096, to_memory=True)
        assert bytes(memory.view) == b"\xc3" * 4096 + sent + b"\xc3" * 4096
