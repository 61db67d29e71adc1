"""What is kept of a VDUSE device for the next server."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from vfiotool.errors import NotPermitted, UsageError
from vfiotool.virtio import vduse_files
from vfiotool.virtio.block import DiskSettings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    return tmp_path / "vduse"


def test_the_log_lies_in_the_services_own_folder(folder: Path) -> None:
    assert vduse_files.log_path("vd0") == f"{folder}/vd0.log"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_user_has_a_folder_of_his_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert vduse_files.log_path("vd0") == f"{tmp_path}/vfiotool/vduse/vd0.log"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(NotPermitted, match="no runtime folder"):
        vduse_files.log_path("vd0")


def test_a_disk_is_found_again_by_where_it_lies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vduse_files.log_path("vd0")
    settings = DiskSettings("disk.raw", 4096, 512, serial="a", queues=3)
    vduse_files.save_disk("vd0", settings)
    found = vduse_files.saved_disk("vd0")
    assert found is not None and found.path == str(tmp_path / "disk.raw")
    assert (found.size, found.offset, found.serial, found.queues) == (4096, 512, "a", 3)
    vduse_files.forget("vd0")
    assert vduse_files.saved_disk("vd0") is None and not list(folder.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"path": 1}', "{" * 100])
def test_what_is_not_ours_is_no_disk(folder: Path, text: str) -> None:
    vduse_files.log_path("vd0")
    (folder / "vd0.json").write_text(text)
    assert vduse_files.saved_disk("vd0") is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../etc/x"])
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(UsageError):
        vduse_files.log_path(name)
