"""Classes of devices that do wrong wherever the engine calls them: each fault is reported in words,
is at most its own front end's, and the next one is served."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest

from tests.virtio.frontend import DATA, Closed, Frontend
from tests.virtio.test_device import Echo, ask, connected, path, served
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.native.direct import QueueRequest
from vfiotool.virtio import host
from vfiotool.virtio.device import U8, Mac, VirtioConfig, VirtioDevice
from vfiotool.virtio.host import serve
from vfiotool.virtio.message import VhostRequest

__all__ = ["path"]


class Faulty(Echo):
    """An Echo of which one method fails as long as it is wrong."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__()
        self.method, self.error, self.wrong = method, error, True

    def fault(self, method: str) -> None:
        if self.wrong and method == self.method:
            raise self.error

    def started(self, queue: int) -> None:
        self.fault("started")

    def stopped(self, queue: int) -> None:
        self.fault("stopped")

    def driver_wrote(self, field: str) -> None:
        self.fault("driver_wrote")

    def failed(self, request: QueueRequest) -> None:
        self.fault("failed")
        super().failed(request)


def works(path: Path) -> None:
    """A front end that does nothing wrong is served."""
    with connected(path, queues=2) as front:
        front.up()
        for index in range(2):
            assert ask(front, b"x", 1, index) == (1, b"X")
        # And stops as it should.
        assert [front.stop(index) for index in range(2)] == [1, 1]


def use(front: Frontend) -> None:
    """All that a driver does, some of which may end its connection."""
    try:
        front.up()
        ask(front, b"fault", 5)
        volume = struct.pack("<III", 20, 1, 0) + b"\5"
        front.acknowledged(VhostRequest.SET_CONFIG, volume)
        front.stop(1)
        front.stop(0)
    except (Closed, AssertionError):
        pass


@pytest.mark.parametrize("method", ["started", "stopped", "driver_wrote", "failed"])
@pytest.mark.parametrize("error", [ValueError("a fault"), KeyError(), asyncio.CancelledError()])
def test_a_method_that_fails_costs_its_front_end_at_most(
    path: Path, method: str, error: BaseException
) -> None:
    device = Faulty(method, error)
    with served(device, path) as (_, said):
        for _ in range(3):
            with connected(path, queues=2) as front:
                use(front)
        assert any(f"Faulty.{method}" in line for line in said), said
        device.wrong = False
        works(path)
    assert not any("Traceback" in line for line in said)


class Taking(Echo):
    """Takes its requests itself, and fails at it once."""

    taken = frozenset({0})

    def __init__(self) -> None:
        super().__init__()
        self.kicks = 0

    def kicked(self, queue: int) -> None:
        self.kicks += 1
        if self.kicks == 1:
            raise ValueError("not yet")
        self.handle(queue, self.take(queue))


def test_a_kick_that_was_not_dealt_with_does_not_silence_the_next(path: Path) -> None:
    device = Taking()
    with served(device, path) as (_, said), connected(path) as front:
        front.up()
        while not said:
            os.eventfd_write(front.rings[0].kick, 1)
        assert ask(front, b"x", 1) == (1, b"X")
    assert said[0].startswith("Taking.kicked: ValueError: not yet (test_device_faults.py:")
    assert len(said) == 1


class Cancelled(Echo):
    async def handle(self, queue: int, requests: list[QueueRequest]) -> None:  # type: ignore[override]
        raise asyncio.CancelledError


class Number(Echo):
    def handle(self, queue: int, requests: list[QueueRequest]) -> int:  # type: ignore[override]
        return 5


class Generator(Echo):
    def handle(self, queue: int, requests: list[QueueRequest]):  # type: ignore[no-untyped-def]
        yield 5


@pytest.mark.parametrize("kind", [Cancelled, Number, Generator])
def test_what_handle_should_not_return_fails_its_requests(path: Path, kind: type[Echo]) -> None:
    with served(kind(), path) as (_, said), connected(path) as front:
        front.up()
        assert ask(front, b"x", 1) == (0, b"\0")
    assert len(said) == 1 and said[0].startswith(f"{kind.__name__}.handle, queue 0: "), said


class Busy(Echo):
    """Keeps the loop until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.busy, self.go = threading.Event(), threading.Event()

    def handle(self, queue: int, requests: list[QueueRequest]) -> None:
        if requests[0].data() == b"long":
            self.busy.set()
            assert self.go.wait(30)
        super().handle(queue, requests)


@pytest.mark.parametrize("how", ["leaves", "stops", "moves"])
def test_a_loop_that_is_kept_busy_costs_its_front_end_alone(
    path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_LOOP_S", 0.2)
    device = Busy()
    with served(device, path) as (_, said):
        with connected(path, queues=2) as front:
            front.up()
            front.memory[DATA : DATA + 4] = b"long"
            front.put(front.rings[0], 0, [(DATA, 4, False), (DATA + 64, 4, True)])
            front.add(front.rings[0], 0)
            assert device.busy.wait(20)
            if how == "stops":
                with pytest.raises(Closed):
                    front.stop()
            elif how == "moves":
                # Its memory is the loop's to change: this cannot be done, and says so.
                message = VhostRequest.SET_MEM_TABLE
                assert front.acknowledged(message, front.table(), [front.fd]) == 1
        # Control goes on while the loop does not: the next one is heard, and told to wait.
        while not any("does not stop" in line for line in said):
            pass
        with connected(path, queues=2) as front:
            front.negotiate()
        monkeypatch.setattr(host, "_LOOP_S", 15.0)
        device.go.set()
        deadline = time.monotonic() + 20
        while True:
            try:
                works(path)
                break
            except (Closed, AssertionError):
                # The last driver's queues may still be ending.
                assert time.monotonic() < deadline
    assert any("has kept its loop busy" in line for line in said)
    assert len(os.listdir("/proc/self/fd")) < 64


class Named(VirtioDevice):
    id = 4

    def __init__(self, name: str, value: object) -> None:
        setattr(self, name, value)


@dataclass
class Level(VirtioConfig):
    level: U8 = 3
    mac: Mac = bytes(6)


def config(annotation: object, **attributes: object) -> VirtioConfig:
    """A configuration whose field `x` is annotated so."""
    members = {"__annotations__": {"x": annotation}, "x": 0, **attributes}
    kind = dataclass(type("Odd", (VirtioConfig,), members))
    made: VirtioConfig = kind()
    return made


@dataclass(frozen=True)
class Frozen(VirtioConfig):
    x: U8 = 0


@dataclass
class Shadow(VirtioConfig):
    KNOWN: ClassVar[int] = 3
    layout: U8 = 0  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("config", config(Annotated[int, "zz"]), "Odd.x: 'zz': bad char"),
        ("config", config(Annotated[bytes, "9" * 30 + "s"]), "Odd.x: '9"),
        ("config", config("Unknown"), "Odd's annotations: NameError"),
        ("config", config(U8, writable="x"), "Odd.writable is 'x': not a set"),
        ("config", config(U8, writable={"y"}), "there is no field 'y'"),
        ("config", Frozen(), "Frozen cannot be changed: FrozenInstanceError"),
        ("config", Shadow(), "Shadow.layout: a name that VirtioConfig itself has"),
        ("id", "net", "Named.id is 'net'"),
        ("id", 0, "Named.id is 0"),
        ("queues", "two", "Named.queues is 'two'"),
        ("queues", 0, "Named.queues is 0"),
        ("features", "x", "Named.features is 'x'"),
        ("features", -1, "Named.features is -1"),
        ("features", 1 << 64, "not a number of 64 bits"),
        ("features", 1 << 34, "bits 24 to 49"),
        ("taken", 0, "Named.taken is 0"),
        ("config", {"level": 3}, "not a VirtioConfig"),
        ("config", Level(level=300), "Level.level is 300"),
        ("config", Level(level=None), "Level.level is None"),  # type: ignore[arg-type]
        ("config", Level(mac=b"\x52\x54"), "Level.mac has 2 bytes: not 6"),
        ("open", lambda: None, r"Named.open\(\) fails: TypeError"),
    ],
)
def test_what_a_class_is_not_is_one_error_before_anything_is_served(
    path: Path, name: str, value: object, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        asyncio.run(serve(Named(name, value), str(path), asyncio.Event(), print))
    assert not path.exists()


def test_a_field_that_does_not_fit_fails_where_it_is_set(path: Path) -> None:
    class Levelled(Echo):
        def __init__(self) -> None:
            super().__init__()
            self.config: Level = Level()  # type: ignore[assignment]

        def handle(self, queue: int, requests: list[QueueRequest]) -> None:
            self.config.level = int(requests[0].data())
            super().handle(queue, requests)

    with served(Levelled(), path) as (_, said), connected(path) as front:
        front.up()
        assert ask(front, b"256", 3) == (0, bytes(3))
        assert ask(front, b"255", 3) == (3, b"255")
        answer = front.ask(VhostRequest.GET_CONFIG, struct.pack("<III", 0, 1, 0) + b"\0")
        assert answer[12:] == b"\xff"
    assert len(said) == 1 and "Level.level is 256" in said[0]


@pytest.mark.parametrize("error", [ValueError("lost"), OSError(5, "no", "/disk")])
def test_a_close_that_fails_is_one_error(path: Path, error: Exception) -> None:
    class Closing(Echo):
        async def close(self) -> None:
            raise error

    async def run() -> None:
        until = asyncio.Event()
        until.set()
        await serve(Closing(), str(path), until, print)

    with pytest.raises(VfiotoolError, match=r"Closing.close\(\)"):
        asyncio.run(run())
    assert not path.exists()
