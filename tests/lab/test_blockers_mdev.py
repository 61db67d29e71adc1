"""Mediated devices in use, with the kernel's own sample."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.blockers_guest import assert_passable, blockers, need, why

MACHINE = "mdev"
KERNELS = ("6.1", "6.12", "iommufd")

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
CREATE = Path("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create")


@pytest.fixture
def mdev() -> Iterator[Path]:
    need("mtty")
    CREATE.write_text(UUID)
    device = Path("/sys/bus/mdev/devices", UUID)
    try:
        yield device
    finally:
        (device / "remove").write_text("1")


def test_a_fresh_mediated_device_is_passable(mdev: Path) -> None:
    code, answer = why(UUID)
    assert (code, answer["blockers"], answer["address"]) == (0, [], UUID)
    assert answer["group"]["devices"][0]["role"] == "mdev"
    assert answer["next"][-1] == f"vfiotool vm qemu {UUID}"


def test_a_mediated_device_that_is_held_is_in_use(mdev: Path) -> None:
    node = Path("/dev/vfio", (mdev / "iommu_group").resolve().name)
    descriptor = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    child = subprocess.Popen(["sleep", "1000"], stdin=descriptor)
    os.close(descriptor)
    try:
        (entry,) = blockers(UUID, "open-file")
        assert entry["evidence"] == f"pid {child.pid} (sleep) has {node} open"
    finally:
        child.kill()
        child.wait()
    assert_passable(UUID)


def test_without_its_driver_it_is_not_passable(mdev: Path) -> None:
    assert_passable(UUID)
    ((mdev / "driver").resolve() / "unbind").write_text(UUID)
    (entry,) = blockers(UUID, "no-driver")
    assert entry["device"] == UUID
    # Nothing binds it again (mdev_match): it has to be made anew.
    assert f"vfiotool mdev remove {UUID}" in why(UUID)[1]["next"]
