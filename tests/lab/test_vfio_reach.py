"""A device that cannot be reached: every way into it and out of it, each followed by every kind of
access, none of which may be a bus error. On an NVMe controller, which has D3hot, FLR and MSI-X."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.lab.test_vfio_msix import spare_nvme
from tests.lab.vfio_guest import BACKENDS, bind_vfio
from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio import Device, Mapping, find, open_space

MACHINE = "storage"
KERNELS = ("6.1", "6.12", "iommufd")

VERSION = 0x08
COMMAND, MEMORY = 4, 2


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    address = spare_nvme()
    bind_vfio(address)
    with Device.open(address, backend=request.param) as opened:
        yield opened


def capability(device: Device, wanted: int) -> int:
    place = device.config.read8(0x34)
    for _ in range(48):
        if device.config.read8(place) == wanted:
            return place
        place = device.config.read8(place + 1)
    raise AssertionError(f"no capability {wanted:#x}")


def accesses(device: Device, bar: Mapping) -> dict[str, Callable[[], object]]:
    return {
        "read8": lambda: bar.read8(VERSION),
        "read16": lambda: bar.read16(VERSION),
        "read32": lambda: bar.read32(VERSION),
        "read64": lambda: bar.read64(VERSION),
        "write32": lambda: bar.write32(VERSION, 0),
        "write64": lambda: bar.write64(VERSION, 0),
        "read_into": lambda: bar.read_into(VERSION, bytearray(8)),
        "write_from": lambda: bar.write_from(VERSION, bytes(8)),
        "poll": lambda: bar.poll(VERSION, 0xFFFFFFFF, 1, 0.001),
        "address": lambda: bar.address(VERSION, 4),
        "map": lambda: device.region("bar0").map().close(),
        "check and read": lambda: (bar.check(), bar.read32(VERSION)),
    }


def refused_by_all(device: Device, bar: Mapping, reason: str) -> None:
    for name, access in accesses(device, bar).items():
        with pytest.raises(UsageError, match=reason):
            access()
            pytest.fail(f"{name} was not refused")
    assert reason.split(" ")[0] in str(device.unreachable)
    assert reason.split(" ")[0] in repr(bar)


def works(device: Device, bar: Mapping) -> None:
    assert bar.read32(VERSION) >> 16 in (1, 2)
    assert bar.poll(VERSION, 0, 0, 1) >> 16 in (1, 2)
    with device.region(0).map() as another:
        assert another.read32(VERSION) == bar.read32(VERSION)
    assert device.unreachable is None


def command_off(device: Device) -> dict[str, Callable[[], object]]:
    config, rest = device.config, device.command & ~MEMORY
    low = bytes([rest & 0xFF])
    return {
        "write8": lambda: config.write8(COMMAND, rest & 0xFF),
        "write16": lambda: config.write16(COMMAND, rest),
        "write32": lambda: config.write32(COMMAND, rest),
        "write_bytes 1": lambda: config.write_bytes(COMMAND, low),
        "write_bytes 2": lambda: config.write_bytes(COMMAND, rest.to_bytes(2, "little")),
        "write_bytes from before": lambda: config.write_bytes(COMMAND - 1, b"\0" + low),
        "write_bytes around": lambda: config.write_bytes(
            0, config.read_bytes(0, 4) + rest.to_bytes(4, "little")
        ),
        "a memoryview": lambda: config.write_bytes(COMMAND, memoryview(low)),
        "set_memory_decode": lambda: device.set_memory_decode(False),
    }


def test_memory_decode_off_in_every_width_and_by_every_method(device: Device) -> None:
    bar = device.region(0).map()
    for name in command_off(device):
        command_off(device)[name]()
        assert not device.memory_decode, name
        refused_by_all(device, bar, "the device does not decode memory")
        device.config.write8(COMMAND, device.command & 0xFF | MEMORY)
        works(device, bar)


def test_d3hot_in_every_width_and_by_every_method(device: Device) -> None:
    bar = device.region(0).map()
    place = capability(device, 1) + 4
    config = device.config

    def ways() -> dict[str, Callable[[], object]]:
        now = config.read16(place) & ~3 | 3
        return {
            "write8": lambda: config.write8(place, now & 0xFF),
            "write16": lambda: config.write16(place, now),
            "write32": lambda: config.write32(place, now),
            "write_bytes": lambda: config.write_bytes(place, now.to_bytes(2, "little")),
            "write_bytes around": lambda: config.write_bytes(
                place - 4, config.read_bytes(place - 4, 4) + now.to_bytes(4, "little")
            ),
        }

    for name in ways():
        ways()[name]()
        assert config.read16(place) & 3 == 3, name
        refused_by_all(device, bar, "the device is in D3hot")
        # Memory decode does not help it.
        device.set_memory_decode(True)
        refused_by_all(device, bar, "the device is in D3hot")
        config.write16(place, config.read16(place) & ~3)
        device.set_memory_decode(True)
        works(device, bar)


def test_d1_and_d2_are_not_below_d3hot_and_a_reset_wakes(device: Device) -> None:
    bar = device.region(0).map()
    place = capability(device, 1) + 4
    device.config.write16(place, device.config.read16(place) & ~3 | 3)
    assert device.unreachable is not None
    device.reset()
    device.config.write16(place, device.config.read16(place) & ~3)
    device.set_memory_decode(True)
    works(device, bar)


def test_a_sleeping_device_is_refused_whatever_else_is_written(device: Device) -> None:
    if not device.features()["low-power-entry"]:
        pytest.skip("this kernel has no low power feature for VFIO devices")
    bar = device.region(0).map()
    device.low_power(True)
    refused_by_all(device, bar, "the device may sleep")
    device.config.write16(COMMAND, device.command & ~MEMORY)
    device.config.write16(COMMAND, device.command | MEMORY)
    assert device.region(0).read32(VERSION) >> 16 in (1, 2)
    refused_by_all(device, bar, "the device may sleep")
    device.low_power(False)
    works(device, bar)


def test_a_function_reset_by_configuration_space_leaves_all_usable(device: Device) -> None:
    bar = device.region(0).map()
    control = capability(device, 0x10) + 8
    config = device.config
    with device.irqs.msix(1) as interrupts:
        for way in (
            lambda: config.write8(control + 1, config.read8(control + 1) | 0x80),
            lambda: config.write16(control, config.read16(control) | 0x8000),
            lambda: config.write32(control, config.read16(control) | 0x8000),
            lambda: config.write_bytes(
                control, (config.read16(control) | 0x8000).to_bytes(2, "little")
            ),
        ):
            bar.write32(0x14, 0x460000)
            way()
            works(device, bar)
            assert bar.read32(0x14) == 0, "it was not reset"
            interrupts[0].trigger()
            assert interrupts[0].wait(5.0) == 1


def test_msix_control_is_written_in_every_width_without_harm(device: Device) -> None:
    bar = device.region(0).map()
    control = capability(device, 0x11) + 2
    config = device.config
    for value in (0x8000, 0xC000, 0x0000):
        config.write8(control + 1, value >> 8)
        works(device, bar)
        config.write16(control, value)
        works(device, bar)
        config.write_bytes(
            control - 2, config.read_bytes(control - 2, 2) + value.to_bytes(2, "little")
        )
        works(device, bar)


@pytest.mark.parametrize("way", ["decode", "power", "reset", "low power", "close"])
def test_a_poll_that_runs_in_c_ends_when_the_device_goes_out_of_reach(
    device: Device, way: str
) -> None:
    bar = device.region(0).map()
    said: list[BaseException] = []

    def poll() -> None:
        try:
            bar.poll(VERSION, 0xFFFFFFFF, 1, None)
        except BaseException as error:
            said.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    while not bar.polling:
        time.sleep(0)
    place = capability(device, 1) + 4
    if way == "decode":
        device.set_memory_decode(False)
    elif way == "power":
        device.config.write16(place, device.config.read16(place) & ~3 | 3)
    elif way == "reset":
        device.reset()
    elif way == "low power":
        if device.features()["low-power-entry"]:
            device.low_power(True)
        else:
            bar.close()
    else:
        device.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(said[0], UsageError), said


def test_threads_that_switch_and_access_at_random_never_crash(device: Device) -> None:
    """What a mapped access does while decode, power and resets change under it: an answer or
    UsageError."""
    bar = device.region(0).map()
    place = capability(device, 1) + 4
    stop = threading.Event()
    wrong: list[BaseException] = []

    def access() -> None:
        while not stop.is_set():
            for work in list(accesses(device, bar).values()):
                try:
                    work()
                except UsageError:
                    pass
                except KernelError as error:
                    if error.errno_name != "ETIMEDOUT":
                        wrong.append(error)
                except BaseException as error:
                    wrong.append(error)

    threads = [threading.Thread(target=access) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round_ in range(60):
        device.set_memory_decode(False)
        device.set_memory_decode(True)
        if round_ % 20 == 0:
            device.config.write16(place, device.config.read16(place) & ~3 | 3)
            device.config.write16(place, device.config.read16(place) & ~3)
            device.set_memory_decode(True)
        if round_ % 30 == 0:
            device.reset()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    works(device, bar)


def test_a_device_opens_once_in_a_process_whatever_the_backend_and_space(device: Device) -> None:
    for backend in BACKENDS:
        with pytest.raises(KernelError, match="open in this process already") as caught:
            Device.open(device.name, backend=backend)
        assert caught.value.errno_name == "EBUSY" and "close" in (caught.value.hint or "")
    with pytest.raises(KernelError, match="already"):
        Device.open(device.name, space=device.space)
    with (
        contextlib.closing(
            open_space(find(device.name, device.space.host), device.backend)
        ) as space,
        pytest.raises(KernelError, match="already"),
    ):
        Device.open(device.name, space=space)
    bar = device.region(0).map()
    works(device, bar)
    backend, name = device.backend, device.name
    device.close()
    with Device.open(name, backend=backend) as again:
        works(again, again.region(0).map())


def test_objects_tell_device_and_state(device: Device) -> None:
    bar = device.region("bar0").map()
    buffer = device.dma.alloc(4096)
    interrupts = device.irqs.msix(1)
    things = (device, device.region(0), bar, buffer, interrupts, interrupts[0], device.irqs)
    for thing in things:
        assert device.name in repr(thing), repr(thing)
    assert device.region("config") is device.config
    assert device.class_code == 0x010802
    assert (device.vendor, device.device) == (
        device.config.read16(0),
        device.config.read16(2),
    )
    with pytest.raises(UsageError, match="no region called"):
        device.region("bar9")
    device.close()
    for thing in (device, bar, buffer, interrupts, interrupts[0]):
        assert "closed" in repr(thing) or "off" in repr(thing), repr(thing)
