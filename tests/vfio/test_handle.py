"""Descriptors that are never closed under a call, and mappers that have none."""

from __future__ import annotations

import errno
import os
import threading
from array import array
from typing import NoReturn

import pytest

from vfiotool.errors import UsageError
from vfiotool.native import library as native
from vfiotool.native.library import Handle, Mapper


def opened() -> Handle:
    return Handle(os.open("/dev/null", os.O_RDWR))


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_a_handle_closed_under_a_call_is_closed_when_the_call_ends() -> None:
    handle = opened()
    handle.description = "it"
    with handle as outer:
        with handle as number:
            handle.close()
            assert is_open(number) and handle.closed and handle.number == -1
            with pytest.raises(UsageError, match="it is closed"), handle:
                pass
        assert is_open(outer)
    assert not is_open(outer)
    handle.close()


def test_a_child_closes_at_once_what_its_parent_was_using() -> None:
    handle = opened()
    with handle as number:
        handle.close(True)
        assert not is_open(number)


def test_a_handle_that_was_never_made_is_closed() -> None:
    bare = Handle.__new__(Handle)
    assert bare.closed and bare.number == -1
    with pytest.raises(UsageError), bare:
        pass
    with pytest.raises(ValueError, match="one open descriptor"):
        Handle(-1)
    handle = opened()
    with pytest.raises(ValueError, match="one open descriptor"):
        handle.__init__(0)  # type: ignore[misc]
    assert is_open(handle.number)


class Failing(Mapper):
    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        raise OSError(-result, "map")

    def _unmap_failed(self, result: int, iova: int, size: int) -> int:
        raise OSError(-result, "unmap")


class Forgetful(Failing):
    def __init__(self) -> None:  # No super().__init__().
        pass


@pytest.mark.parametrize("make", [Forgetful, lambda: Failing.__new__(Failing)])
def test_a_mapper_that_was_not_initialised_does_not_talk_to_descriptor_0(make: object) -> None:
    mapper = make()  # type: ignore[operator]
    for call in (
        lambda: mapper.map(0, 0, 4096, read=True, write=True),
        lambda: mapper.unmap(0, 4096),
        lambda: mapper.map_many([(0, 0, 4096)], read=True, write=True),
        lambda: mapper.unmap_many([(0, 4096)]),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_a_mapper_takes_an_open_handle_and_nothing_else() -> None:
    closed = opened()
    closed.close()
    for wrong in (5, None, object(), closed, native.Window):
        with pytest.raises(TypeError):
            Failing()._aim(wrong, None)  # type: ignore[arg-type]
    mapper = Failing()
    mapper._aim(opened(), None)
    with pytest.raises(RuntimeError):
        mapper._aim(opened(), None)


def test_rows_are_copied_before_the_lock_is_released() -> None:
    """What is taken back after a failure is what was mapped, whatever another thread makes of the
    rows meanwhile."""
    rows = array("Q", [1, 2, 3, 4, 5, 6])
    seen: list[tuple[int, int, int]] = []

    class Watching(Failing):
        def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
            # Not exported: an array that is cannot grow.
            rows.append(7)
            seen.append((address, iova, size))
            raise OSError(-result, "map")

    mapper = Watching()
    mapper._aim(opened(), 1)
    with pytest.raises(OSError):
        mapper.map_many(rows, read=True, write=True)
    assert seen == [(1, 2, 3)]


@pytest.mark.parametrize(
    ("timeout_s", "nanoseconds"),
    [
        (None, 1 << 62),
        (float("inf"), 1 << 62),
        (1e30, 1 << 62),
        (-1, 0),
        (float("-inf"), 0),
        (0, 0),
        (1.5, 1_500_000_000),
        ("2", 2_000_000_000),
    ],
)
def test_time_outs_are_clamped_in_one_place(timeout_s: float | None, nanoseconds: int) -> None:
    assert abs(native.nanoseconds(timeout_s) - nanoseconds) <= 1024


@pytest.mark.parametrize("wrong", [float("nan"), "soon", object()])
def test_what_is_not_a_number_of_seconds_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError):
        native.nanoseconds(wrong)  # type: ignore[arg-type]


def test_a_call_in_another_thread_keeps_its_descriptor(tmp_path: object) -> None:
    handle = opened()
    entered, leave = threading.Event(), threading.Event()
    numbers: list[tuple[int, bool]] = []

    def use() -> None:
        with handle as number:
            entered.set()
            leave.wait(10)
            numbers.append((number, is_open(number)))

    thread = threading.Thread(target=use)
    thread.start()
    entered.wait(10)
    handle.close()
    other = os.open("/dev/null", os.O_RDONLY)
    leave.set()
    thread.join()
    # The number was not given to the file opened meanwhile.
    assert numbers[0][1] and other != numbers[0][0]
    os.close(other)
