"""A device's state carried from one mtty to another: what was pending on one is read on the other.

mtty has VFIO migration since 6.7 (samples/vfio-mdev/mtty.c); Debian's 6.1 has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, mdev, open_descriptors
from vfiotool.drivers.mtty import SerialPort
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.vfio import Device
from vfiotool.vfio.migration import (
    ERROR,
    PRE_COPY,
    RUNNING,
    STOP,
    DirtyLog,
    Migration,
    probe,
)

MACHINE = "mdev"
KERNELS = ("6.12", "iommufd")
ALWAYS_ON = ("iommufd",)
FIRST, SECOND = b"left pending", bytes(range(200, 210))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source() -> Iterator[str]:
    with mdev("mtty", "mtty-2") as name:
        yield name


@pytest.fixture
def target() -> Iterator[str]:
    with mdev("mtty", "mtty-2") as name:
        yield name


def leave_pending(device: Device) -> None:
    SerialPort(device, 0).send(FIRST)
    second = SerialPort(device, 1)
    second.registers.scratch.write(0x5C)
    second.send(SECOND)


def assert_arrived(device: Device) -> None:
    second = SerialPort(device, 1, clear=False)
    assert SerialPort(device, 0, clear=False).receive() == FIRST
    assert second.receive() == SECOND
    assert second.registers.scratch.read() == 0x5C


def test_an_mtty_tells_what_it_can(backend: str, source: str) -> None:
    with Device.open(source, backend=backend) as device:
        support = probe(device)
        assert support is not None
        assert (support.stop_copy, support.pre_copy, support.p2p) == (True, True, True)
        assert support.dirty_log
        # Two ports of struct serial_port behind a header of 24 bytes; the kernel's own number.
        assert support.size_bytes is not None and support.size_bytes > 24


def test_a_device_s_own_log_of_dirty_pages_is_started_read_and_stopped(
    backend: str, source: str
) -> None:
    """mtty has the calls and never writes to memory."""
    with Device.open(source, backend=backend) as device:
        for _ in range(2):
            with DirtyLog(device, [(0x100000, 0x100000), (0x400000, 0x1000)]) as log:
                if not Path("/dev/iommu").exists():
                    # Debian's 6.12 starts a log and then has no code to report it.
                    with pytest.raises(Unsupported, match="built without"):
                        log.report(0x100000, 0x100000)
                    continue
                assert log.report(0x100000, 0x100000) == bytes(256 // 8)
                assert log.report(0x400000, 0x1000) == bytes(8)
            with pytest.raises(UsageError, match="is closed"):
                log.report(0x100000, 0x1000)
        # Ranges that overlap are the kernel's to refuse.
        with pytest.raises(KernelError, match="dma-logging-start"):
            DirtyLog(device, [(0x100000, 0x2000), (0x101000, 0x1000)])
    with (
        mdev("mdpy", "mdpy-vga") as name,
        Device.open(name, backend=backend) as device,
        pytest.raises(Unsupported, match="no feature dma-logging-start"),
    ):
        DirtyLog(device, [(0x100000, 0x1000)])


def test_a_device_without_migration_says_so(backend: str) -> None:
    with mdev("mdpy", "mdpy-vga") as name, Device.open(name, backend=backend) as device:
        assert probe(device) is None
        with pytest.raises(Unsupported, match="cannot migrate"):
            Migration(device)


@pytest.mark.parametrize("pre_copy", [False, True])
def test_pending_bytes_are_read_on_the_other_device(
    backend: str, source: str, target: str, pre_copy: bool
) -> None:
    pieces: list[bytes] = []
    with Device.open(source, backend=backend) as device:
        leave_pending(device)
        migration = Migration(device)
        assert migration.state == RUNNING
        report = migration.save(pieces.append, pre_copy=pre_copy)
        assert migration.state == STOP
        assert (report.running_bytes > 0) == pre_copy
        assert report.running_bytes + report.stopped_bytes == sum(map(len, pieces))
        assert report.running_bytes + report.stopped_bytes == migration.support.size_bytes
    with Device.open(target, backend=backend) as device:
        assert SerialPort(device, 0).receive() == b""
        migration = Migration(device)
        whole = b"".join(pieces)
        # The kernel asks for the order of the bytes alone: other pieces must do as well.
        assert migration.restore(whole[n : n + 7] for n in range(0, len(whole), 7)) == len(whole)
        assert migration.state == RUNNING
        assert_arrived(device)


def test_a_saved_device_can_go_on(backend: str, source: str) -> None:
    before = None
    with Device.open(source, backend=backend) as device:
        leave_pending(device)
        migration = Migration(device)
        before = open_descriptors()
        for _ in range(5):
            migration.save(lambda piece: None, keep_running=True)
            assert migration.state == RUNNING
        assert len(open_descriptors()) == len(before)
        assert_arrived(device)


def test_a_save_that_fails_leaves_the_device_running(backend: str, source: str) -> None:
    class Full(Exception):
        pass

    def sink(piece: bytes) -> None:
        raise Full

    with Device.open(source, backend=backend) as device:
        leave_pending(device)
        migration = Migration(device)
        before = open_descriptors()
        for pre_copy in (True, False):
            with pytest.raises(Full):
                migration.save(sink, pre_copy=pre_copy)
            assert migration.state == RUNNING
        assert len(open_descriptors()) == len(before)
        assert_arrived(device)


def test_a_state_of_another_kind_is_refused_and_the_device_lives_on(
    backend: str, source: str
) -> None:
    pieces: list[bytes] = []
    with Device.open(source, backend=backend) as device:
        leave_pending(device)
        Migration(device).save(pieces.append)
    whole = b"".join(pieces)
    with mdev("mtty", "mtty-1") as single, Device.open(single, backend=backend) as device:
        port = SerialPort(device)
        port.send(b"mine")
        migration = Migration(device)
        for wrong in (whole, bytes(len(whole)), whole[:30], b""):
            with pytest.raises(KernelError):
                migration.restore(iter([wrong]))
            assert migration.state == RUNNING
        port.send(b"!")
        assert port.receive().endswith(b"!")


def test_an_impossible_move_names_the_state_it_ended_in(backend: str, source: str) -> None:
    with Device.open(source, backend=backend) as device:
        migration = Migration(device)
        migration.move(STOP)
        with pytest.raises(KernelError, match="it is in"):
            migration.move(ERROR)
        migration.move(RUNNING)
        data = migration.move(PRE_COPY)
        assert migration.precopy_left(data)[0] == 24
        migration.move(RUNNING)


def test_the_commands_carry_a_state_through_a_file(
    backend: str, source: str, target: str, tmp_path: Path
) -> None:
    def state(*arguments: str, code: int = 0) -> dict[str, object]:
        command = [sys.executable, "-m", "vfiotool", "device", "state", *arguments]
        done = subprocess.run(
            [*command, "--backend", backend, "--json"], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    with Device.open(source, backend=backend) as device:
        leave_pending(device)
    shown = state("show", source)
    assert (shown["can_migrate"], shown["state"], shown["pre_copy"]) == (True, "running", True)
    with mdev("mdpy", "mdpy-vga") as other:
        shown = state("show", other)
        assert (shown["can_migrate"], shown["state"]) == (False, None)
        assert shown["reason"] == "its driver mdpy saves no state"
    file = tmp_path / "saved"
    saved = state("save", source, "--output", str(file))
    assert saved["running_bytes"] == 24 and saved["state"] == "stop"
    assert list(tmp_path.iterdir()) == [file]
    damaged = tmp_path / "damaged"
    damaged.write_bytes(file.read_bytes()[:-40] + bytes(8) + file.read_bytes()[-32:])
    refused = state("restore", target, "--input", str(damaged), code=2)
    assert "damaged" in str(refused["error"])
    assert state("restore", target, "--input", str(file))["state"] == "running"
    with Device.open(target, backend=backend) as device:
        assert_arrived(device)
