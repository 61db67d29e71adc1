"""Folders of guests: gone at the end, and at the next start where their maker was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vfiotool.lab.scratch import scratch_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_its_user_s_alone_and_goes_at_the_end(place: Path) -> None:
    with scratch_folder("guest") as folder:
        assert folder.parent == place and folder.name.startswith("vfiotool-guest-")
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "console").write_text("x")
    assert not list(place.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_one(place: Path) -> None:
    code = (
        "import sys, time\n"
        "from vfiotool.lab.scratch import scratch_folder\n"
        "with scratch_folder('guest') as folder:\n"
        "    (folder / '0.sock').touch()\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(place)}
    ) as child:
        assert child.stdout is not None
        theirs = Path(child.stdout.readline().strip())
        # While it lives nobody takes it away.
        with scratch_folder("guest") as ours:
            assert theirs.is_dir() and ours.is_dir()
        assert list(place.iterdir()) == [theirs]
        child.send_signal(signal.SIGKILL)
    with scratch_folder("sockets"):
        assert theirs.is_dir()
    with scratch_folder("guest") as ours:
        assert list(place.iterdir()) == [ours]


def test_what_a_link_leads_to_stays(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "vfiotool-guest-link").symlink_to(place / "mine")
    (place / "vfiotool-guest-file").write_text("x")
    with scratch_folder("guest"):
        assert (place / "mine").is_dir() and (place / "vfiotool-guest-link").is_symlink()
        assert (place / "vfiotool-guest-file").exists()


def test_a_full_place_leaves_nothing(place: Path) -> None:
    tempfile.tempdir = str(place / "nowhere")
    with pytest.raises(FileNotFoundError), scratch_folder("guest"):
        pass
    assert not list(place.iterdir())
