"""Front ends that would have the server wait for them: others do not notice."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA, GUEST, T_IN, USER, Closed, Frontend
from tests.virtio.test_serve import EXPORT, connect, running
from vfiotool.virtio.message import VhostRequest

HUGE = 2 << 20
LIMIT_S = 2.0


@contextmanager
def two(folder: Path) -> Iterator[tuple[Frontend, Path]]:
    """One process with two exports: an honest front end of one, which gives up soon, and the
    other's socket."""
    paths = [folder / name for name in ("honest", "other")]
    text = "".join(EXPORT.format(name=p.name, path=p, disk='ram = "1M"') for p in paths)
    file = folder / "exports.toml"
    file.write_text(f"version = 1\n{text}")
    control = str(folder / "control")
    with running("exports", str(file), "--control-path", control, sockets=(*paths,)) as process:
        honest = connect(paths[0], process)
        honest.up()
        honest.socket.settimeout(LIMIT_S)
        yield honest, paths[1]
        assert honest.write(0, b"h" * 512) == 0
        assert honest.read(0, 512) == b"h" * 512
        honest.close()
        assert process.poll() is None


def raw(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(20)
    made.connect(str(path))
    return made


def test_half_a_message_holds_nobody_up(tmp_path: Path) -> None:
    with two(tmp_path) as (honest, path), raw(path) as bad:
        for piece in (b"\1", b"\0\0\0\1", b"\0\0\0\0\0\0"):
            bad.sendall(piece)
            honest.ask(VhostRequest.GET_FEATURES)
        bad.sendall(b"\0")
        assert len(bad.recv(64)) == 20


def test_answers_that_nobody_takes_hold_nobody_up(tmp_path: Path) -> None:
    with two(tmp_path) as (honest, path), raw(path) as bad:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                bad.sendall(struct.pack("<III", VhostRequest.GET_FEATURES, 1, 0))
        honest.ask(VhostRequest.GET_FEATURES)


def test_an_interrupt_that_blocks_holds_nobody_up(tmp_path: Path) -> None:
    """An eventfd's mode is shared with the driver, who can fill it too: a write waits then."""
    with two(tmp_path) as (honest, path):
        bad = Frontend(str(path))
        bad.up()
        ring = bad.rings[0]
        os.set_blocking(ring.call, True)
        os.eventfd_read(ring.call)
        os.eventfd_write(ring.call, (1 << 64) - 2)
        bad.memory[DATA : DATA + 16] = struct.pack("<IIQ", T_IN, 0, 0)
        bad.put(ring, 0, [(DATA, 16, False), (DATA + 32, 512, True), (DATA + 16, 1, True)])
        bad.add(ring, 0)
        while bad.u16(ring.at + 0x2002) == 0:
            assert honest.write(1, b"w" * 512) == 0
        assert honest.write(1, b"w" * 512) == 0
        # Nothing is served that cannot be told of.
        bad.add(ring, 0)
        assert honest.write(1, b"w" * 512) == 0
        with pytest.raises(Closed):
            bad.stop()
        assert bad.u16(ring.at + 0x2002) == 1
        bad.close()


def test_an_interrupt_is_an_eventfd(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    requests = (
        VhostRequest.SET_VRING_CALL,
        VhostRequest.SET_VRING_KICK,
        VhostRequest.SET_VRING_ERR,
    )
    with two(tmp_path) as (_, path):
        for request in requests:
            bad = Frontend(str(path))
            bad.negotiate()
            bad.send(request, struct.pack("<Q", 0), [writer])
            with pytest.raises(Closed):
                bad.receive()
            bad.close()
    os.close(reader)
    os.close(writer)


def test_huge_pages_that_go_away_break_one_device(tmp_path: Path) -> None:
    """A look at one raises SIGBUS, and nothing smaller than the whole page can be put there."""
    try:
        memory = os.memfd_create("huge", os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"this kernel has no huge pages: {error}")
    with two(tmp_path) as (_, path):
        bad = Frontend(str(path))
        bad.negotiate()
        os.ftruncate(memory, HUGE)
        table = struct.pack("<IIQQQQ", 1, 0, GUEST, HUGE, USER, 0)
        assert bad.acknowledged(VhostRequest.SET_MEM_TABLE, table, [memory]) == 0
        os.ftruncate(memory, 0)
        with suppress(Closed, AssertionError):
            bad.start()
            bad.stop()
        bad.close()
    os.close(memory)
