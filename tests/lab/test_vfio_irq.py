"""Interrupts on real kernels: blocking, spinning, asyncio, loopback, one kind at a time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, PCI, bind_vfio, open_descriptors
from vfiotool.errors import Unsupported, UsageError
from vfiotool.vfio import Device

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")

RAISE, ACKNOWLEDGE = 0x60, 0x64


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    bind_vfio(EDU)
    with Device.open(EDU, backend=request.param) as opened:
        opened.set_bus_master(True)
        yield opened


def test_msi_wakes_a_blocked_wait(device: Device) -> None:
    bar = device.region(0).map()
    with device.irqs.msi() as interrupts:
        timer = threading.Timer(0.05, bar.write32, (RAISE, 1))
        timer.start()
        assert interrupts[0].wait(10.0) == 1
        bar.write32(ACKNOWLEDGE, 1)
        timer.join()


def test_a_wait_ends_at_its_deadline(device: Device) -> None:
    with device.irqs.msi() as interrupts:
        begin = time.monotonic()
        assert interrupts[0].wait(0.1) == 0
        assert interrupts[0].wait(0.0) == 0
        assert time.monotonic() - begin >= 0.1
        assert interrupts[0].wait(0.0, spin_s=0.001) == 0


def test_loopback_signals_without_the_device_and_firings_add_up(device: Device) -> None:
    with device.irqs.msi() as interrupts:
        for _ in range(5):
            interrupts[0].trigger()
        assert interrupts[0].wait(5.0) == 5
        assert interrupts[0].wait(0.0) == 0


def test_asyncio_iterates_over_firings_and_times_out(device: Device) -> None:
    bar = device.region(0).map()

    async def run() -> tuple[list[int], int]:
        counts = []
        with device.irqs.msi() as interrupts:
            quiet = await interrupts[0].wait_async(0.02)
            bar.write32(RAISE, 1)
            async for count in interrupts[0]:
                bar.write32(ACKNOWLEDGE, 1)
                counts.append(count)
                if len(counts) == 3:
                    break
                bar.write32(RAISE, 1)
        return counts, quiet

    assert asyncio.run(run()) == ([1, 1, 1], 0)


def test_intx_is_masked_when_it_fires_and_unmasked_by_hand_and_by_eventfd(
    device: Device,
) -> None:
    bar = device.region(0).map()
    pin = device.irqs.intx()
    for _ in range(2):
        bar.write32(RAISE, 1)
        assert pin.wait(5.0) == 1
        assert pin.wait(0.05) == 0
        bar.write32(ACKNOWLEDGE, 1)
        pin.unmask()
    pin.mask()
    bar.write32(RAISE, 1)
    assert pin.wait(0.05) == 0
    pin.unmask()
    assert pin.wait(5.0) == 1
    bar.write32(ACKNOWLEDGE, 1)
    descriptor = pin.owner.unmask_by_eventfd()
    with open(descriptor, "wb", buffering=0, closefd=False) as unmask:
        unmask.write((1).to_bytes(8, "little"))
    bar.write32(RAISE, 1)
    assert pin.wait(5.0) == 1
    bar.write32(ACKNOWLEDGE, 1)


def test_kinds_exclude_each_other_and_follow_each_other(device: Device) -> None:
    bar = device.region(0).map()
    before = open_descriptors()
    for _ in range(3):
        with device.irqs.msi() as interrupts:
            with pytest.raises(UsageError, match="one kind at a time"):
                device.irqs.intx()
            with pytest.raises(UsageError, match="one kind at a time"):
                device.irqs.msi()
            bar.write32(RAISE, 1)
            assert interrupts[0].wait(5.0) == 1
            bar.write32(ACKNOWLEDGE, 1)
        with device.irqs.enable(0, 1) as pins:
            bar.write32(RAISE, 1)
            assert pins[0].wait(5.0) == 1
            bar.write32(ACKNOWLEDGE, 1)
    assert open_descriptors() == before


def test_the_kernel_s_request_stands_beside_the_others(device: Device) -> None:
    request = device.irqs.request()
    with device.irqs.msi():
        request.trigger()
        assert request.wait(5.0) == 1


def test_the_kernel_asks_for_the_device_back_and_waits_until_it_is_closed(device: Device) -> None:
    request = device.irqs.request()
    assert request.wait(0.0) == 0
    writer = f"open('/sys/bus/pci/devices/{EDU}/driver/unbind', 'w').write('{EDU}')"
    with subprocess.Popen([sys.executable, "-c", writer]) as unbinding:
        assert request.wait(30.0) >= 1
        assert unbinding.poll() is None
        # Still ours: nothing is torn away.
        assert device.region(0).read32(0) == 0x010000ED
        device.close()
        assert unbinding.wait(30.0) == 0
    assert not (PCI / EDU / "driver").exists()
    bind_vfio(EDU)
    with Device.open(EDU, backend=device.backend) as again:
        assert again.region(0).read32(0) == 0x010000ED


def test_what_the_device_has_not_is_unsupported(device: Device) -> None:
    for enable in (device.irqs.msix, device.irqs.error):
        with pytest.raises(Unsupported, match="has no"):
            enable()
    with device.irqs.msi() as interrupts:
        with pytest.raises(Unsupported, match="cannot be masked"):
            interrupts[0].mask()
        with pytest.raises(UsageError, match="has 1 msi"):
            interrupts.add()
        interrupts[0].trigger()
        assert interrupts[0].wait(5.0) == 1
