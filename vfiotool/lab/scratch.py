"""Folders for the files and sockets of guests, which do not outlive who made them for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """A folder of mode 0700 below the system's folder for such, until the end of the block. Those
    of this kind and user whose makers were killed are removed first."""
    prefix = f"vfiotool-{kind}-"
    _sweep(prefix)
    # Under its name it is there only once it is locked: until then it would be as one left behind.
    made = Path(tempfile.mkdtemp(prefix=f".{prefix}"))
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = made.rename(made.with_name(made.name[1:]))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _sweep(prefix: str) -> None:
    """Remove what is locked by nobody: a lock goes with its process (flock(2))."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            # Of links and of others' folders nothing is touched.
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(lock)
