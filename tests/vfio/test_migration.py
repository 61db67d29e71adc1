"""Saved device states: the file is checked whole, and the migration steps hold their order."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import struct
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.cli.drive.device_state import MAGIC, _pieces, _read_header, _Writer, check_file
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.vfio import migration
from vfiotool.vfio.device import FEATURE_GET
from vfiotool.vfio.migration import (
    ERROR,
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    Migration,
    probe,
)


def finished(pieces: list[bytes]) -> bytes:
    """A state file of these pieces, as `save` writes it."""
    with tempfile.TemporaryFile() as file:
        writer = _Writer(file, {"format": MAGIC, "version": 1, "vendor": "1234", "device": "5678"})
        for piece in pieces:
            writer.piece(piece)
        writer.end()
        file.seek(0)
        return file.read()


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6))
def test_a_file_gives_back_its_pieces(pieces: list[bytes]) -> None:
    file = io.BytesIO(finished(pieces))
    assert check_file(file, "f")["vendor"] == "1234"
    _read_header(file, "f")
    assert b"".join(_pieces(file, "f")) == b"".join(pieces)


@given(st.data())
def test_any_damage_is_noticed_before_a_device_is_touched(data: st.DataObject) -> None:
    raw = bytearray(finished([b"first piece", b"second"]))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    with pytest.raises(UsageError):
        check_file(io.BytesIO(bytes(raw)), "f")


class FakeDevice:
    """A device that keeps the state machine of <linux/vfio.h> for direct moves, over pipes."""

    def __init__(self, flags: int = 7, stream: bytes = b"state") -> None:
        self.name = "fake"
        self.use = lambda: contextlib.nullcontext(-1)
        self.reach = SimpleNamespace(resetting=contextlib.nullcontext)
        self.flags, self.stream = flags, stream
        self.state = RUNNING
        self.moves: list[int] = []
        self.refuse: Callable[[int], bool] = lambda state: False
        self.resets = 0
        self.info = SimpleNamespace(has_reset=False)
        self.taken: int | None = None

    def features(self) -> dict[str, bool]:
        return {"dma-logging-start": False}

    def reset(self) -> None:
        self.resets += 1
        self.state = RUNNING

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        if number == 1:
            if not self.flags:
                raise Unsupported("no feature")
            return struct.pack("=Q", self.flags)
        if number == 9:
            return struct.pack("=Q", len(self.stream))
        if operation == FEATURE_GET:
            return struct.pack("=Ii", self.state, -1)
        (state,) = struct.unpack_from("=I", data)
        if self.refuse(state):
            raise KernelError("refused", errno_name="EINVAL")
        self.moves.append(state)
        self.state, session = state, -1
        if (state == STOP_COPY and PRE_COPY not in self.moves) or state == PRE_COPY:
            session, write = os.pipe()
            os.write(write, self.stream)
            os.close(write)
        elif state == RESUMING:
            self.taken, session = os.pipe()
        return struct.pack("=Ii", state, session)


@pytest.fixture(autouse=True)
def no_precopy_ioctl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Migration, "precopy_left", lambda self, data: (0, 0))


def make(**arguments: Any) -> tuple[Any, Migration]:
    device: Any = FakeDevice(**arguments)
    return device, Migration(device)


def test_a_device_that_offers_nothing_is_told_so() -> None:
    device: Any = FakeDevice(flags=0)
    assert probe(device) is None
    with pytest.raises(Unsupported, match="cannot migrate"):
        Migration(device)


@pytest.mark.parametrize(
    ("flags", "wanted", "moves"),
    [
        (7, True, [PRE_COPY, STOP_COPY, STOP]),
        (7, False, [STOP_COPY, STOP]),
        (1, True, [STOP_COPY, STOP]),
    ],
)
def test_saving_goes_the_way_that_the_device_has(
    flags: int, wanted: bool, moves: list[int]
) -> None:
    device, steps = make(flags=flags)
    got: list[bytes] = []
    before = len(os.listdir("/proc/self/fd"))
    steps.save(got.append, pre_copy=wanted)
    assert (device.moves, b"".join(got)) == (moves, b"state")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_failed_save_lets_the_device_run_again() -> None:
    device, steps = make()
    device.refuse = lambda state: state == STOP_COPY
    with pytest.raises(KernelError, match="from there to stop-copy; it is in pre-copy now"):
        steps.save(lambda piece: None)
    assert device.state == RUNNING


def test_a_restore_arrives_and_starts_the_device() -> None:
    device, steps = make()
    assert steps.restore(iter([b"abc", b"", b"def"])) == 6
    assert device.moves == [RESUMING, STOP, RUNNING]
    assert os.read(device.taken, 100) == b"abcdef"
    os.close(device.taken)


def test_a_refused_restore_resets_the_device_where_it_can() -> None:
    device, steps = make()
    device.info.has_reset = True

    def refuse(state: int) -> bool:
        if state == STOP:
            device.state = ERROR
        return state == STOP

    device.refuse = refuse
    with pytest.raises(KernelError, match="it is in error now") as caught:
        steps.restore(iter([b"abc"]))
    assert caught.value.hint == "vfiotool device reset"
    assert (device.resets, device.state) == (1, RUNNING)
    os.close(device.taken)


def test_a_device_that_stops_taking_is_an_error() -> None:
    device, steps = make()

    def pieces() -> Any:
        os.close(device.taken)
        yield b"x" * 100

    with pytest.raises(KernelError, match="does not take the state") as caught:
        steps.restore(pieces())
    assert caught.value.errno_name == errno.errorcode[errno.EPIPE]
    assert migration.STATE_NAMES[device.state] == "running"
