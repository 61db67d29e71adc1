"""The C type that maps memory: its arguments, its errors, its way back. Without any device."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from typing import NoReturn

import numpy
import pytest

from vfiotool.native.library import Handle, Mapper

PAGE = 4096


class Failed(Exception):
    """What the methods of `Space` raise: verb, errno and numbers."""


class Space(Mapper):
    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        raise Failed("map", -result, address, iova, size)

    def _unmap_failed(self, result: int, iova: int, size: int) -> int:
        raise Failed("unmap", -result, iova, size)

    def _roll_back_failed(self, result: int, back: int, iova: int, size: int) -> NoReturn:
        raise Failed("roll back", -result, -back, iova, size)


@pytest.fixture(params=[None, 1], ids=["type1", "iommufd"])
def space(request: pytest.FixtureRequest) -> Iterator[Space]:
    """Over a file that knows none of the ioctls."""
    handle = Handle(os.open("/dev/null", os.O_RDWR))
    made = Space()
    made._aim(handle, request.param)
    yield made
    handle.close()


def failure(work: object, *arguments: object, **rights: bool) -> tuple[object, ...]:
    with pytest.raises(Failed) as caught:
        work(*arguments, **rights)  # type: ignore[operator]
    return caught.value.args


def test_a_failure_is_told_with_its_numbers(space: Space) -> None:
    rights = {"read": True, "write": False}
    assert failure(space.map, PAGE, 1 << 63, 8192, **rights) == (
        "map", errno.ENOTTY, PAGE, 1 << 63, 8192,
    )  # fmt: skip
    assert failure(space.unmap, 1 << 63, PAGE) == ("unmap", errno.ENOTTY, 1 << 63, PAGE)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 2, 3), (4, 5, 6)],
        ([1, 2, 3], (4, 5, 6)),
        {(1, 2, 3): "a", (4, 5, 6): "b"},
        array("Q", range(1, 7)),
        numpy.arange(1, 7, dtype="u8").reshape(2, 3),
        list(numpy.arange(1, 7, dtype="u8").reshape(2, 3)),
    ],
    ids=["tuples", "lists", "keys", "array", "numpy", "rows-of-numpy"],
)
def test_rows_are_sequences_or_buffers(space: Space, rows: object) -> None:
    told = failure(space.map_many, rows, read=True, write=True)
    assert told == ("map", errno.ENOTTY, 1, 2, 3)


def test_no_rows_are_nothing_to_do(space: Space) -> None:
    for nothing in ([], array("Q")):
        space.map_many(nothing, read=True, write=True)
        assert space.unmap_many(nothing) == 0


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([(1, 2)], ValueError),
        ([(1, 2, 3, 4)], ValueError),
        ([1], TypeError),
        (None, TypeError),
        ([(1, 2, "3")], TypeError),
        ([(1, 2, -3)], OverflowError),
        ([(1, 2, 1 << 64)], OverflowError),
        (array("Q", [1, 2]), ValueError),
        (array("q", [1, 2, 3]), TypeError),
        (array("I", [1, 2, 3]), TypeError),
        (b"123", TypeError),
        (numpy.arange(12, dtype="u8").reshape(2, 6)[:, ::2], (BufferError, ValueError)),
        (numpy.array([1, 2, 3], dtype=">u8"), TypeError),
    ],
)
def test_other_rows_are_refused(space: Space, rows: object, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        space.map_many(rows, read=True, write=True)  # type: ignore[arg-type]


def test_rights_are_named_and_both_given(space: Space) -> None:
    for rights in ({}, {"read": True}, {"read": True, "write": True, "exec": True}):
        with pytest.raises(TypeError):
            space.map(0, 0, PAGE, **rights)
        with pytest.raises(TypeError):
            space.map_many([], **rights)
    with pytest.raises(TypeError, match="3 positional"):
        space.map(0, 0, read=True, write=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="2 positional"):
        space.unmap(0)  # type: ignore[call-arg]


def test_a_list_that_shrinks_while_it_is_read_does_no_harm(space: Space) -> None:
    class Shrinking:
        def __index__(self) -> int:
            rows.clear()
            return 1

    rows: list[tuple[object, ...]] = [(1, 2, Shrinking()), (4, 5, 6)]
    with pytest.raises(IndexError):
        space.map_many(rows, read=True, write=True)  # type: ignore[arg-type]


def test_without_an_address_space_and_in_a_child_nothing_is_reached() -> None:
    space = Space()
    assert failure(space.unmap, 0, PAGE)[:2] == ("unmap", errno.EBADF)
    handle = Handle(os.open("/dev/null", os.O_RDWR))
    space._aim(handle, None)
    child = os.fork()
    if child == 0:
        try:
            space.map(0, 0, PAGE, read=True, write=True)
        except Failed as error:
            os._exit(error.args[1])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EBADF
    handle.close()
    assert failure(space.unmap_many, [(0, PAGE)])[:2] == ("unmap", errno.EBADF)
