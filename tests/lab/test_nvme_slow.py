"""The NVMe driver on a disk that takes its time: flush behind writes that are out, Ctrl-C while
commands are waited for, and the order in which a controller is left.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fakes.strikes import struck
from tests.lab.nvme_guest import to_vfio
from tests.lab.vfio_guest import BACKENDS
from vfiotool.drivers.nvme import Controller
from vfiotool.drivers.nvme import bench as nvme_bench
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import KernelError
from vfiotool.vfio import Device, Trace

MACHINE = "odd-nvme"
KERNELS = ("6.1", "6.12", "iommufd")
SLOW, PLAIN = "0000:06:00.0", "0000:05:00.0"
COMMAND, CC, CSTS = 0x04, 0x14, 0x1C


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def slow(backend: str) -> Iterator[Controller]:
    with Device.open(to_vfio(SLOW), backend=backend) as device:  # type: ignore[arg-type]
        yield Controller(device)


@pytest.mark.parametrize(("entries", "sent"), [(4, 3), (16, 10)])
def test_flush_ends_by_its_own_completion_behind_writes_that_are_out(
    slow: Controller, entries: int, sent: int
) -> None:
    disk, queue = slow.namespace(1), slow.create_queue(entries)
    with slow.device.dma.alloc(4096) as memory:
        for n in range(sent):
            assert queue.send(nvme_spec.WRITE, disk, 8 * n, 8, memory, tag=100 + n)
        before = queue.pair.submitted
        queue.flush(disk)
        assert queue.pair.submitted == before + 1
        assert sorted(done.tag for done in queue.poll(sent, 20)) == list(range(100, 100 + sent))
        assert queue.pair.in_flight == 0


def test_ctrl_c_ends_a_wait_at_once_and_loses_no_completion(slow: Controller) -> None:
    disk, queue = slow.namespace(1), slow.create_queue(32)
    with slow.device.dma.alloc(4096) as memory:
        for tag in range(31):
            assert queue.send(nvme_spec.READ, disk, tag, 1, memory, tag=tag)
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt), struck(0.05):
            queue.poll(31, 20)
        assert time.monotonic() - begun < 10
        assert [done.status for done in queue.poll(31, 20)] == [0] * 31
        assert queue.pair.in_flight == 0 and not memory.pins
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), struck(0.3):
        nvme_bench.run(slow, disk, nvme_bench.Job(runtime_s=60, depth=2))
    assert time.monotonic() - begun < 30
    assert len(queue.read(disk, 0, 1)) == 512


def test_a_load_tells_its_own_error_when_the_controller_dies(slow: Controller) -> None:
    killer = threading.Timer(0.3, slow.device.set_bus_master, (False,))
    killer.start()
    begun = time.monotonic()
    with pytest.raises(KernelError, match=r"CSTS\.CFS=1"):
        nvme_bench.run(slow, slow.namespace(1), nvme_bench.Job(runtime_s=60, depth=4))
    assert time.monotonic() - begun < 15
    killer.join()


def test_a_controller_is_told_of_the_end_before_it_is_disabled(backend: str) -> None:
    trace = io.StringIO()
    opened = Device.open(to_vfio(PLAIN), backend=backend, trace=Trace(trace))  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="of the user's"), opened as device:
        controller = Controller(device)
        controller.create_queue().read(controller.namespace(1), 0, 8)
        mark = trace.tell()
        raise KeyError("of the user's")
    trace.seek(mark)
    seen = [json.loads(line) for line in trace]
    steps = []
    for one in seen:
        if one["event"] == "write" and (one["region"], one["offset"]) == (0, CC):
            steps.append("notify" if one["value"] >> 14 & 3 == 1 and one["value"] & 1 else "off")
        elif one["event"] == "poll" and one["offset"] == CSTS:
            steps.append("ended" if (one["mask"], one["wanted"]) == (0xC, 8) else "not ready")
        elif one["event"] == "write" and (one["region"], one["offset"]) == (7, COMMAND):
            steps.append("bus master off" if not one["value"] >> 2 & 1 else "bus master on")
    assert steps[:2] == ["notify", "ended"] and steps[2:4] == ["off", "not ready"], steps
    assert steps[-1] == "bus master off", steps
