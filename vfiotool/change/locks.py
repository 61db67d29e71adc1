"""Which locks a plan needs, and holding them.

A lock is a flock(2) on a file of the state folder: it dies with its process, and the writing
children do not inherit it. All are taken in one fixed order, the sorted one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from vfiotool.change.folder import Folder
from vfiotool.change.steps.base import Step
from vfiotool.errors import KernelError
from vfiotool.host.host import Host


def lock_keys(host: Host, steps: Iterable[Step]) -> tuple[str, ...]:
    """The names of all locks that the steps need, in the order in which they are taken."""
    keys: set[str] = set()
    for step in steps:
        keys |= step.lock_keys(host)
    return tuple(sorted(keys))


@contextmanager
def held(folder: Folder, keys: Iterable[str], timeout_s: float) -> Iterator[None]:
    """Hold all `keys`. Raises KernelError if another vfiotool keeps one for `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        for key in sorted(keys):
            descriptor = folder.open(key, os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, descriptor)
            _take(descriptor, key, deadline, timeout_s)
        yield


def _take(descriptor: int, key: str, deadline: float, timeout_s: float) -> None:
    pause = 0.001
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            raise KernelError(
                f"another vfiotool has been changing {key.replace('-', ' ', 1)} for over "
                f"{timeout_s:g} s",
                hint="wait for it, or see: vfiotool history",
                errno_name="EBUSY",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file, unless another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
