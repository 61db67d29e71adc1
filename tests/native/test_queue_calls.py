"""The calls of a queue pair with the interpreter's lock held: what they refuse before C sees it."""

from __future__ import annotations

import mmap
import time

import pytest

from vfiotool.native.library import ffi, lib, queue_calls


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, 3 * 4096)


@pytest.fixture
def queue(memory: mmap.mmap) -> object:
    """A queue pair of four entries over plain memory."""
    start = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    layout, made = ffi.new("struct vt_nvme_layout *"), ffi.new("struct vt_nvme_queue **")
    layout.submission, layout.completion = start, start + 4096
    layout.tail_doorbell, layout.head_doorbell = start + 8192, start + 8196
    layout.sq_entries, layout.cq_entries, layout.page_size, layout.id = 4, 4, 4096, 1
    assert lib.vt_nvme_new(layout, made) == 0
    return ffi.gc(made[0], lib.vt_nvme_free)


def test_commands_are_sent_and_taken_as_by_the_library(memory: mmap.mmap, queue: object) -> None:
    done, held = ffi.new("struct vt_nvme_done[]", 3), ffi.new("uint32_t *")
    calls = queue_calls(queue, done, 3, held)
    tags = (7, (1 << 64) - 1, 9)
    for tag in tags:
        assert calls.submit(2, 1, 40, 8, 0x10000, 4096, 0x4000, tag) == 1
    assert calls.submit(2, 1, 40, 8, 0x10000, 4096, 0, 1) == 0  # full
    assert memory[8192] == 3 and memory[0] == 2
    assert calls.look() == 0
    # The controller answers the second: phase 1, queue 1, its identifier.
    memory[4096 + 10 : 4096 + 16] = b"\1\0" + memory[64 + 2 : 64 + 4] + b"\1\0"
    assert calls.look() == 1 and (held[0], done[0].tag) == (1, tags[1])
    assert calls.submit(2, 1, 40, 8, 0x10002, 4096, 0, 1) == -22  # no multiple of four
    assert lib.vt_nvme_stop(queue) == 0
    assert calls.submit(2, 1, 40, 8, 0, 0, 0, 1) < 0 and calls.look() < 0


def test_a_look_waits_for_a_moment_where_it_is_asked_to(memory: mmap.mmap, queue: object) -> None:
    calls = queue_calls(queue, ffi.new("struct vt_nvme_done[]", 3), 3, ffi.new("uint32_t *"))
    assert calls.submit(2, 1, 40, 8, 0x10000, 4096, 0, 7) == 1
    begun = time.monotonic_ns()
    assert calls.look(1_000_000) == 0
    assert time.monotonic_ns() - begun >= 900_000
    memory[4096 + 10 : 4096 + 16] = b"\1\0" + memory[2:4] + b"\1\0"
    assert calls.look(1_000_000) == 1
    for wrong in (-1, 1_000_001):
        with pytest.raises(OverflowError):
            calls.look(wrong)
    with pytest.raises(TypeError):
        calls.look(0, 0)  # type: ignore[call-arg]


def test_numbers_that_do_not_fit_are_refused(queue: object) -> None:
    calls = queue_calls(queue, ffi.new("struct vt_nvme_done[]", 3), 3, ffi.new("uint32_t *"))
    widths = (8, 32, 64, 32, 64, 32, 16, 64)
    for place, bits in enumerate(widths):
        for wrong in (-1, 1 << bits):
            words = [0] * len(widths)
            words[place] = wrong
            with pytest.raises(OverflowError):
                calls.submit(*words)
    with pytest.raises(TypeError):
        calls.submit("a", *[0] * 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        calls.submit(*[0] * 7)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="one queue pair"):
        type(calls)(0, 0, 0, 0, 0, 0, None)
    assert lib.vt_nvme_in_flight(queue)[0] == 0
