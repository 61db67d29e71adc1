"""VDUSE on a real kernel: a served image is a disk of this host, or a vhost device for a VM, and
nothing is lost when its server is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.commands import modprobe, vfiotool
from vfiotool.change.journal import RUN_FOLDER

MACHINE = "basic"
KERNELS = ("6.12",)

MIB = 1 << 20
NAME = "vd0"
WAIT_S = 60.0
BLOCKS = 256


def until(holds: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def modules() -> None:
    modprobe("vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk", "ext4")
    if not Path("/dev/vduse/control").exists():
        pytest.skip("this kernel has no VDUSE")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "image.raw"
    with made.open("wb") as file:
        file.truncate(64 * MIB)
    return made


def start(image: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vfiotool", "serve", "vduse-blk", NAME]
    return subprocess.Popen([*command, "--blk-file", str(image), "--serial", "a-serial", *options])


def disks() -> set[str]:
    return {name for name in os.listdir("/sys/block") if name.startswith("vd")}


@contextmanager
def served_disk(image: Path, *options: str) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]]]]:
    """The image as a disk of this host; the list holds its server, and may be given another."""
    before = disks()
    servers = [start(image, "--attach", "virtio", *options)]
    try:
        until(lambda: bool(disks() - before), "no disk appeared")
        (name,) = disks() - before
        until(Path(f"/dev/{name}").exists, "no node appeared")
        # The node is there before the kernel has read its partitions: the change ends after that.
        until(lambda: not list(Path(RUN_FOLDER).glob("boot-*/*.open")), "the attach went on")
        yield Path(f"/dev/{name}"), servers
    finally:
        subprocess.run(["umount", "/mnt"], check=False, capture_output=True)
        removed = vfiotool("vdpa", "remove", NAME)
        servers[-1].send_signal(signal.SIGTERM)
        code = servers[-1].wait(WAIT_S)
    assert (removed.code, code) == (0, 0), removed.err
    assert not Path(f"/dev/vduse/{NAME}").exists()
    assert os.listdir("/run/vfiotool/vduse") == []


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def test_the_host_has_a_disk_with_a_file_system(image: Path) -> None:
    with served_disk(image, "--queues", "2") as (disk, _):
        assert Path(f"/sys/block/{disk.name}/serial").read_text() == "a-serial"
        assert os.listdir(f"/sys/block/{disk.name}/mq")
        run("mkfs.ext4", "-q", str(disk))
        run("mount", str(disk), "/mnt")
        data = random.Random(1).randbytes(8 * MIB)
        Path("/mnt/file").write_bytes(data)
        run("umount", "/mnt")
        run("mount", str(disk), "/mnt")
        assert Path("/mnt/file").read_bytes() == data
        run("umount", "/mnt")
        run("fsck.ext4", "-fn", str(disk))


def test_a_server_that_is_killed_in_mid_write_is_followed_without_loss(image: Path) -> None:
    """Each block holds its own number and turn, so that a lost or a late write would be seen."""
    with served_disk(image) as (disk, servers):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(disk), str(BLOCKS)], stdout=-1
        )
        assert writer.stdout is not None
        for _ in range(3):
            # In the middle of a turn: the writer says when one begins.
            assert writer.stdout.readline().startswith(b"turn")
            servers[-1].kill()
            servers[-1].wait()
            servers.append(start(image))
        assert writer.wait(WAIT_S) == 0
        with disk.open("rb") as file:
            for number in range(BLOCKS):
                assert file.read(4096) == b"%08d%08d" % (number, 7) * 256, number


_WRITER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
for turn in range(8):
    print("turn", turn, flush=True)
    for number in range(int(sys.argv[2])):
        page[:] = b"%08d%08d" % (number, turn) * 256
        assert os.pwrite(fd, page, 4096 * number) == 4096
os.fsync(fd)
"""


def test_a_vm_may_have_it_instead(image: Path) -> None:
    server = start(image, "--attach", "vhost")
    try:
        until(lambda: any(Path("/dev").glob("vhost-vdpa-*")), "no vhost device appeared")
    finally:
        removed = vfiotool("vdpa", "remove", NAME)
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0
    assert removed.code == 0, removed.err


def test_two_servers_of_one_name_and_bad_names_are_refused(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    with served_disk(image):
        assert start(other).wait(WAIT_S) == 4
    done = vfiotool("serve", "vduse-blk", "a/b", "--ram", "1M")
    assert done.code == 2 and "cannot be a VDUSE device's name" in done.err


def listed() -> dict[str, object]:
    done = vfiotool("--json", "vduse", "list")
    assert done.code == 0, done.err
    (device,) = done.json["vduses"]
    return dict(device)


def test_an_image_that_grew_is_offered_in_its_new_size(image: Path) -> None:
    with served_disk(image) as (disk, servers):
        size = Path(f"/sys/block/{disk.name}/size")
        assert vfiotool("vduse", "resize", NAME).out == "unchanged\n"
        os.truncate(image, 96 * MIB)
        assert vfiotool("vduse", "resize", NAME).out == "resized\n"
        until(lambda: int(size.read_text()) == 96 * 2048, "the disk kept its size")
        os.truncate(image, 128 * MIB)
        servers[-1].send_signal(signal.SIGHUP)
        until(lambda: int(size.read_text()) == 128 * 2048, "the disk kept its size")


def test_a_device_whose_server_died_is_drained_and_only_then_removed(image: Path) -> None:
    """In the middle of writes: detaching it is refused, and rescue ends them first."""
    before = disks()
    server = start(image, "--attach", "virtio")
    until(lambda: bool(disks() - before), "no disk appeared")
    (name,) = disks() - before
    disk = Path(f"/dev/{name}")
    until(disk.exists, "no node appeared")
    found = listed()
    assert (found["state"], found["pid"]) == ("served", server.pid)
    assert (found["driver"], found["disks"]) == ("virtio_vdpa", [name])
    refused = vfiotool("--json", "vduse", "rescue", NAME)
    assert refused.code == 4 and "nothing to rescue" in refused.json["error"]["message"]

    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(disk), str(BLOCKS)], stdout=-1)
    assert writer.stdout is not None and writer.stdout.readline().startswith(b"turn")
    server.kill()
    server.wait()
    until(lambda: bool(listed()["in_flight"]), "nothing was in flight")
    assert listed()["state"] == "abandoned"
    refused = vfiotool("--json", "vdpa", "remove", NAME)
    assert refused.code == 4, refused.out
    assert "its server is gone, with" in refused.json["error"]["message"]

    rescued = vfiotool("--json", "vduse", "rescue", NAME)
    assert (rescued.code, rescued.json["outcome"]) == (0, "removed"), rescued.out
    # The writer had all its turns before anything was taken away.
    assert writer.wait(WAIT_S) == 0
    with image.open("rb") as file:
        for number in range(BLOCKS):
            assert file.read(4096) == b"%08d%08d" % (number, 7) * 256, number
    assert disks() == before and not Path(f"/dev/vduse/{NAME}").exists()
    assert os.listdir("/run/vfiotool/vduse") == []


def test_a_rescue_removes_nothing_that_stays_in_use(image: Path) -> None:
    with served_disk(image) as (disk, servers):
        run("mkfs.ext4", "-q", str(disk))
        run("mount", str(disk), "/mnt")
        servers[-1].kill()
        servers[-1].wait()
        done = vfiotool("--json", "vduse", "rescue", NAME, "--timeout", "2")
        assert done.code == 4 and "/mnt" in done.json["error"]["message"], done.out
        assert listed()["attached"] is True
        servers.append(start(image))
        until(lambda: listed()["state"] == "served", "it was not taken up")
        run("umount", "/mnt")
        run("fsck.ext4", "-fn", str(disk))


def test_a_server_that_does_not_answer_is_said_to_be_mute(image: Path) -> None:
    with served_disk(image) as (_, servers):
        servers[-1].send_signal(signal.SIGSTOP)
        until(lambda: listed()["state"] == "mute", "it was not seen")
        refused = vfiotool("--json", "vduse", "rescue", NAME)
        assert refused.code == 4 and "does not answer" in refused.json["error"]["message"]
        refused = vfiotool("--json", "vdpa", "remove", NAME)
        assert refused.code == 4 and "does not answer" in refused.json["error"]["message"]
        servers[-1].send_signal(signal.SIGCONT)
        until(lambda: listed()["state"] == "served", "it stayed mute")
