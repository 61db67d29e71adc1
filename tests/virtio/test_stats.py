"""`--stats`: what each disk does a second, by a clock in the test's hand."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.virtio.frontend import Frontend
from tests.virtio.test_serve import VFIOTOOL, connect, run
from vfiotool.cli.serve_stats import as_line
from vfiotool.native.virtqueue import DiskFigures
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.server import Export, Server
from vfiotool.virtio.stats import DiskCounters, Stats, rates

MIB = 1 << 20
NONE = DiskFigures(**dict.fromkeys(DiskFigures.__dataclass_fields__, 0))


def test_rates_are_differences_over_the_time_between() -> None:
    before = DiskCounters(replace(NONE, reads=10, bytes_read=4096, failed=1), waits=5)
    figures = replace(NONE, reads=30, bytes_read=4096 + MIB, writes=4, flushes=2, failed=2)
    found = rates("vm1", before, DiskCounters(figures, waits=8), 2.0)
    assert (found.reads, found.bytes_read, found.writes) == (10.0, MIB / 2, 2.0)
    assert as_line(found) == (
        "vm1: 10 reads/s (512.0 KiB/s), 2 writes/s (0 B/s), 2 flushes, 1 failed,"
        " waited 3 times for its limits"
    )
    idle = rates("vm1", before, before, 2.0)
    assert as_line(idle) == "vm1: 0 reads/s (0 B/s), 0 writes/s (0 B/s)"


def test_disks_that_come_and_go_between_two_looks_are_no_jumps(tmp_path: Path) -> None:
    now = 10.0

    def add(name: str) -> None:
        server.add(Export(name, BlockDisk(DiskSettings(size=MIB)), listen(str(tmp_path / name))))

    with Server(clock=lambda: now) as server:
        add("one")
        add("two")
        stats = Stats(server, clock=lambda: now)
        server.remove("two")
        add("three")
        now += 1
        assert [one.name for one in stats.take()] == ["one"]
        now += 1
        assert [one.name for one in stats.take()] == ["one", "three"]


def test_periods_are_kept_by_the_servers_clock_and_late_ones_are_left_out() -> None:
    now, done = 0.0, []
    with Server(clock=lambda: now) as server:
        server.every(2.0, lambda: done.append(now))
        for moment in (1.9, 2.0, 3.0, 9.0, 10.9, 11.0):
            now = moment
            server._keep_periods()
    assert done == [2.0, 9.0, 11.0]


def test_a_server_prints_what_its_disk_does(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    command = [*VFIOTOOL, "serve", "vhost-user-blk", "--ram", "1M", "--stats", "0.1"]
    command += ["--socket-path", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            front: Frontend = connect(path, process)
            front.up()
            assert process.stdout is not None
            for line in process.stdout:
                assert line.startswith("disk: ")
                assert front.write(0, b"s" * 512) == 0
                if " 0 writes/s" not in line:
                    break
            front.close()
        finally:
            process.terminate()
            process.wait(timeout=20)
    assert process.returncode == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "1e9", "nan"])
def test_a_time_that_is_none_is_refused(seconds: str) -> None:
    options = ("--ram", "1M", "--socket-path", "/nowhere/s", "--stats", seconds)
    code, out, said = run("vhost-user-blk", *options)
    assert (code, out) == (2, "") and "--stats" in said
