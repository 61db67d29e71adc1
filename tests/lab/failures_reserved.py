"""What `vm check` foretells behind an IOMMU that keeps addresses and remaps no interrupts.

In the guest of tests/guests/test_preflight_failures.py: a virtio-iommu with a region at 32 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.commands import modprobe
from tests.lab.vfio_guest import bind_vfio, unbind
from tests.lab.vm_starts import findings, options, start

BEHIND = "0000:01:00.0"
UNSAFE = Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")


@pytest.fixture(autouse=True)
def bound() -> Iterator[None]:
    modprobe("vfio-pci", "vfio_iommu_type1")
    bind_vfio(BEHIND)
    yield
    unbind(BEHIND)
    UNSAFE.write_text("N")


def test_interrupts_that_are_not_remapped() -> None:
    found = findings(BEHIND)["no-interrupt-remapping"]
    assert found["severity"] == "blocker"
    words = ["-device", f"vfio-pci,host={BEHIND}"]
    assert "Failed to set iommu for container: Operation not permitted" in start(words)
    UNSAFE.write_text("Y")
    assert "no-interrupt-remapping" not in findings(BEHIND) and not start(words)


def test_memory_over_a_reserved_region() -> None:
    UNSAFE.write_text("Y")
    found = findings(BEHIND, "--memory", "64M")["reserved-region"]
    assert found["severity"] == "blocker" and found["number"] == 16 << 20
    said = start(options(BEHIND, "--memory", "64M"))
    assert re.search(r"dma_map\(.*\) = -22 \(Invalid argument\)", said), said
    most = re.match(r"less memory: at most (\d+) MiB", found["next"])
    assert most is not None and most[1] == "32"
    assert "reserved-region" not in findings(BEHIND, "--memory", "32M")
    assert not start(options(BEHIND, "--memory", "32M"))
