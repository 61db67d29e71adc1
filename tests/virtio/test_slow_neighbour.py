"""One disk that answers late does not hold its neighbours on the same worker."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SYS_IO_URING_SETUP = 425


def why_not() -> str | None:
    """Why a slow file cannot be had, or would be waited for."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "a file system of its own needs root and /dev/fuse"
    if shutil.which("unshare") is None:
        return "no unshare"
    libc = ctypes.CDLL(None, use_errno=True)
    # Of no entries and without parameters: EFAULT or EINVAL where the call is there and allowed.
    libc.syscall(_SYS_IO_URING_SETUP, 0, None)
    if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
        return "no io_uring here"
    return None


def test_a_disk_that_answers_late_holds_no_neighbour_and_is_drained_when_it_stops(
    tmp_path: Path,
) -> None:
    run(tmp_path, "drained")


def test_what_a_late_disk_has_not_done_goes_along_in_the_log_when_a_machine_moves(
    tmp_path: Path,
) -> None:
    run(tmp_path, "suspended")


def run(tmp_path: Path, way: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path / "mount"
    folder.mkdir()
    command = ["unshare", "--mount", "--propagation", "private", sys.executable]
    command += ["-m", "tests.virtio.slow_neighbour", str(folder), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "mount of fuse" in done.stderr:
        pytest.skip("file systems may not be mounted here")
    assert (done.returncode, done.stderr) == (0, "")
