"""Virtqueues that Python serves, on a ring of our own: what C refuses, and what keeps what."""

from __future__ import annotations

import gc
import mmap
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest

from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.native import _types
from vfiotool.native.direct import DirectQueue, QueueRequest
from vfiotool.native.virtqueue import MemoryMap, MemoryRegion, RingLayout, WrittenPages

GUEST, USER = 1 << 30, 1 << 40
SIZE = 1024  # entries
AVAILABLE, USED, DATA, BYTES = 0x8000, 0xA000, 0x10_0000, 0x200_0000
_DESCRIPTOR = struct.Struct("<QIHH")


class Driver:
    """A split ring in a memory of our own, as a driver fills it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, BYTES)
        self.memory = mmap.mmap(self.fd, BYTES)
        self.words = memoryview(self.memory).cast("H")
        self.added = 0

    def close(self) -> None:
        self.words.release()
        self.memory.close()
        os.close(self.fd)

    def map(self) -> MemoryMap:
        """The front half and the back half as two regions that lie apart for the guest."""
        half = BYTES // 2
        front = MemoryRegion(GUEST, USER, half, 0, self.fd)
        return MemoryMap([MemoryRegion(GUEST * 4, USER * 4, half, half, self.fd), front])

    def queue(self, memory: MemoryMap, dirty: WrittenPages | None = None) -> DirectQueue:
        layout = RingLayout(USER, USER + AVAILABLE, USER + USED, SIZE, True, False)
        return DirectQueue(memory, layout, dirty=dirty)

    def add(self, *chain: tuple[int, int, bool], head: int = 0) -> None:
        """Make a chain of (offset, length, written by the device) available at `head`."""
        for number, (at, length, written) in enumerate(chain):
            more = number < len(chain) - 1
            flags, after = more | written << 1, head + number + 1 if more else 0
            place = 16 * (head + number)
            entry = _DESCRIPTOR.pack(GUEST + at, length, flags, after)
            self.memory[place : place + 16] = entry
        self.words[AVAILABLE // 2 + 2 + self.added % SIZE] = head
        self.added = (self.added + 1) & 0xFFFF
        self.words[AVAILABLE // 2 + 1] = self.added

    def used(self) -> list[tuple[int, int]]:
        """What was completed, as (head, bytes written)."""
        count = self.words[USED // 2 + 1]
        entries = struct.iter_unpack("<II", self.memory[USED + 4 : USED + 4 + 8 * count])
        return [(head, written) for head, written in entries]


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.close()


@pytest.fixture
def memory(driver: Driver) -> Iterator[MemoryMap]:
    made = driver.map()
    yield made
    made.close()


@pytest.fixture
def queue(driver: Driver, memory: MemoryMap) -> Iterator[DirectQueue]:
    made = driver.queue(memory)
    yield made
    if made.is_open:
        made.stop()


def in_thread(call: Callable[[], object]) -> BaseException | None:
    """What a call raises in another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_request_shows_and_copies_what_the_driver_laid_down(
    driver: Driver, queue: DirectQueue
) -> None:
    driver.memory[DATA : DATA + 10] = b"0123456789"
    driver.add((DATA, 3, False), (DATA + 3, 7, False), (DATA + 64, 4, True), (DATA + 80, 5, True))
    (request,) = queue.fetch()
    assert repr(request) == "<QueueRequest 0, 10+9 bytes, in flight>"
    assert (request.head, request.read_bytes, request.room) == (0, 10, 9)
    assert [bytes(view) for view in request.readable] == [b"012", b"3456789"]
    assert [len(view) for view in request.writable] == [4, 5]
    assert request.readable is request.readable and queue.requests() == [request]
    assert (request.data(), request.data(4), request.data(size=99)) == (
        b"0123456789",
        b"0123",
        b"0123456789",
    )
    parts = {(0, 3): [b"012"], (2, 3): [b"2", b"34"], (3, None): [b"3456789"], (10, 1): []}
    for (offset, size), expected in parts.items():
        assert [bytes(view) for view in request.readable_part(offset, size)] == expected
    assert [len(view) for view in request.writable_part(3, 2)] == [1, 1]
    assert request.write(b"abcdef", 2) == 6 and request.write(b"zz", offset=8) == 1
    assert request.write(b"none", 9) == request.write(b"") == 0
    assert driver.memory[DATA + 64 : DATA + 68] == b"\0\0ab"
    assert driver.memory[DATA + 80 : DATA + 85] == b"cdefz"
    request.complete(written=9)
    assert repr(request) == "<QueueRequest 0, 10+9 bytes, complete>"
    assert driver.used() == [] and queue.requests() == []
    queue.publish()
    assert driver.used() == [(0, 9)] and queue.in_flight == 0


def test_bytes_that_lie_over_each_other_are_copied_whole(
    driver: Driver, queue: DirectQueue
) -> None:
    driver.memory[DATA : DATA + 8] = b"abcdefgh"
    driver.add((DATA, 8, False), (DATA + 2, 8, True))
    (request,) = queue.fetch()
    assert request.write(request.readable[0]) == 8
    assert driver.memory[DATA : DATA + 10] == b"ababcdefgh"


def test_a_segment_that_crosses_regions_is_cut_where_they_end(
    driver: Driver, memory: MemoryMap
) -> None:
    half = BYTES // 2
    front = MemoryRegion(GUEST, USER, half, 0, driver.fd)
    both = MemoryMap([front, MemoryRegion(GUEST + half, USER * 4, half, half, driver.fd)])
    queue = driver.queue(both)
    driver.memory[half - 3 : half + 3] = b"abcdef"
    driver.add((half - 3, 6, False), (half - 8, 2, True))
    (request,) = queue.fetch()
    assert [bytes(view) for view in request.readable] == [b"abc", b"def"]
    assert request.data() == b"abcdef"
    queue.stop()
    both.close()


@pytest.mark.parametrize("written", [-1, 5, 1 << 40, 1 << 90])
def test_more_than_there_is_room_for_is_refused(
    driver: Driver, queue: DirectQueue, written: int
) -> None:
    driver.add((DATA, 4, True))
    (request,) = queue.fetch()
    with pytest.raises(UsageError, match=f"{written} bytes written where there is room for 4"):
        request.complete(written)
    assert not request.is_complete
    request.complete(4)
    with pytest.raises(UsageError, match="the request is complete already"):
        request.complete(4)


def test_arguments_that_mean_nothing_are_refused(driver: Driver, queue: DirectQueue) -> None:
    driver.add((DATA, 4, True))
    (request,) = queue.fetch()
    wrong: Sequence[tuple[Callable[..., object], tuple[object, ...]]] = (
        (request.complete, (None,)),
        (request.complete, (1.5,)),
        (request.complete, (1, 2)),
        (request.write, ()),
        (request.write, ("text",)),
        (request.data, ("all",)),
        (queue.fetch, ("all",)),
        (queue.fetch, (1, 2)),
        (queue.notify, ()),
        (_types.GuestMemory, (1, ())),
    )
    for call, arguments in wrong:
        with pytest.raises(TypeError):
            call(*arguments)
    for call in (request.complete, request.write, request.data, queue.notify):
        with pytest.raises(TypeError, match="unexpected argument 'other'"):
            call(other=1)  # type: ignore[call-arg]
    for less in (
        lambda: request.write(b"x", -1),
        lambda: request.data(-1),
        lambda: queue.fetch(-1),
    ):
        with pytest.raises(OverflowError):
            less()
    with pytest.raises(TypeError):
        QueueRequest()
    for kinds in ((object(), QueueRequest), (_types.GuestMemory.__new__(_types.GuestMemory), int)):
        with pytest.raises(TypeError, match="not a GuestMemory"):
            _types.DirectQueue(1, 1, *kinds)
    with pytest.raises(ValueError, match="one map"):
        _types.GuestMemory(0, [])
    pieces = memoryview(bytearray(8))
    with pytest.raises(ValueError, match="order of addresses"):
        _types.GuestMemory(1, [pieces[4:], pieces[:4]])
    with pytest.raises(BufferError):
        _types.GuestMemory(1, [memoryview(b"read-only")])
    with pytest.raises(TypeError, match="not the type QueueRequest"):
        _types.DirectQueue(1, 1, _types.GuestMemory(1, []), int)  # type: ignore[arg-type]


def test_another_thread_is_refused_with_the_way(driver: Driver, queue: DirectQueue) -> None:
    driver.add((DATA, 4, True))
    (request,) = queue.fetch()
    for call in (request.complete, queue.fetch, queue.publish, queue.stop, lambda: queue.waiting):
        error = in_thread(call)
        assert isinstance(error, UsageError), call
        assert error.message == "a virtqueue belongs to the thread that started it"
        assert "call_soon_threadsafe" in (error.hint or "")
    assert not request.is_complete and queue.in_flight == 1
    # Looking is everybody's.
    assert in_thread(lambda: bytes(request.writable[0]) + request.data()) is None


def test_a_request_that_is_kept_after_its_queue_does_nothing_more(
    driver: Driver, memory: MemoryMap
) -> None:
    called: list[int] = []
    queue = driver.queue(memory)
    queue.completed = lambda: called.append(1)
    driver.add((DATA, 4, True))
    driver.add((DATA, 4, True), head=1)
    first, second = queue.fetch()
    assert queue.stop() == 2 and queue.requests() == []
    assert not first.is_complete
    first.complete(4)
    assert in_thread(second.complete) is None
    assert first.is_complete and called == [] and driver.used() == []
    with pytest.raises(UsageError, match="complete already"):
        first.complete(4)
    for call in (queue.fetch, queue.publish, queue.stop):
        with pytest.raises(VfiotoolError, match="the queue has been stopped"):
            call()


def test_views_keep_the_memory_mapped_whatever_becomes_of_the_rest(driver: Driver) -> None:
    memory = driver.map()
    queue = driver.queue(memory)
    driver.memory[DATA : DATA + 4] = b"kept"
    driver.add((DATA, 4, False), (DATA + 64, 4, True))
    (request,) = queue.fetch()
    view = request.readable[0][1:]
    part = request.writable_part(1, 2)[0]
    queue.stop()
    memory.close()
    del queue, request, memory
    gc.collect()
    assert bytes(view) == b"ept"
    part[:] = b"ok"
    assert driver.memory[DATA + 64 : DATA + 68] == b"\0ok\0"


def test_nothing_keeps_the_memory_but_its_owner_when_all_is_gone(
    driver: Driver, memory: MemoryMap
) -> None:
    before = memory.references
    queue = driver.queue(memory)
    driver.add((DATA, 4, False), (DATA + 64, 4, True))
    (request,) = queue.fetch()
    assert request.readable and memory.references > before
    queue.stop()
    del queue, request
    assert memory.references == before


def test_a_request_of_an_earlier_map_stays_in_it(driver: Driver, memory: MemoryMap) -> None:
    """What is written there is logged as well."""
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, 1 << 17)
    bits = mmap.mmap(log, 1 << 17)
    logged = MemoryMap([MemoryRegion(0, 0, 1 << 17, 0, log)])
    queue = driver.queue(memory, WrittenPages(logged, 1 << 17, None))
    driver.memory[DATA : DATA + 4] = b"lies"
    driver.add((DATA, 4, False), (DATA + 0x3FFC, 8, True), (DATA + 0x8000, 4, True))
    (request,) = queue.fetch()
    other = driver.map()
    assert queue.set_memory(other)
    assert request.data() == bytes(request.readable[0]) == b"lies"
    assert request.write(b"0123456789") == 10
    request.complete(10)
    pages = {(GUEST + DATA) // 4096 + page for page in (3, 4, 8)}
    found = {8 * at + bit for at, byte in enumerate(bits[:]) for bit in range(8) if byte >> bit & 1}
    assert found == pages
    driver.add((DATA, 4, False))
    (request,) = queue.fetch()
    assert request.data() == b"lies"
    queue.stop()
    del queue, request
    assert memory.references == 1
    for one in (other, logged):
        one.close()
    bits.close()
    os.close(log)


def test_chains_of_as_many_segments_as_there_can_be(driver: Driver, queue: DirectQueue) -> None:
    driver.memory[DATA : DATA + SIZE] = bytes(range(256)) * (SIZE // 256)
    for readable in (SIZE, 1, 0):
        chain = [(DATA + number, 1, number >= readable) for number in range(SIZE)]
        driver.add(*chain)
        (request,) = queue.fetch()
        assert (request.read_bytes, request.room) == (readable, SIZE - readable)
        assert (len(request.readable), len(request.writable)) == (readable, SIZE - readable)
        assert request.data() == driver.memory[DATA : DATA + readable]
        assert request.write(bytes(2 * SIZE)) == SIZE - readable
        request.complete(SIZE - readable)
    assert queue.broken() is None


def test_a_chain_that_leaves_the_memory_breaks_the_queue(
    driver: Driver, queue: DirectQueue
) -> None:
    driver.add((DATA, 4, False), (BYTES, 4, True))
    assert queue.fetch() == [] and "no region" in (queue.broken() or "")
    assert queue.fetch() == [] and queue.requests() == []


def test_a_hundred_thousand_requests_leave_nothing_behind(
    driver: Driver, queue: DirectQueue, memory: MemoryMap
) -> None:
    def go(count: int) -> None:
        for number in range(count):
            driver.add((DATA, 16, False), (DATA + 4096, 512, True), head=2 * (number % 64))
            (request,) = queue.fetch(1)
            request.write(request.data(4), 4)
            if number % 16 == 0:
                request.writable[0][0] = 1
            request.complete(request.room)
            queue.publish()

    go(1000)
    gc.collect()
    blocks, references = sys.getallocatedblocks(), memory.references
    types = [sys.getrefcount(kind) for kind in (QueueRequest, _types.GuestMemory, memoryview)]
    go(100_000)
    gc.collect()
    assert abs(sys.getallocatedblocks() - blocks) < 50
    assert memory.references == references
    now = [sys.getrefcount(kind) for kind in (QueueRequest, _types.GuestMemory, memoryview)]
    assert max(abs(a - b) for a, b in zip(types, now, strict=True)) < 5


def test_a_queue_that_its_own_requests_lead_back_to_is_collected(driver: Driver) -> None:
    memory = driver.map()
    queue = driver.queue(memory)
    driver.add((DATA, 4, True))
    driver.add((DATA, 4, True), head=1)
    requests = queue.fetch()
    requests[1].complete()
    requests[1].writable.append(requests[1])  # type: ignore[arg-type]
    queue.completed = requests.clear
    # As a process ends: nobody has stopped it.
    gone = weakref.ref(queue)
    del queue, requests
    gc.collect()
    assert gone() is None
    memory.close()


def test_a_collection_in_the_middle_of_a_fetch_changes_nothing(
    driver: Driver, queue: DirectQueue
) -> None:
    """What it ends may call the very queue."""
    taken: list[QueueRequest] = []

    class Ends:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if queue.is_open:
                taken.extend(queue.fetch(8))

    for round_ in range(8):
        for number in range(64):
            at = DATA + 256 * number
            driver.memory[at] = number
            driver.add((at, 1, False), (at + 8, 1 + number, True), head=2 * number)
        before = gc.get_threshold()
        for _ in range(50):
            Ends()
        gc.set_threshold(1)
        try:
            while found := queue.fetch(16):
                taken.extend(found)
                Ends()
        finally:
            gc.set_threshold(*before)
        assert sorted(request.head for request in taken) == [2 * number for number in range(64)]
        for request in taken:
            assert request.data()[0] * 2 == request.head and request.room == request.data()[0] + 1
            request.complete(1)
        taken.clear()
        assert queue.in_flight == 0, round_


def test_what_completes_tells_whoever_publishes(driver: Driver, queue: DirectQueue) -> None:
    called: list[bool] = []

    def note() -> None:
        called.append(request.is_complete)
        queue.completed = None

    queue.completed = note
    for head in range(2):
        driver.add((DATA, 4, True), head=head)
        (request,) = queue.fetch()
        request.complete()
    assert called == [True] and queue.completed is None

    def fails() -> None:
        raise OSError("not now")

    queue.completed = fails
    driver.add((DATA, 4, True), head=2)
    (request,) = queue.fetch()
    with pytest.raises(OSError, match="not now"):
        request.complete()
    assert request.is_complete and queue.in_flight == 0
