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


def test_every_thread_that_waits_for_one_interrupt_is_woken(device: Device) -> None:
    with device.irqs.msi() as interrupts:
        got: list[int] = []
        threads = [
            threading.Thread(target=lambda: got.append(interrupts[0].wait(20.0))) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        until_blocked(threads)
        interrupts[0].trigger()
        for thread in threads:
            thread.join(20.0)
        assert got == [1] * 5
        assert interrupts[0].wait(0.0) == 0


def until_blocked(threads: list[threading.Thread]) -> None:
    deadline = time.monotonic() + 10
    for thread in threads:
        while time.monotonic() < deadline:
            with open(f"/proc/self/task/{thread.native_id}/wchan") as wchan:
                if "poll" in wchan.read():
                    break


def test_tasks_and_threads_that_wait_together_are_all_woken(device: Device) -> None:
    with device.irqs.msi() as interrupts:
        got: list[int] = []
        thread = threading.Thread(target=lambda: got.append(interrupts[0].wait(20.0)))
        thread.start()
        until_blocked([thread])

        async def main() -> list[int]:
            tasks = [asyncio.create_task(interrupts[0].wait_async(None)) for _ in range(3)]
            await asyncio.sleep(0)
            interrupts[0].trigger()
            return await asyncio.wait_for(asyncio.gather(*tasks), 20)

        assert asyncio.run(main()) == [1, 1, 1]
        thread.join(20.0)
        assert got == [1]


@pytest.mark.parametrize("from_thread", [False, True], ids=["same thread", "another thread"])
def test_closing_ends_every_task_that_waits(device: Device, from_thread: bool) -> None:
    before = open_descriptors()

    async def main() -> None:
        interrupts = device.irqs.msi()
        seen: list[int] = []

        async def iterate() -> str:
            async for count in interrupts[0]:
                seen.append(count)
            return "ended"

        tasks = [asyncio.create_task(iterate())]
        tasks += [asyncio.create_task(interrupts[0].wait_async(None)) for _ in range(2)]
        cancelled = asyncio.create_task(interrupts[0].wait_async(float("inf")))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        if from_thread:
            await asyncio.to_thread(interrupts.close)
        else:
            interrupts.close()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert done[0] == "ended"
        assert all(isinstance(one, UsageError) for one in done[1:])
        assert cancelled.cancelled()
        with pytest.raises(UsageError, match="is off"):
            await interrupts[0].wait_async(1.0)

    asyncio.run(main())
    assert open_descriptors() == before


def test_closing_ends_every_thread_that_waits(device: Device) -> None:
    interrupts = device.irqs.msi()
    said: list[str] = []

    def wait() -> None:
        try:
            interrupts[0].wait(None)
        except UsageError as error:
            said.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    until_blocked(threads)
    interrupts.close()
    for thread in threads:
        thread.join(20.0)
    assert len(said) == 4


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e30, None, -1, 0, -1e30, "1"])
def test_odd_time_outs_mean_what_they_say(device: Device, timeout_s: float | None) -> None:
    bar = device.region(0).map()
    for registers in (bar, device.region(0)):
        assert registers.poll(0, 0xFFFFFFFF, 0x010000ED, timeout_s) == 0x010000ED
    with device.irqs.msi() as interrupts:
        if isinstance(timeout_s, str):
            return
        interrupts[0].trigger()
        assert interrupts[0].wait(timeout_s) == 1
        interrupts[0].trigger()
        assert asyncio.run(interrupts[0].wait_async(timeout_s)) == 1
        if timeout_s is not None and timeout_s <= 0:
            assert interrupts[0].wait(timeout_s) == 0
            with pytest.raises(TimeoutError):
                bar.poll(0, 1, 0, timeout_s)


def test_a_time_out_that_is_not_a_number_is_refused(device: Device) -> None:
    bar = device.region(0).map()
    for wrong in (float("nan"), "soon"):
        for registers in (bar, device.region(0)):
            with pytest.raises(UsageError):
                registers.poll(0, 1, 1, wrong)  # type: ignore[arg-type]
    for mask, wanted in ((1 << 64, 0), (1 << 32, 0), (-1, 0), (1, 1 << 40)):
        for registers in (bar, device.region(0)):
            with pytest.raises(UsageError, match="does not fit"):
                registers.poll(0, mask, wanted, 0.1)
    with device.irqs.msi() as interrupts:
        with pytest.raises(UsageError):
            interrupts[0].wait(float("nan"))
        with pytest.raises(UsageError):
            asyncio.run(interrupts[0].wait_async(float("nan")))
