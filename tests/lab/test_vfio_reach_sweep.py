"""Every write to COMMAND, PMCSR, Device Control and MSI-X control, in every width and by every
method, each followed by every kind of access: an answer or an error, never a bus error. Other
threads access all the while.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.lab.test_vfio_msix import spare_nvme
from tests.lab.test_vfio_reach import COMMAND, MEMORY, VERSION, accesses, capability, works
from tests.lab.vfio_guest import BACKENDS, bind_vfio
from vfiotool.errors import KernelError, UsageError, VfiotoolError
from vfiotool.vfio import FEATURE_PROBE, FEATURE_SET, Device, Mapping

MACHINE = "storage"
KERNELS = ("6.1", "6.12", "iommufd")

D3HOT = 3
FLR = 0x8000
LONGEST = 8


@dataclass(frozen=True)
class Written:
    """A register of two bytes at `place`, and the values that it is given."""

    name: str
    place: int
    values: tuple[int, ...]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    address = spare_nvme()
    bind_vfio(address)
    with Device.open(address, backend=request.param) as opened:
        yield opened


def registers(device: Device) -> list[Written]:
    power = capability(device, 1) + 4
    control = capability(device, 0x10) + 8
    vectors = capability(device, 0x11) + 2
    config = device.config
    rest = config.read16(power) & ~3
    express = config.read16(control)
    # I/O, memory and bus master, with and without INTx disable.
    commands = tuple(low | high for low in range(8) for high in (0, 0x400))
    return [
        Written("COMMAND", COMMAND, commands),
        Written("PMCSR", power, (rest | 1, rest | 2, rest | 3, rest | 0x103, rest)),
        Written("Device Control", control, (express | FLR, express & ~0xE0, express)),
        Written("MSI-X control", vectors, (0x8000, 0xC000, 0x4000, 0xFFFF, 0)),
    ]


def ways(device: Device, register: Written, value: int) -> Iterator[Callable[[], object]]:
    """Each way to write `value`, whole and in part, alone and with what stands around it."""
    config, place = device.config, register.place
    raw = value.to_bytes(2, "little")
    yield lambda: config.write8(place, raw[0])
    yield lambda: config.write8(place + 1, raw[1])
    yield lambda: config.write16(place, value)
    for start in range(place - LONGEST + 1, place + 2):
        for length in (1, 2, 3, 4, LONGEST):
            if start < 0 or start + length <= place:
                continue
            yield lambda start=start, length=length: _around(device, start, length, place, raw)


def _around(device: Device, start: int, length: int, place: int, raw: bytes) -> None:
    """`raw` at `place` as far as it lies within `length` bytes at `start`; the rest as it is."""
    config = device.config
    data = bytearray(config.read_bytes(start, length))
    for n, one in enumerate(raw):
        if start <= place + n < start + length:
            data[place + n - start] = one
    if length in (4, LONGEST) and start % length == 0:
        write = config.write32 if length == 4 else config.write64
        write(start, int.from_bytes(data, "little"))
    config.write_bytes(start, memoryview(data) if start % 2 else bytes(data))


def more_accesses(device: Device, bar: Mapping) -> dict[str, Callable[[], object]]:
    return {
        **accesses(device, bar),
        "read_many": lambda: bar.read_many(VERSION, 2),
        "read32_many": lambda: bar.read32_many(VERSION, 1),
        "kernel read": lambda: device.region(0).read32(VERSION),
        "kernel write": lambda: device.region(0).write32(VERSION, 0),
    }


def problems(device: Device, bar: Mapping) -> list[str]:
    """What does not go together: what the registers say, and what became of each access."""
    command = device.config.read16(COMMAND)
    state = device.config.read16(capability(device, 1) + 4) & 3
    reachable = bool(command & MEMORY) and state != D3HOT
    found = []
    if (device.unreachable is None) != reachable:
        found.append(f"COMMAND {command:#x}, D{state}: said to be {device.unreachable}")
    for name, access in more_accesses(device, bar).items():
        try:
            access()
            refused = False
        except UsageError:
            refused = True
        except KernelError as error:
            # A poll for what does not come; a read by the kernel of what does not decode.
            refused = error.errno_name == "EIO"
            if error.errno_name not in ("ETIMEDOUT", "EIO"):
                found.append(f"{name}: {error}")
        if refused == reachable and not name.startswith("kernel"):
            found.append(f"{name} was {'refused' if refused else 'done'}: {device.unreachable}")
    return found


def awake(device: Device, bar: Mapping) -> None:
    power = capability(device, 1) + 4
    device.config.write16(power, device.config.read16(power) & ~3)
    device.set_memory_decode(True)
    works(device, bar)


@pytest.mark.parametrize("number", range(4))
def test_every_write_in_every_width_then_every_access(device: Device, number: int) -> None:
    bar = device.region(0).map()
    register = registers(device)[number]
    stop, wrong = threading.Event(), []

    def access() -> None:
        while not stop.is_set():
            for work in more_accesses(device, bar).values():
                try:
                    work()
                except UsageError:
                    pass
                except KernelError as error:
                    if error.errno_name not in ("ETIMEDOUT", "EIO"):
                        wrong.append(error)

    thread = threading.Thread(target=access)
    thread.start()
    count = 0
    try:
        for value in register.values:
            for way in ways(device, register, value):
                count += 1
                try:
                    way()
                except VfiotoolError as error:
                    pytest.fail(f"{register.name} := {value:#x} was refused: {error}")
                assert problems(device, bar) == [], (register.name, hex(value), count)
                if device.unreachable is not None:
                    awake(device, bar)
    finally:
        stop.set()
        thread.join(60)
    assert wrong == [] and count > 50
    awake(device, bar)


def test_the_feature_that_lets_it_sleep_is_low_power_however_it_is_set(device: Device) -> None:
    if not device.features()["low-power-entry"]:
        pytest.skip("this kernel has no low power feature for VFIO devices")
    bar = device.region(0).map()
    entry, wakeup, leave = 3, 4, 5
    for number, operation in ((entry, FEATURE_SET), (entry | FEATURE_SET, 0)):
        device.feature(number, operation)
        for access in accesses(device, bar).values():
            with pytest.raises(UsageError, match="may sleep"):
                access()
        device.feature(leave, FEATURE_SET)
        works(device, bar)
    device.feature(entry, FEATURE_SET | FEATURE_PROBE)
    works(device, bar)
    with device.irqs.msix(1) as interrupts:
        try:
            device.feature(wakeup, FEATURE_SET, interrupts[0].fileno().to_bytes(4, "little") * 2)
        except VfiotoolError:
            works(device, bar)
        else:
            with pytest.raises(UsageError, match="may sleep"):
                bar.read32(VERSION)
            device.low_power(False)
            works(device, bar)


def test_what_belongs_to_this_process_is_not_pickled_and_says_why(device: Device) -> None:
    bar, buffer = device.region(0).map(), device.dma.alloc(4096)
    with device.irqs.msix(1) as interrupts:
        for thing in (
            device,
            device.region(0),
            bar,
            buffer,
            device.space,
            interrupts[0],
            device.dma,
        ):
            with pytest.raises(TypeError, match="by its name in the process that drives it"):
                pickle.dumps(thing)
