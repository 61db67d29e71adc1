"""docs/driver-guide.md, run: its blocks, put together, are a driver that works."""

from __future__ import annotations

import io
import os
import re
from math import factorial
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, bind_vfio
from vfiotool.cli.main import main
from vfiotool.vfio import Device, Trace
from vfiotool.vfio.trace import differences, load

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")

GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "driver-guide.md"


@pytest.fixture(scope="module")
def guide() -> dict[str, object]:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) <= 50
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    return names


def test_the_guide_s_driver_drives_the_device(guide: dict[str, object]) -> None:
    bind_vfio(EDU)
    assert guide["identify"](EDU) == (1, 0)  # type: ignore[operator]
    for backend in BACKENDS:
        with Device.open(EDU, backend=backend) as device:
            edu = guide["Edu"](device.region(0).map())  # type: ignore[operator]
            assert guide["factorial"](edu, 10) == factorial(10)  # type: ignore[operator]
            guide["start"](device, edu)  # type: ignore[operator]
            data = os.urandom(4096)
            assert guide["copy_through_device"](device, edu, data) == data  # type: ignore[operator]
            assert guide["interrupted"](device, edu) == 1  # type: ignore[operator]


def test_two_traces_of_one_driver_are_the_same_and_a_change_is_named(
    guide: dict[str, object],
) -> None:
    bind_vfio(EDU)

    def recorded(number: int) -> list[dict[str, object]]:
        text = io.StringIO()
        with Device.open(EDU, trace=Trace(text)) as device:
            edu = guide["Edu"](device.region(0).map())  # type: ignore[operator]
            guide["start"](device, edu)  # type: ignore[operator]
            edu.liveness.write(number)
            edu.liveness.read()
            device.dma.alloc(4096, limit_bits=28).close()
            guide["interrupted"](device, edu)  # type: ignore[operator]
        return list(load(text.getvalue().splitlines()))

    first, second, other = recorded(5), recorded(5), recorded(6)
    assert differences(first, second) == []
    changed = differences(first, other)
    assert len(changed) == 2
    assert "value 5 -> 6" in changed[0]
    events = [event["event"] for event in first]
    for event in ("read", "write", "poll", "dma-map", "dma-unmap", "irq-on", "irq", "irq-off"):
        assert event in events
    assert all(event["device"] == EDU for event in first)


def test_a_trace_is_shown_and_compared(
    guide: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bind_vfio(EDU)
    file = tmp_path / "trace"
    with file.open("w") as output, Device.open(EDU, trace=Trace(output)) as device:
        edu = guide["Edu"](device.region(0).map())  # type: ignore[operator]
        guide["start"](device, edu)  # type: ignore[operator]
        edu.liveness.write(0xFF)
        edu.liveness.read()
        guide["copy_through_device"](device, edu, b"traced")  # type: ignore[operator]
        guide["interrupted"](device, edu)  # type: ignore[operator]
    assert main(["device", "trace", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "dma-map" in shown and "value=0xffffff00" in shown
    assert main(["device", "trace", str(file), "--compare", str(file)]) == 0
    changed = tmp_path / "changed"
    changed.write_text(file.read_text().replace("4294967040", "4294967041"))
    assert main(["device", "trace", str(file), "--compare", str(changed)]) == 1
