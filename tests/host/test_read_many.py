"""Many files and links of one folder at once: a directory by one call of C, others one by one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vfiotool.host.tree import MemoryTree, OsTree, Tree
from vfiotool.native.folder import read_folder

FILES = ("empty", "short", "page", "two-pages", "long", "absent", "folder", "locked", "loop")
LINKS = ("up", "far", "loop", "absent", "short")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"0x8086\n\0\xff")
    (tmp_path / "page").write_bytes(b"p" * 4096)
    (tmp_path / "two-pages").write_bytes(b"q" * 8193)
    (tmp_path / "long").write_bytes(b"l" * 100_000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "up").symlink_to("../../bus/pci/drivers/nvme")
    (tmp_path / "far").symlink_to("x/" * 1500 + os.fsdecode(b"\xff"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "locked").write_bytes(b"not shown")
    (tmp_path / "locked").chmod(0)
    return tmp_path


def test_the_answers_are_those_of_single_reads(folder: Path) -> None:
    tree = OsTree(str(folder))
    for files, links in (
        (FILES, LINKS),
        (FILES[:2], LINKS[:1]),
        (FILES, ()),
        ((), LINKS),
        ((), ()),
    ):
        contents, targets = tree.read_many("", files, links)
        assert (contents, targets) == Tree.read_many(tree, "", files, links)
        assert len(contents) == len(files) and len(targets) == len(links)


def test_absent_unreadable_and_failed_are_told_apart(folder: Path) -> None:
    for few in (slice(2), slice(None)):
        names = ("absent", "folder", "loop", "short")[few]
        contents, _ = read_folder(str(folder), names, ())
        assert contents == [errno.ENOENT, errno.EISDIR, errno.ELOOP, b"0x8086\n\0\xff"][few]
        links = ("short", "absent", "up", "loop")[few]
        _, targets = read_folder(str(folder), (), links)
        found = [errno.EINVAL, errno.ENOENT, "../../bus/pci/drivers/nvme", "loop"]
        assert targets == found[few]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_refused(folder: Path) -> None:
    assert read_folder(str(folder), ("locked",), ())[0] == [errno.EACCES]


def test_a_folder_that_is_gone_is_told_of_each(tmp_path: Path) -> None:
    for names in (("a",), ("a", "b", "c", "d")):
        number = errno.ENOENT
        gone = read_folder(str(tmp_path / "gone"), names, names)
        assert gone == ([number] * len(names), [number] * len(names))
    (tmp_path / "file").write_bytes(b"")
    assert set(read_folder(str(tmp_path / "file"), ("a", "b", "c", "d"), ())[0]) == {errno.ENOTDIR}


def test_a_file_without_an_end_is_refused(folder: Path) -> None:
    (folder / "endless").symlink_to("/dev/zero")
    (folder / "huge").write_bytes(bytes((1 << 20) + 1))
    for more in ((), ("short", "empty", "page")):
        contents, _ = read_folder(str(folder), ("endless", "huge", *more), ())
        assert contents[:2] == [errno.EFBIG, errno.EFBIG]
        assert all(isinstance(content, bytes) for content in contents[2:])


def test_a_path_too_long_is_an_error_of_that_name(folder: Path) -> None:
    name = "n" * 5000
    for more in ((), ("short", "empty", "page")):
        assert read_folder(str(folder), (name, *more), (name,))[0][0] == errno.ENAMETOOLONG


def test_wrong_arguments_are_refused_and_leak_nothing(folder: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for wrong in (("a\0b",), (1,), ("short", None)):
        with pytest.raises((TypeError, ValueError)):
            read_folder(str(folder), wrong, ())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        read_folder(str(folder), ["short"], ())  # type: ignore[arg-type]
    read_folder(str(folder), FILES, LINKS)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_tree_in_memory_answers_the_same_way() -> None:
    tree = MemoryTree({"/sys/a": b"1\n", "/sys/b": errno.EIO}, {"/sys/c": "../d"})
    contents, targets = tree.read_many("/sys", ("a", "b", "x"), ("c", "a"))
    assert contents == [b"1\n", errno.EIO, errno.ENOENT]
    assert targets == ["../d", errno.ENOENT]
