"""Models served for the time of a test, and counters of what a process holds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vfiotool.models import Model, ModelServer
from vfiotool.vfio import Device

Kind = TypeVar("Kind", bound=Model)


@contextmanager
def serving(
    model: Model, *, twin: bool = True, report: Callable[[str], object] | None = None
) -> Iterator[ModelServer]:
    """`model` on a socket in a folder of its own: pytest's paths can be too long for one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ModelServer(model, f"{folder}/model.sock", twin=twin, report=report) as server,
    ):
        yield server


@contextmanager
def opened(model: Model, *, twin: bool = True) -> Iterator[Device]:
    """The device that `model` is, opened over vfio-user."""
    with serving(model, twin=twin) as server, Device.open(server.name) as device:
        yield device


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def resident_kib() -> int:
    """This process's memory, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")
