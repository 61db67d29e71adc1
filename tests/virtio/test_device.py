"""Devices written in Python, driven by a front end of our own."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA, GUEST, SIZE, Closed, Frontend
from vfiotool.errors import UsageError
from vfiotool.native.direct import QueueRequest
from vfiotool.virtio import host
from vfiotool.virtio.device import U8, U16, U32, U64, Mac, VirtioConfig, VirtioDevice
from vfiotool.virtio.host import serve
from vfiotool.virtio.message import VhostRequest


@contextmanager
def served(
    device: VirtioDevice, path: Path
) -> Iterator[tuple[asyncio.AbstractEventLoop, list[str]]]:
    """The device served in a thread of this process, with its loop and what is reported."""
    said: list[str] = []
    ready = threading.Event()
    made: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        until = asyncio.Event()
        made.append((asyncio.get_running_loop(), until))
        task = asyncio.create_task(serve(device, str(path), until, said.append))
        while not path.exists() and not task.done():
            await asyncio.sleep(0)
        ready.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(20)
        loop, until = made[0]
        yield loop, said
    finally:
        loop.call_soon_threadsafe(until.set)
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def connected(path: Path, **options: int) -> Iterator[Frontend]:
    front = Frontend(str(path), **options)
    try:
        yield front
    finally:
        front.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.sock"


@dataclass
class EchoConfig(VirtioConfig):
    writable = frozenset({"volume"})

    mac: Mac = b"\x52\x54\0\0\0\1"
    size: U16 = 7
    limit: U32 = 70_000
    capacity: U64 = 1 << 40
    volume: U8 = 3


class Echo(VirtioDevice):
    """Gives back what is readable, in capitals."""

    id = 42
    queues = 2
    features = 1 << 3

    def __init__(self) -> None:
        self.config: EchoConfig = EchoConfig()  # type: ignore[assignment]
        self.batches: list[int] = []
        self.wrote: list[str] = []

    def handle(self, queue: int, requests: list[QueueRequest]) -> None:
        self.batches.append(len(requests))
        for request in requests:
            if request.data() == b"fault":
                raise RuntimeError("a fault of the class")
            request.complete(request.write(request.data().upper()))

    def driver_wrote(self, field: str) -> None:
        self.wrote.append(field)


class SlowEcho(Echo):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def handle(self, queue: int, requests: list[QueueRequest]) -> None:  # type: ignore[override]
        self.batches.append(len(requests))
        await self.go.wait()
        for request in requests:
            request.complete(request.write(request.data().upper()))


def ask(front: Frontend, data: bytes, room: int, index: int = 0) -> tuple[int, bytes]:
    """One request: the bytes written, and what stands in the room."""
    ring, at = front.rings[index], DATA + index * 0x8_0000
    front.memory[at : at + len(data)] = data
    front.memory[at + 4096 : at + 4096 + room] = bytes(room)
    front.put(ring, 0, [(at, len(data), False), (at + 4096, room, True)])
    front.add(ring, 0)
    ((head, written),) = front.wait(ring)
    assert head == 0
    return written, front.memory[at + 4096 : at + 4096 + room]


def test_a_class_answers_over_each_queue(path: Path) -> None:
    device = Echo()
    with served(device, path) as (_, said), connected(path, queues=2) as front:
        front.up()
        assert device.negotiated & 1 << 3
        for index in (0, 1):
            assert ask(front, b"hello", 8, index) == (5, b"HELLO\0\0\0")
        assert ask(front, b"more than there is room for", 4) == (4, b"MORE")
    assert said == []
    assert device.take(0) == []


def test_what_was_fetched_before_a_fault_keeps_nobody_waiting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring breaks at the third of three requests: the first two are nobody's, and the driver that
    stops it, or the one that comes next, does not wait for them to end."""
    monkeypatch.setattr(host, "DRAIN_S", 1000.0)
    with served(Echo(), path) as (loop, said), connected(path) as front:
        front.up()
        ring = front.rings[0]
        for head in (0, 2):
            front.put(ring, head, [(DATA, 8, False), (DATA + 64, 8, True)])
            front.add(ring, head, kick=False)
        front.add(ring, SIZE)
        for _ in range(2):  # the first may come together with the kick
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)
        # They are fetched again by whoever serves the queue next.
        assert front.stop() == 0
    assert said == []


def test_a_driver_that_sleeps_is_woken_while_the_rest_is_answered(path: Path) -> None:
    """The first completion after a pause is seen at once, those after it together."""
    seen: list[int] = []

    class Watched(Echo):
        def handle(self, queue: int, requests: list[QueueRequest]) -> None:
            for request in requests:
                request.complete(request.write(b"x"))
                seen.append(front.u16(front.rings[0].at + 0x2002))

    with served(Watched(), path) as (_, said), connected(path) as front:
        front.up()
        for head in range(4):
            front.put(front.rings[0], head, [(DATA + 64 * head, 8, True)])
            front.add(front.rings[0], head, kick=head == 3)
        assert sorted(front.wait(front.rings[0], 4)) == [(head, 1) for head in range(4)]
    assert said == [] and seen == [1, 1, 1, 1]


def test_the_configuration_is_the_dataclass_as_the_specification_packs_it(path: Path) -> None:
    device = Echo()
    with served(device, path), connected(path) as front:
        front.negotiate()
        head = struct.pack("<III", 0, 21, 0)
        config = front.ask(VhostRequest.GET_CONFIG, head + bytes(21))[12:]
        assert config == struct.pack("<6sHIQB", b"\x52\x54\0\0\0\1", 7, 70_000, 1 << 40, 3)
        wrote = struct.pack("<III", 20, 1, 0) + b"\x09"
        assert front.acknowledged(VhostRequest.SET_CONFIG, wrote) == 0
        assert device.config.volume == 9 and device.wrote == ["volume"]
        refused = struct.pack("<III", 6, 2, 0) + b"\x09\0"
        assert front.acknowledged(VhostRequest.SET_CONFIG, refused) == 1
        assert device.config.size == 7


def test_a_changed_field_is_told_to_the_driver(path: Path) -> None:
    import socket

    device = Echo()
    ours, theirs = socket.socketpair()
    with ours, theirs, served(device, path) as (loop, _), connected(path) as front:
        front.up()
        assert front.acknowledged(VhostRequest.SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
        loop.call_soon_threadsafe(setattr, device.config, "size", 8)
        ours.settimeout(10)
        assert struct.unpack("<III", ours.recv(12))[0] == 2
        ours.setblocking(False)
        loop.call_soon_threadsafe(setattr, device.config, "size", 8)
        assert ask(front, b"x", 1) == (1, b"X")
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_a_fault_of_the_class_fails_its_batch_and_is_reported(path: Path) -> None:
    with served(Echo(), path) as (_, said), connected(path) as front:
        front.up()
        assert ask(front, b"fault", 8) == (0, bytes(8))
        assert ask(front, b"again", 5) == (5, b"AGAIN")
    (told,) = said
    assert told.startswith(
        "Echo.handle, queue 0: RuntimeError: a fault of the class (test_device.py:"
    )


def test_coroutines_answer_in_order_and_a_stop_waits_for_them(path: Path) -> None:
    async def make() -> SlowEcho:
        return SlowEcho()

    device = asyncio.run(make())
    with served(device, path) as (loop, _), connected(path) as front:
        front.up()
        ring = front.rings[0]
        for number in range(4):
            at = DATA + 0x1000 * number
            front.memory[at : at + 3] = b"abc"
            front.put(ring, 4 * number, [(at, 3, False), (at + 16, 3, True)])
            front.add(ring, 4 * number)
        loop.call_soon_threadsafe(device.go.set)
        assert front.stop() == 4
        assert [head for head, _ in front.wait(ring, 4)] == [0, 4, 8, 12]
        assert front.memory[DATA + 16 : DATA + 19] == b"ABC"


def test_a_request_ends_once_and_says_no_more_than_was_written(path: Path) -> None:
    found: list[str] = []

    class Wrong(Echo):
        def handle(self, queue: int, requests: list[QueueRequest]) -> None:
            for request in requests:
                try:
                    request.complete(request.room + 1)
                except UsageError as error:
                    found.append(error.message)
                request.complete(0)
                try:
                    request.complete(0)
                except UsageError as error:
                    found.append(error.message)

    with served(Wrong(), path), connected(path) as front:
        front.up()
        assert ask(front, b"x", 8) == (0, bytes(8))
    assert found == [
        "9 bytes written where there is room for 8",
        "the request is complete already",
    ]


def test_views_outlive_their_queue_and_map(path: Path) -> None:
    """What a class keeps stays mapped; completing it then does nothing."""
    kept: list[QueueRequest] = []

    class Keeper(Echo):
        def handle(self, queue: int, requests: list[QueueRequest]) -> None:
            kept.extend(requests)
            super().handle(queue, requests)

    with served(Keeper(), path), connected(path) as front:
        front.up()
        assert ask(front, b"kept", 4) == (4, b"KEPT")
    assert kept[0].data() == b"kept" and bytes(kept[0].writable[0]) == b"KEPT"
    kept[0].writable[0][:] = b"late"


def test_requests_of_another_thread_are_refused_in_words(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "DRAIN_S", 0.1)
    said: list[str] = []

    class Threads(Echo):
        def handle(self, queue: int, requests: list[QueueRequest]) -> None:
            def finish() -> None:
                try:
                    requests[0].complete(0)
                except UsageError as error:
                    said.append(error.message)

            thread = threading.Thread(target=finish)
            thread.start()
            thread.join()

    with served(Threads(), path), connected(path) as front:
        front.up()
        ring = front.rings[0]
        front.put(ring, 0, [(DATA, 1, False), (DATA + 64, 1, True)])
        front.add(ring, 0)
        # The class is at fault: it answers never. The stop does not wait for it for ever.
        while not said:
            os.sched_yield()
    assert said == ["a virtqueue belongs to the thread that started it"]


def test_a_queue_that_breaks_a_rule_ends_alone(path: Path) -> None:
    device = Echo()
    with served(device, path), connected(path, queues=2) as front:
        front.up()
        front.put(front.rings[0], 0, [(DATA, 1, False)])
        struct.pack_into("<Q", front.memory, front.rings[0].at, GUEST + (1 << 40))
        front.add(front.rings[0], 0)
        assert ask(front, b"x", 1, index=1) == (1, b"X")
        front.stop()
        front.start(0, base=0)


def test_a_device_takes_buffers_when_it_has_something_for_them(path: Path) -> None:
    class Receiver(VirtioDevice):
        id = 3
        queues = 1
        taken = frozenset({0})
        kicks = 0

        def kicked(self, queue: int) -> None:
            self.kicks += 1

        def arrives(self, data: bytes) -> None:
            for request in self.take(0, 1):
                request.complete(request.write(data))

    device = Receiver()
    with served(device, path) as (loop, _), connected(path) as front:
        front.up()
        ring = front.rings[0]
        for number in range(3):
            front.put(ring, number, [(DATA + 64 * number, 16, True)])
            front.add(ring, number)
        loop.call_soon_threadsafe(device.arrives, b"first")
        loop.call_soon_threadsafe(device.arrives, b"second")
        assert front.wait(ring, 2) == [(0, 5), (1, 6)]
        assert front.memory[DATA : DATA + 5] == b"first"
        # The third buffer was not taken: the next back end begins with it.
        assert front.stop() == 2
        assert device.kicks


def test_bad_classes_are_refused_in_words(path: Path) -> None:
    class Many(Echo):
        queues = 300

    @dataclass
    class Odd(VirtioConfig):
        what: int = field(default=1)

    async def run(device: VirtioDevice) -> None:
        await serve(device, str(path), asyncio.Event(), print)

    with pytest.raises(UsageError, match="queues is 300"):
        asyncio.run(run(Many()))
    device = Echo()
    device.config = Odd()  # type: ignore[assignment]
    with pytest.raises(UsageError, match="what: not one of"):
        asyncio.run(run(device))
    assert not path.exists()


def test_a_front_end_that_vanishes_in_mid_request_leaves_the_device_as_it_was(path: Path) -> None:
    device = Echo()
    with served(device, path):
        for _ in range(20):
            with connected(path) as front:
                front.up()
                for number in range(SIZE // 2):
                    front.put(front.rings[0], 2 * number, [(DATA, 3, False), (DATA + 64, 3, True)])
                    front.add(front.rings[0], 2 * number)
        with connected(path) as front:
            front.up()
            try:
                assert ask(front, b"x", 1) == (1, b"X")
            except Closed:
                pytest.fail("the device is gone")
