"""A server's file that is shortened under a client ends no client: what can be shortened is not
mapped, and what is mapped cannot be shortened."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.models.served import opened, serving
from vfiotool.errors import UsageError
from vfiotool.models import Model, NvmeModel
from vfiotool.models.bar import memory_bar
from vfiotool.vfio import Device, is_sealed, user_connect

SIZE = 8192
SHRINK, GROW = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW


class Memory(Model):
    bars = (memory_bar(0, SIZE),)


def memfd(size: int, seals: int) -> int:
    file = os.memfd_create("region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def plain_file(size: int) -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


@contextmanager
def served_from(file: int) -> Iterator[Device]:
    """A card whose BAR 0 is memory of `file`, as another server may have it."""
    model = Memory()
    bar = model.bar(0)
    bar.memory.close()
    os.close(bar.file)
    bar.file, bar.memory = file, mmap.mmap(file, SIZE)
    with opened(model) as device:
        yield device


def test_the_memory_of_our_models_is_sealed_and_mapped() -> None:
    for model in (Memory(), NvmeModel(memory_buffer_bytes=1 << 20)):
        with opened(model) as device:
            index = 0 if isinstance(model, Memory) else 2
            mapping = device.region(index).map()
            file = model.bar(index).file
            with pytest.raises(OSError) as refused:
                os.ftruncate(file, 0)
            assert refused.value.errno == errno.EPERM
            mapping.write32(0, 7)
            assert device.region(index).read32(0) == 7


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: memfd(SIZE, 0), id="unsealed"),
        pytest.param(lambda: memfd(SIZE, GROW), id="may-shrink"),
        pytest.param(lambda: plain_file(SIZE), id="file"),
    ],
)
def test_what_can_be_shortened_is_read_and_written_by_messages(make: object) -> None:
    file = make()  # type: ignore[operator]
    with served_from(file) as device:
        region = device.region(0)
        assert not region.info.areas and region.access() is region
        with pytest.raises(UsageError, match="cannot be mapped"):
            region.map()
        region.write32(4096, 0x12345678)
        assert region.read32(4096) == 0x12345678
        assert os.pread(file, 4, 4096) == b"\x78\x56\x34\x12"


def test_a_client_outlives_a_server_that_shortens_its_file() -> None:
    """In a process of its own: a bus error would end this one."""
    client = (
        "import sys\n"
        "from vfiotool.vfio import Device\n"
        "with Device.open(sys.argv[1]) as device:\n"
        "    registers = device.region(0).access()\n"
        "    print(registers.read32(0), flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print(registers.read32(0), flush=True)\n"
    )
    model = Memory()
    own, seen = model.bar(0).file, memfd(SIZE, 0)
    # The client is handed another file than the one that the model's memory is of.
    model.bar(0).file = seen
    with serving(model) as server:
        words = [sys.executable, "-c", client, server.name]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            assert child.stdout.readline() == "0\n"
            os.ftruncate(seen, 0)
            rest, _ = child.communicate("\n", timeout=60)
        assert child.returncode != -signal.SIGBUS and (child.returncode, rest) == (0, "0\n")
        model.bar(0).file = own
    os.close(seen)


def test_a_sealed_file_that_is_too_short_is_not_mapped() -> None:
    model = Memory()
    own, short = model.bar(0).file, memfd(SIZE - 4096, SHRINK)
    model.bar(0).file = short
    with opened(model) as device:
        assert not device.region(0).info.areas
    # The other one went with the model.
    os.close(own)


def test_a_file_that_is_shortened_between_the_two_looks_is_not_mapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its seals are asked for before its size: after them nobody shortens it."""
    file = memfd(SIZE, 0)

    def sealed_late(descriptor: int) -> bool:
        os.ftruncate(file, 0)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SHRINK)
        return is_sealed(descriptor)

    monkeypatch.setattr(user_connect, "is_sealed", sealed_late)
    assert not user_connect.always_holds(file, SIZE)
    os.close(file)


def test_what_has_no_seals_has_none() -> None:
    reading, writing = os.pipe()
    assert not is_sealed(reading)
    os.close(reading)
    os.close(writing)
