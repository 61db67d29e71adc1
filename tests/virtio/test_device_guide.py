"""docs/virtio-device-guide.md: its classes are served as they stand."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA
from tests.virtio.test_device import ask, connected, served
from vfiotool.cli.user_class import load_class
from vfiotool.virtio.device import VirtioDevice
from vfiotool.virtio.message import VhostRequest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "virtio-device-guide.md"


@pytest.fixture
def blocks(tmp_path: Path) -> list[Path]:
    """The guide's Python blocks, each as a file."""
    found = []
    text = GUIDE.read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
        file = tmp_path / f"guide_{number}.py"
        file.write_text(block, encoding="utf-8")
        found.append(file)
    return found


def test_the_thermometer_is_fifty_lines_and_works(tmp_path: Path, blocks: list[Path]) -> None:
    assert len(blocks[0].read_text().splitlines()) <= 50
    device = load_class(f"{blocks[0]}:Thermometer", VirtioDevice)()
    path = tmp_path / "device.sock"
    with served(device, path) as (loop, said), connected(path, queues=2) as front:
        front.up()
        assert ask(front, struct.pack("<H", 1), 4) == (4, struct.pack("<i", 43_500))
        assert ask(front, struct.pack("<H", 2), 4)[0] == 0
        assert ask(front, b"xyz", 4)[0] == 0
        alarms = front.rings[1]
        front.put(alarms, 0, [(DATA + 0x9000, 6, True)])
        front.add(alarms, 0)
        limit = struct.pack("<III", 0, 4, 0) + struct.pack("<I", 50_000)
        assert front.acknowledged(VhostRequest.SET_CONFIG, limit) == 0
        loop.call_soon_threadsafe(device.measured, 0, 49_000)  # type: ignore[attr-defined]
        loop.call_soon_threadsafe(device.measured, 1, 51_000)  # type: ignore[attr-defined]
        assert front.wait(alarms) == [(0, 6)]
        assert front.memory[DATA + 0x9000 : DATA + 0x9006] == struct.pack("<Hi", 1, 51_000)
    assert said == []


def test_the_disk_of_numbers_reads_as_the_guide_says(tmp_path: Path, blocks: list[Path]) -> None:
    device = load_class(f"{blocks[1]}:Pattern", VirtioDevice)()
    path = tmp_path / "device.sock"
    with served(device, path), connected(path) as front:
        front.up()
        assert front.read(77, 1024) == b"".join(n.to_bytes(8, "little") * 64 for n in (77, 78))
        assert front.write(0, bytes(512)) == 1
