"""The way to the host: reading, deadlines, and the one way to write."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from vfiotool.errors import KernelError, NotPermitted, Stuck, UsageError
from vfiotool.host import child as host_child
from vfiotool.host.child import write_in_child
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree, OsTree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sys/class/thing").mkdir(parents=True)
    (tmp_path / "sys/class/thing/value").write_text("0x10\n")
    (tmp_path / "sys/class/thing/driver").symlink_to("../../bus/pci/drivers/edu")
    return tmp_path


def test_reading_an_absent_file_gives_none(root: Path) -> None:
    host = Host.at(str(root))
    assert host.read("/sys/class/thing/absent") is None
    assert host.listdir("/sys/class/absent") == []
    assert host.linkname("/sys/class/thing/value") is None


def test_numbers_and_links_are_read(root: Path) -> None:
    host = Host.at(str(root))
    assert host.read_int("/sys/class/thing/value") == 16
    assert host.linkname("/sys/class/thing/driver") == "edu"
    assert host.realpath("/sys/class/thing/driver") == "/sys/bus/pci/drivers/edu"


def test_a_root_without_sys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no sys/"):
        Host.at(str(tmp_path))


def test_another_root_is_never_written(root: Path) -> None:
    with pytest.raises(UsageError, match="not the running host"):
        Host.at(str(root)).write_attribute("/sys/class/thing/value", "1")
    assert (root / "sys/class/thing/value").read_text() == "0x10\n"


def test_a_write_reaches_the_file_in_one_piece(tmp_path: Path) -> None:
    target = tmp_path / "attribute"
    target.write_text("")
    write_in_child(str(target), b"0000:00:01.0", timeout_s=5)
    assert target.read_bytes() == b"0000:00:01.0"


def test_a_write_reports_the_errno_of_the_kernel(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        write_in_child(str(tmp_path / "absent"), b"1", timeout_s=5)
    assert caught.value.errno == errno.ENOENT


def test_a_short_write_is_an_error() -> None:
    with pytest.raises(OSError) as caught:
        write_in_child("/dev/full", b"1", timeout_s=5)
    assert caught.value.errno == errno.ENOSPC


def test_a_write_that_hangs_is_stuck_after_its_deadline(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    begun = time.monotonic()
    with pytest.raises(Stuck, match=r"no answer after 0\.2 s"):
        write_in_child(str(fifo), b"1", timeout_s=0.2)
    assert time.monotonic() - begun < 2
    # The child still waits in open(2): give it the reader that it waits for, so that it ends.
    descriptor = os.open(fifo, os.O_RDONLY)
    assert os.read(descriptor, 8) == b"1"
    os.close(descriptor)


def test_a_child_that_was_left_behind_is_reaped_by_the_next(tmp_path: Path) -> None:
    def zombies() -> list[str]:
        children = Path("/proc/self/task").glob("*/children")
        pids = [pid for path in children for pid in path.read_text().split()]
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in pids]
        return [state for state in states if state.split()[0] == "Z"]

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(Stuck):
        write_in_child(str(fifo), b"1", timeout_s=0.05)
    descriptor = os.open(fifo, os.O_RDONLY)
    assert os.read(descriptor, 8) == b"1"
    os.close(descriptor)
    while not zombies():
        time.sleep(0.005)
    (tmp_path / "plain").touch()
    write_in_child(str(tmp_path / "plain"), b"1", timeout_s=5)
    assert zombies() == []


def test_the_writing_child_holds_no_descriptor_of_its_parent(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader, writer = os.pipe()
    with pytest.raises(Stuck):
        write_in_child(str(fifo), b"1", timeout_s=0.2)
    os.close(writer)
    os.set_blocking(reader, False)
    # End of file, not EAGAIN: nobody else holds the pipe's writing end.
    assert os.read(reader, 1) == b""
    os.close(reader)
    os.close(os.open(fifo, os.O_RDONLY))


def test_a_read_that_hangs_leaves_the_others_readable(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1\n")
    (tmp_path / "two").write_text("2\n")
    names = [str(tmp_path / name) for name in ("one", "absent", "two")]
    answers = Host(OsTree(), live=True, name="this host").read_guarded(names, timeout_s=1)
    assert answers == {names[0]: "1", names[1]: None, names[2]: "2"}


def test_a_hanging_read_is_given_up_after_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    real = host_child._read_once

    def read(path: str, offset: int, length: int) -> bytes:
        if path == "hang":
            time.sleep(20)
        return real(path, offset, length)

    monkeypatch.setattr(host_child, "_read_once", read)
    host = Host.local()
    begun = time.monotonic()
    answers = host.read_guarded(["/proc/self/comm", "hang", "/proc/version"], 0.3)
    with pytest.raises(Stuck):
        host.read_locked("hang", 0.3)
    with pytest.raises(Stuck):
        host.read_at("hang", 256, 4, 0.3)
    assert 0.9 <= time.monotonic() - begun < 10
    assert host.read_at("/proc/self/comm", 1, 2, 5.0) == host.read_bytes("/proc/self/comm")[1:3]
    assert answers["hang"] is None
    assert answers["/proc/self/comm"] and answers["/proc/version"]
    assert host.read_locked("/proc/no such file", 0.3) is None


def memory() -> MemoryTree:
    return MemoryTree(
        {
            "/sys/devices/pci0000:00/0000:00:01.0/vendor": b"0x1234\n",
            "/sys/devices/pci0000:00/0000:00:01.0/config": errno.EIO,
        },
        {
            "/sys/bus/pci/devices/0000:00:01.0": "../../../devices/pci0000:00/0000:00:01.0",
            "/sys/loop": "loop",
        },
        ["/sys/kernel/iommu_groups"],
    )


def test_a_memory_tree_follows_links_as_a_kernel_would() -> None:
    host = Host(memory(), live=False, name="memory")
    base = "/sys/bus/pci/devices/0000:00:01.0"
    assert host.read(f"{base}/vendor") == "0x1234"
    assert host.listdir(base) == ["config", "vendor"]
    assert host.listdir("/sys/bus/pci/devices") == ["0000:00:01.0"]
    assert host.isdir("/sys/kernel/iommu_groups")
    with pytest.raises(OSError) as caught:
        host.read_bytes(f"{base}/config")
    assert caught.value.errno == errno.EIO


def test_a_link_that_loops_is_an_error_and_not_a_hang() -> None:
    host = Host(memory(), live=False, name="memory")
    assert host.read("/sys/loop/x") is None
    assert not host.exists("/sys/loop")


@pytest.mark.parametrize(
    ("number", "branch"), [(errno.EACCES, NotPermitted), (errno.EBUSY, KernelError)]
)
def test_a_refused_write_names_the_errno(number: int, branch: type[KernelError]) -> None:
    class Refusing(MemoryTree):
        def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
            raise OSError(number, os.strerror(number), path)

    host = Host(Refusing({}, {}), live=True, name="fake")
    with pytest.raises(branch) as caught:
        host.write_attribute("/sys/bus/pci/drivers_probe", "0000:00:01.0")
    assert caught.value.errno_name == errno.errorcode[number]
    assert "/sys/bus/pci/drivers_probe" in caught.value.message


def test_a_part_of_a_file_is_read_alike_from_every_kind_of_tree(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys" / "config").write_bytes(bytes(range(256)))
    laid_out = Host.at(str(tmp_path))
    held = Host(MemoryTree({"/sys/config": bytes(range(256))}, {}), live=False, name="memory")
    for host in (laid_out, held):
        assert host.read_at("/sys/config", 250, 4) == bytes((250, 251, 252, 253))
        assert host.read_at("/sys/config", 250, 12) == bytes(range(250, 256))
        assert host.read_at("/sys/config", 4096, 4) == b""
        with pytest.raises(OSError, match="No such file"):
            host.read_at("/sys/nothing", 0, 4)
