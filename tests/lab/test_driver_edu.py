"""The edu driver on QEMU's edu: every register class, DMA compared byte for byte, interrupts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import factorial

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, bind_vfio, open_descriptors
from vfiotool.cli.main import main
from vfiotool.drivers.edu import ADDRESS_BITS, BUFFER_SIZE, Edu
from vfiotool.errors import UsageError
from vfiotool.vfio import Device

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")
ALWAYS_ON = ("6.1", "iommufd")


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    bind_vfio(EDU)
    with Device.open(EDU, backend=request.param) as opened:
        assert opened.backend == request.param
        yield opened


def test_identification_liveness_and_factorial(device: Device) -> None:
    edu = Edu(device)
    assert edu.registers.identification.read() == 0x010000ED
    edu.registers.liveness.write(0x0F0F1234)
    assert edu.registers.liveness.read() == 0xF0F0EDCB
    assert [edu.factorial(n) for n in (0, 1, 5, 12)] == [factorial(n) for n in (0, 1, 5, 12)]
    assert edu.factorial(13) == factorial(13) % (1 << 32)


@pytest.mark.parametrize("count", [1, 7, 64, 4096])
def test_dma_moves_exactly_the_bytes_asked_for(device: Device, count: int) -> None:
    edu = Edu(device)
    with device.dma.alloc(3 * BUFFER_SIZE, limit_bits=ADDRESS_BITS) as memory:
        # Canaries on both sides of where the device writes.
        memory.view[:] = b"\xa5" * memory.size
        sent = os.urandom(count)
        memory.view[:count] = sent
        edu.dma(memory.iova, 0, count, to_memory=False)
        edu.dma(memory.iova + BUFFER_SIZE, 0, count, to_memory=True)
        got = bytes(memory.view)
        assert got[BUFFER_SIZE : BUFFER_SIZE + count] == sent
        assert got[:count] == sent
        assert set(got[count:BUFFER_SIZE] + got[BUFFER_SIZE + count :]) <= {0xA5}


def test_dma_buffers_stay_below_the_device_s_limit_and_off_the_msi_window(device: Device) -> None:
    below = [device.dma.alloc(1 << 20, limit_bits=ADDRESS_BITS) for _ in range(8)]
    above = device.dma.alloc(1 << 20)
    assert all(buffer.iova + buffer.size <= 1 << ADDRESS_BITS for buffer in below)
    for buffer in (*below, above):
        assert buffer.iova + buffer.size <= 0xFEE00000 or buffer.iova > 0xFEEFFFFF
    assert any(last < 0xFEE00000 for _, last in device.dma.iovas.ranges)


def test_one_msi_a_cause_and_none_more(device: Device) -> None:
    edu = Edu(device)
    for cause in (1, 0x8000_0000, 0x42):
        edu.registers.interrupt_raise.write(cause)
        assert edu.interrupt.wait(5.0) == 1
        assert edu.registers.interrupt_status.read() == cause
        edu.registers.interrupt_acknowledge.write(cause)
    assert edu.interrupt.wait(0.0) == 0


def test_transfers_out_of_bounds_are_refused_before_the_device_sees_them(device: Device) -> None:
    edu = Edu(device)
    with pytest.raises(UsageError, match="leave edu's buffer"):
        edu.dma(0x1000, 1, BUFFER_SIZE, to_memory=False)
    with pytest.raises(UsageError, match="28 bits"):
        edu.dma(1 << ADDRESS_BITS, 0, 16, to_memory=False)


def test_closing_leaves_bus_mastering_off_and_no_descriptor_open() -> None:
    bind_vfio(EDU)
    for backend in BACKENDS:
        before = open_descriptors()
        with Device.open(EDU, backend=backend) as device:
            Edu(device).factorial(3)
            device.dma.alloc(8192)
            assert device.bus_master
        assert open_descriptors() == before
        with Device.open(EDU, backend=backend) as device:
            assert not device.bus_master
            assert device.memory_decode


@pytest.mark.parametrize("backend", BACKENDS)
def test_demo_command_passes_and_says_so_in_json(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bind_vfio(EDU)
    # The driver is found by the device's ids.
    assert main(["demo", EDU, "--backend", backend, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["demo"] == "edu"
    assert main(["demo", "edu", EDU, "--backend", backend, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format_version"] == "1.0"
    assert told["backend"] == backend
    assert [check["name"] for check in told["checks"] if check["passed"]] == [
        "identification", "liveness", "factorial", "dma", "interrupt",
    ]  # fmt: skip
