"""What a model's class declares wrongly, and what its own code does wrong: one error that names it,
and a server that goes on."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import Any

import pytest

from tests.models.served import opened, serving
from vfiotool.errors import KernelError, TimedOut, UsageError
from vfiotool.models import BarSpec, DmaFault, Model, reads, server, writes
from vfiotool.vfio import Area, Device, Register, RegisterMap


class Registers(RegisterMap):
    first = Register(0x0)
    second = Register(0x4)
    third = Register(0x8)
    last = Register(0x20, width=8)


def bars(*specs: BarSpec, **more: Any) -> dict[str, Any]:
    return {"bars": specs, **more}


PAGE = BarSpec(0, 4096)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"vendor": 0x12345}, "`vendor` is a number of 16 bits, not 0x12345"),
        ({"device": "11e8"}, "`device` is a number of 16 bits, not '11e8'"),
        ({"class_code": 1 << 24}, "`class_code`"),
        ({"revision": -1}, "`revision`"),
        ({"subsystem": (1,)}, "`subsystem` is two ids"),
        ({"bars": PAGE}, "`bars` is a tuple"),
        ({"bars": (4096,)}, "`bars` is a tuple"),
        (bars(PAGE, PAGE), "BAR 0 lies on BAR 0"),
        (bars(BarSpec(0, 4096, wide=True), BarSpec(1, 4096)), "BAR 1 lies on BAR 0"),
        (bars(BarSpec(0, 4)), "BAR 0 of 0x4 bytes"),
        (bars(BarSpec(0, 1 << 32)), "more where it is wide"),
        (bars(BarSpec(0, 1 << 40, wide=True)), "BAR 0 of 0x10000000000 bytes"),
        (bars(BarSpec(0, 32, registers=Registers)), "register last at 0x20 is not within BAR 0"),
        (bars(BarSpec(0, 8192, shared=(Area(0, 8192), Area(4096, 4096)))), "areas overlap"),
        (bars(PAGE, msi=3), "`msi` is 1, 2, 4, 8, 16 or 32 vectors, not 3"),
        (bars(PAGE, msix=-1), "`msix` is at most 2048"),
        (bars(PAGE, msix=2049), "`msix` is at most 2048"),
        ({"msix": 4}, "`msix_bar` is 0, and there is no such BAR"),
        (bars(PAGE, msix=4, msix_bar=2), "`msix_bar` is 2"),
        (bars(PAGE, msix=4, msix_offset=4), "`msix_offset` is a multiple of 8"),
        (bars(PAGE, msix=4, msix_offset="8"), "`msix_offset` is a multiple of 8, not '8'"),
        (bars(PAGE, msix=4, msix_offset=8192), "no room for 4 MSI-X vectors"),
        (bars(BarSpec(0, 4096, registers=Registers), msix=4), "lies over register first"),
    ],
)
def test_what_no_card_can_be_is_refused(declared: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        type("Odd", (Model,), declared)()


def test_a_handler_of_a_register_that_is_nowhere_is_refused() -> None:
    class Lost(Model):
        bars = (PAGE,)

        @reads(Registers.first)
        def value(self) -> int:
            return 1

    with pytest.raises(UsageError, match="Lost: value handles register first, which no BAR"):
        Lost()


class Faulty(Model):
    bars = (BarSpec(0, 4096, registers=Registers),)

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    @reads(Registers.first)
    def divide(self) -> int:
        return 1 // 0

    @writes(Registers.second)
    def reach(self, value: int) -> None:
        self.dma_read(value, 4)

    @reads(Registers.third)
    def text(self) -> int:
        return "three"  # type: ignore[return-value]

    @reads(Registers.last)
    def wait(self) -> int:
        self.go_on.wait()
        return 3


def test_what_a_handler_raises_is_an_error_of_its_access_and_the_device_goes_on() -> None:
    said: list[str] = []
    with serving(Faulty(), report=said.append) as served:
        with Device.open(served.name) as device:
            for _ in range(3):
                with pytest.raises(KernelError, match="EIO"):
                    device.region(0).read32(0)
            with pytest.raises(KernelError, match="EIO"):
                device.region(0).write32(4, 0x1000)
            with pytest.raises(KernelError, match="EIO"):
                device.region(0).read32(8)
            assert device.region(0).read32(0x10) == 0
        with Device.open(served.name) as device:
            assert device.vendor == 0x1234
    told = [line for line in said if "answered with EIO" in line]
    assert len(told) == 3, "once for each place"
    assert told[0].startswith("Faulty: ZeroDivisionError: integer division or modulo by zero (")
    assert "test_declaration.py:" in told[0] and ", divide)" in told[0]
    assert "DmaFault: " in told[1] and ", reach)" in told[1]
    assert "the handler that reads third gave str, not a number" in told[2]


def test_without_a_report_the_end_of_a_test_raises_it() -> None:
    def drive() -> None:
        with opened(Faulty()) as device, pytest.raises(KernelError):
            device.region(0).read32(0)

    with pytest.raises(ZeroDivisionError):
        drive()


def test_without_a_report_the_driver_s_error_carries_it() -> None:
    with pytest.raises(KernelError, match="EIO") as caught, opened(Faulty()) as device:
        device.set_bus_master(True)
        device.region(0).write32(4, 0x1000)
    (note,) = [note for note in caught.value.__notes__ if note.startswith("in the model")]
    assert "Faulty: DmaFault: 4 bytes at I/O address 0x1000" in note and ", reach)" in note


def test_a_handler_that_does_not_return_is_named_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "_LET_GO_S", 0.2)
    model = Faulty()

    def drive() -> None:
        with serving(model) as served, Device.open(served.name) as device:
            device.space._calls[served.name].channel.set_limit(0.2)  # type: ignore[attr-defined]
            device.region(0).read64(0x20)

    with pytest.raises(TimedOut) as caught:
        drive()
    assert "no reply to REGION_READ" in str(caught.value.__context__)
    assert "a handler has not returned for 0.2 s: test_declaration.py:" in caught.value.message
    assert caught.value.message.endswith(", wait")
    model.go_on.set()
    model.close()


def test_a_model_that_was_not_made_whole_is_refused() -> None:
    class Half(Model):
        def __init__(self) -> None:
            pass

    with (
        pytest.raises(UsageError, match=r"its __init__ does not call super\(\).__init__\(\)"),
        serving(Half()),
    ):
        pass


def test_of_servers_that_begin_at_once_one_serves() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, made = f"{folder}/s", []
        together = threading.Barrier(8)

        def begin() -> None:
            model = Faulty()
            together.wait()
            try:
                made.append(server.ModelServer(model, path))
            except KernelError:
                model.close()

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1 and os.listdir(folder) == ["s"]
        with made[0] as served, Device.open(served.name) as device:
            assert device.vendor == 0x1234
        assert os.listdir(folder) == []


def test_a_dma_fault_that_a_handler_takes_is_none_of_the_server_s() -> None:
    class Careful(Model):
        bars = (BarSpec(0, 4096, registers=Registers),)

        @writes(Registers.second)
        def reach(self, value: int) -> None:
            try:
                self.dma_read(value, 4)
            except DmaFault:
                self.set(Registers.first, 9)

    with opened(Careful()) as device:
        device.region(0).write32(4, 0x1000)
        assert device.region(0).read32(0) == 9


def test_what_an_author_says_of_a_bar_is_looked_at_where_it_is_said() -> None:
    for wrong in (
        {"index": "0"},
        {"size": 4096.0},
        {"size": None},
        {"registers": dict},
        {"registers": Register(0)},
        {"shared": Area(0, 4096)},
        {"shared": ((0, 4096),)},
    ):
        with pytest.raises(UsageError, match="BAR"):
            BarSpec(**{"index": 0, "size": 4096, **wrong})
    for mark in (reads, writes):
        for name in ("status", Registers, lambda self: 0):
            with pytest.raises(UsageError, match=f"{mark.__name__}.*a handler is of a register"):
                mark(name)


class Small(Model):
    bars = (BarSpec(0, 32),)
    msi = 2


def test_what_is_not_there_is_named_with_what_there_is() -> None:
    model = Small()
    for reach in (
        lambda: model.bar(3),
        lambda: model.get(Registers.first, bar=3),
        lambda: model.set(Registers.first, 1, bar=3),
        lambda: model.read(3, 0, 4),
        lambda: model.write(3, 0, 0, 4),
    ):
        with pytest.raises(UsageError, match="Small has no BAR 3; declared: 0"):
            reach()
    for reach in (lambda: model.get(Registers.last), lambda: model.set(Registers.last, 1)):
        with pytest.raises(UsageError, match="register last at 0x20 is not within BAR 0"):
            reach()
    for vector in (2, -1):
        with pytest.raises(UsageError, match=f"Small: vector {vector} of 2; 0 is the first"):
            model.interrupt(vector)
    with pytest.raises(UsageError, match="'hang' is not a fault of a reset"):
        model.faults.reset = "hang"  # type: ignore[assignment]
    model.close()


def test_a_vector_that_is_not_on_is_named_with_its_device_and_those_that_are() -> None:
    with opened(Small()) as device:
        irqs = device.irqs.msi(2)
        with pytest.raises(UsageError, match=r"msi 2 of vfio-user:.*: 2 of its 2 vectors are on"):
            irqs[2]
        assert [one.vector for one in irqs] == [0, 1] and irqs[-1].vector == 1
        assert irqs[1] in irqs and [one.vector for one in reversed(irqs)] == [1, 0]


def test_what_is_used_before_the_model_is_made_is_said() -> None:
    class Early(Model):
        bars = (BarSpec(0, 4096, registers=Registers),)

        def __init__(self, use: str) -> None:
            if use == "set":
                self.set(Registers.first, 1)
            getattr(self, use)
            super().__init__()

    for use in ("set", "lock", "faults", "config", "memory"):
        with pytest.raises(UsageError, match=r"Early: `.*` is used before super\(\).__init__"):
            Early(use)
    with pytest.raises(AttributeError, match="'Early' object has no attribute 'misspelt'"):
        Early("misspelt")
    assert not hasattr(Early("vendor"), "misspelt")


def test_only_an_instance_of_a_model_is_served() -> None:
    for wrong, said in ((Small, "the class Small"), ("card", "'card'"), (None, "None")):
        with pytest.raises(UsageError, match=f"{said} is not a model"):
            server.ModelServer(wrong, "/nowhere")  # type: ignore[arg-type]


@pytest.mark.parametrize("gave", [None, "7", 1.5])
def test_what_a_model_s_code_gives_for_a_read_is_a_number(gave: Any) -> None:
    class Silent(Model):
        bars = (BarSpec(0, 4096),)

        def read(self, bar: int, offset: int, width: int) -> int:
            return gave  # type: ignore[no-any-return]

    said: list[str] = []
    for model, giver in ((Silent(), "read"), (Small(), "faults.lie")):
        if giver == "faults.lie":
            model.faults.lie = lambda bar, _offset, _width, value: value if bar else gave
        with (
            serving(model, report=said.append) as served,
            Device.open(served.name) as device,
            pytest.raises(KernelError),
        ):
            device.region(0).read32(0)
        assert any(f"`{giver}` gave {type(gave).__name__}, not a number" in one for one in said)


def test_a_number_that_is_too_large_for_a_read_is_cut() -> None:
    class Large(Model):
        bars = (BarSpec(0, 4096),)

        def read(self, bar: int, offset: int, width: int) -> int:
            return -1 if offset else 0x1_2345_6789

    with opened(Large()) as device:
        assert device.region(0).read32(0) == 0x23456789
        assert device.region(0).read32(4) == 0xFFFFFFFF
