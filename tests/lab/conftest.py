"""What runs in here runs in lab guests only: it binds, unbinds and mounts for real.

tests/guests/test_in_guests.py boots the guests and reports each file's outcome on the host.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

IN_GUEST = "VFIOTOOL_LAB_KERNEL" in os.environ
HERE = Path(__file__).parent

collect_ignore_glob = [] if IN_GUEST else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip even what was named on the command line: this machine's devices are in use."""
    if IN_GUEST:
        return
    reason = "runs in a lab guest only: vfiotool lab run -- python -m pytest tests/lab/…"
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def lab_kernel() -> str:
    """The lab's name of the kernel that this guest runs: 6.1, 6.12 or iommufd."""
    return os.environ["VFIOTOOL_LAB_KERNEL"]


@pytest.fixture(scope="session")
def lab_machine() -> str:
    """The lab's name of the machine that this guest is."""
    return os.environ["VFIOTOOL_LAB_MACHINE"]
