"""Windows on memory: accesses of exact width, refusals instead of faults, bulk, polling, forks.

A memfd stands for a region: the accessors cannot tell it from a BAR.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.strikes import struck
from vfiotool.errors import UsageError
from vfiotool.native.library import WINDOW_READ, WINDOW_WRITE, Window

SIZE = 4 * 4096
START = 0x2000
READ_WRITE = WINDOW_READ | WINDOW_WRITE


class Memory:
    """A window at region offset START over a memfd whose bytes can be looked at from aside."""

    def __init__(self, access: int = READ_WRITE, alignment: int = 0) -> None:
        self.fd = os.memfd_create("region")
        os.ftruncate(self.fd, SIZE + 4096)
        self.window = Window(self.fd, 4096, START, SIZE, access, alignment)

    def bytes(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, 4096 + offset - START)

    def store(self, offset: int, data: bytes) -> None:
        os.pwrite(self.fd, data, 4096 + offset - START)

    def close(self) -> None:
        self.window._close()
        os.close(self.fd)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_reads_and_writes_are_little_endian_and_of_exact_width(memory: Memory, bits: int) -> None:
    width = bits // 8
    value = int.from_bytes(bytes(range(0xF1, 0xF1 + width)), "little")
    memory.store(START + 64 - 8, b"\xaa" * (16 + width))
    getattr(memory.window, f"write{bits}")(START + 64, value)
    around = memory.bytes(START + 64 - 8, 16 + width)
    assert around == b"\xaa" * 8 + value.to_bytes(width, "little") + b"\xaa" * 8
    assert getattr(memory.window, f"read{bits}")(START + 64) == value


def test_a_store_is_one_store(memory: Memory) -> None:
    """struct.pack_into stores zero first; a doorbell would be rung twice."""
    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found, value = memory.window._poll_until(START, 4, 0xFFFFFFFF, 0, 2_000_000)
            if found:
                seen.add(value)

    memory.window.write32(START, 0xFFFFFFFF)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(20000):
        memory.window.write32(START, number | 0x80000000)
    stop.set()
    watcher.join()
    assert seen == set()


@given(st.integers(-(1 << 70), 1 << 70), st.sampled_from([8, 16, 32, 64]))
def test_no_offset_reaches_outside(offset: int, bits: int) -> None:
    width = bits // 8
    inside = START <= offset <= START + SIZE - width and offset % width == 0
    window = SHARED.window
    if inside:
        getattr(window, f"read{bits}")(offset)
        return
    with pytest.raises(UsageError):
        getattr(window, f"read{bits}")(offset)
    with pytest.raises(UsageError):
        getattr(window, f"write{bits}")(offset, 0)


SHARED = Memory()


@pytest.mark.parametrize(
    ("offset", "count", "reason"),
    [
        (START, SIZE + 4, "outside"),
        (START - 4, 8, "outside"),
        (START + SIZE, 4, "outside"),
        ((1 << 64) - 4, 8, "outside"),
        (START + 2, 8, "multiple"),
        (START, 6, "multiple"),
    ],
)
def test_bulk_accesses_are_checked_as_a_whole(offset: int, count: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        SHARED.window._read_into(offset, bytearray(count), 4, False)
    with pytest.raises(UsageError, match=reason):
        SHARED.window._write_from(offset, bytes(count), 4, False)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_bulk_moves_whole_registers_to_and_from_unaligned_buffers(
    memory: Memory, width: int
) -> None:
    data = random.Random(width).randbytes(32 * width)
    holder = bytearray(len(data) + 1)
    view = memoryview(holder)[1:]
    view[:] = data
    memory.window._write_from(START + 8 * width, view, width, False)
    assert memory.bytes(START + 8 * width, len(data)) == data
    back = bytearray(len(data) + 1)
    memory.window._read_into(START + 8 * width, memoryview(back)[1:], width, False)
    assert bytes(back[1:]) == data


def test_fifo_accesses_stay_on_one_register(memory: Memory) -> None:
    memory.store(START, b"\x11" * 16)
    memory.window._write_from(START + 4, struct.pack("<III", 1, 2, 3), 4, True)
    assert memory.bytes(START, 16) == b"\x11" * 4 + struct.pack("<I", 3) + b"\x11" * 8
    got = bytearray(12)
    memory.window._read_into(START + 4, got, 4, True)
    assert got == struct.pack("<III", 3, 3, 3)


def test_values_must_fit_and_be_numbers(memory: Memory) -> None:
    for bits in (8, 16, 32, 64):
        write = getattr(memory.window, f"write{bits}")
        for value in (1 << bits, -1):
            with pytest.raises(UsageError, match="does not fit"):
                write(START, value)
        with pytest.raises(TypeError):
            write(START, "1")
        with pytest.raises(TypeError):
            write(START)
    with pytest.raises(TypeError):
        memory.window.read32(1.5)  # type: ignore[arg-type]


def test_rights_are_kept(memory: Memory) -> None:
    for access, allowed, refused in (
        (WINDOW_READ, "read32", "write32"),
        (WINDOW_READ | WINDOW_WRITE, "write32", None),
    ):
        window = Window(memory.fd, 0, 0, 4096, access, 0)
        getattr(window, allowed)(0, *([7] if allowed.startswith("write") else []))
        if refused:
            with pytest.raises(UsageError, match="does not allow"):
                getattr(window, refused)(0, 7)
        window._close()


def test_nothing_works_after_close_and_closing_twice_is_nothing() -> None:
    closed = Memory()
    closed.window._close()
    closed.window._close()
    assert closed.window.closed
    for call in (
        lambda: closed.window.read32(START),
        lambda: closed.window.write64(START, 0),
        lambda: closed.window._read_into(START, bytearray(4), 4, False),
        lambda: closed.window._poll_until(START, 4, 1, 1, 1),
        lambda: closed.window.address(START, 4),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()
    os.close(closed.fd)


def test_a_blocked_window_refuses_until_it_is_unblocked(memory: Memory) -> None:
    memory.window._block(True)
    with pytest.raises(UsageError, match="cannot be reached"):
        memory.window.read32(START)
    memory.window._block(False)
    memory.window.read32(START)


def test_polling_sees_another_thread_s_write_and_returns_the_value(memory: Memory) -> None:
    timer = threading.Timer(0.02, lambda: memory.window.write32(START + 8, 0x105))
    timer.start()
    found, value = memory.window._poll_until(START + 8, 4, 0xFF, 5, 5_000_000_000)
    timer.join()
    assert (found, value) == (True, 0x105)


def test_polling_ends_at_its_deadline_and_lets_other_threads_run(memory: Memory) -> None:
    ran = []
    thread = threading.Thread(target=lambda: ran.append(True))
    begin = time.monotonic()
    thread.start()
    found, _ = memory.window._poll_until(START, 1, 1, 1, 100_000_000)
    assert not found
    assert time.monotonic() - begin >= 0.1
    assert ran


@pytest.mark.parametrize("end", ["_close", "_block"])
def test_closing_or_blocking_a_window_ends_its_polls_with_an_error(
    memory: Memory, end: str
) -> None:
    said: list[str] = []

    def poll() -> None:
        try:
            memory.window._poll_until(START, 4, 1, 1, 30_000_000_000)
        except UsageError as error:
            said.append(str(error))

    threads = [threading.Thread(target=poll) for _ in range(3)]
    for thread in threads:
        thread.start()
    while memory.window.polling < 3:
        time.sleep(0)
    begin = time.monotonic()
    getattr(memory.window, end)(*([True] if end == "_block" else []))
    # Nobody is at the window any more when it returns.
    assert time.monotonic() - begin < 5
    for thread in threads:
        thread.join(5)
    assert len(said) == 3, said
    assert all(("closed" if end == "_close" else "reached") in text for text in said)


def test_a_pinned_window_is_not_closed_but_with_its_device(memory: Memory) -> None:
    gate = memory.window.pin()
    assert gate and memory.window.pins == 1
    with pytest.raises(UsageError, match="keeps an address"):
        memory.window._close()
    assert memory.window.read32(START) == 0
    memory.window.unpin()
    with pytest.raises(RuntimeError):
        memory.window.unpin()
    memory.window.pin()
    memory.window._close(True)
    assert memory.window.closed
    # Whoever pinned it lets go later.
    memory.window.unpin()
    with pytest.raises(UsageError, match="closed"):
        memory.window.pin()


def test_the_gate_tells_c_whether_it_may_access(memory: Memory) -> None:
    import ctypes

    opened = ctypes.c_uint32.from_address(memory.window.pin())
    inside = ctypes.c_uint32.from_address(ctypes.addressof(opened) + 4)
    assert (opened.value, inside.value) == (1, 0)
    memory.window._block(True)
    assert opened.value == 0
    memory.window._block(False)
    inside.value = 1
    blocked = threading.Event()

    def block() -> None:
        memory.window._block(True)
        blocked.set()

    thread = threading.Thread(target=block)
    thread.start()
    while opened.value:
        time.sleep(0)
    assert not blocked.is_set()
    inside.value = 0
    assert blocked.wait(5)
    thread.join()
    memory.window.unpin()


def test_a_signal_interrupts_a_poll(memory: Memory) -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), struck(0.05):
        memory.window._poll_until(START, 4, 1, 1, 30_000_000_000)
    assert time.monotonic() - begin < 5


def in_child(action: object) -> int:
    """The exit status of a forked child that runs `action`: 0 if it raised UsageError."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()  # type: ignore[operator]
        except UsageError:
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def test_a_child_is_refused_and_the_parent_goes_on(memory: Memory) -> None:
    memory.window.write32(START, 42)
    assert in_child(lambda: memory.window.read32(START)) == 0
    assert in_child(lambda: memory.window._read_into(START, bytearray(4), 4, False)) == 0
    assert in_child(lambda: memory.window.address(START, 4)) == 0
    assert memory.window.read32(START) == 42


def test_the_mapping_is_aligned_as_asked_for(memory: Memory) -> None:
    window = Window(memory.fd, 4096, START, 4096, READ_WRITE, 1 << 21)
    assert window.address(START, 4) % (1 << 21) == 4096
    window._close()
    for wrong in (3, (1 << 63) + 1, 1 << 63, 1 << 62):
        with pytest.raises(OSError, match="Invalid"):
            Window(memory.fd, 0, 0, 4096, READ_WRITE, wrong)


def test_windows_that_are_dropped_are_unmapped() -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:dropped" in line for line in maps)

    fd = os.memfd_create("dropped")
    os.ftruncate(fd, 4096)
    windows = [Window(fd, 0, 0, 4096, READ_WRITE, 0) for _ in range(16)]
    assert mapped() == 16
    del windows
    gc.collect()
    assert mapped() == 0
    os.close(fd)
