"""Every call into the kernel failing once, at each point of a driver's life; run by
test_vfio_faults.py with a build of the C library that has fault injection.

    python faults_vfio.py SCENARIO DEVICE BACKEND FOLDER      FOLDER holds the test build

Runs a scenario again and again; the nth call of run n fails, twice with different errnos. A run
must end with success (the failure did not matter) or one VfiotoolError; afterwards no descriptor,
mapping or locked page may be left, and the device must open. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib.util
import json
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfiotool.vfio import Device

ERRNOS = (errno.EIO, errno.ENOMEM, errno.EBUSY, errno.EINVAL, errno.ENODEV, errno.EPERM)
ROUNDS = 2


def load_test_build(folder: str) -> None:
    """Put FOLDER's extensions in the place of the installed ones."""
    from vfiotool import native

    for path in sorted(Path(folder).glob("_*.so")):
        name = path.name.partition(".")[0]
        spec = importlib.util.spec_from_file_location(f"vfiotool.native.{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[f"vfiotool.native.{name}"] = module
        setattr(native, name, module)


def life(device: Device) -> None:
    """What every driver does: registers, memory, an interrupt."""
    bar = device.region(0).map()
    device.set_bus_master(True)
    first = device.dma.alloc(8192, limit_bits=28)
    with device.dma.alloc(4096), device.irqs.msi() as interrupts:
        bar.write32(4, 1)
        interrupts[0].trigger()
        interrupts[0].wait(1.0)
        device.region(0).write32(4, 2)
        device.region(0).read32(0)
    first.close()
    many = device.dma.alloc_many(3, 4096)
    pairs = array("Q", [n for buffer in many for n in (buffer.iova, buffer.size)])
    device.space.unmap_many(pairs)
    for buffer in many:
        device.space.map(buffer.address, buffer.iova, 4096, read=True, write=True)


def rest(device: Device) -> None:
    """The calls of edu's that most drivers do without."""
    from vfiotool.errors import Unsupported

    region = device.region(0)
    region.write_bytes(4, bytes(region.read_bytes(0, 4)))
    device.irqs.request().trigger()
    pin = device.irqs.intx()
    pin.mask()
    pin.unmask()
    pin.owner.unmask_by_eventfd()
    pin.owner.rearm()
    pin.owner.close()
    buffers = device.dma.alloc_many(2, 4096)
    # Without dirty tracking in the IOMMU iommufd refuses it by itself.
    with contextlib.suppress(Unsupported):
        device.space.dirty_track(True)
        device.space.dirty_bitmap(buffers[0].iova, 4096)
        device.space.dirty_track(False)
    buffers[0].close()
    device.space.map_many([(buffers[1].address, 0x3000, 4096)], read=True, write=False)
    device.space.unmap_many([(0x3000, 4096)])
    with contextlib.suppress(Unsupported):
        device.low_power(True)
        device.low_power(False)
    device.features()


def resets(device: Device) -> None:
    """An NVMe function's resets, and vectors that are added."""
    with device.irqs.msix(1) as interrupts:
        interrupts.add(1)
        device.irqs.error().trigger()
        device.reset()
        device.hot_reset()
        interrupts[1].trigger()


def migration(device: Device) -> None:
    """mtty's state saved and restored, and its dirty log."""
    from vfiotool.vfio.migration import DirtyLog, Migration

    pieces: list[bytes] = []
    Migration(device).save(pieces.append)
    Migration(device).restore(iter(pieces))
    with DirtyLog(device, [(0x100000, 0x1000)]) as log:
        if Path("/dev/iommu").exists():  # else the kernel has no code to report it
            log.report(0x100000, 0x1000)


def frame(device: Device) -> None:
    """mbochs's picture, by dma-buf."""
    from vfiotool.drivers.display import open_display, show_pattern

    display = open_display(device)
    show_pattern(display, (64, 64))
    display.frame()


SCENARIOS: dict[str, Callable[[Device], None]] = {
    "life": life,
    "rest": rest,
    "resets": resets,
    "migration": migration,
    "frame": frame,
}


class Runs:
    """One scenario, run with each of its calls failing."""

    def __init__(self, name: str, address: str, backend: str) -> None:
        from vfiotool.native import library as native

        self.fault_set = native.fault_set
        self.name, self.address, self.backend = name, address, backend
        self.problems: list[str] = []
        self.outcomes = {"survived": 0, "refused": 0, "quarantined": 0}

    def once(self, opened: Callable[[], object] = lambda: None) -> None:
        from vfiotool.vfio import Device

        with Device.open(self.address, backend=self.backend) as device:
            opened()
            SCENARIOS[self.name](device)

    def count(self) -> tuple[int, int]:
        """The calls to be skipped (opening is a part of `life`), and all of them."""
        skipped: list[int] = []
        self.once()
        self.fault_set(0, 0)
        self.once(lambda: skipped.append(self.fault_set(0, 0)))
        total = skipped[0] + self.fault_set(0, 0)
        return (0 if self.name == "life" else skipped[0]), total

    def held(self) -> tuple[dict[str, str], int, int]:
        from tests.lab.vfio_guest import open_descriptors, status_kib

        return open_descriptors(), status_kib("VmLck"), status_kib("VmPin")

    def all(self) -> int:
        """Fail each call in turn; how many there are."""
        first, last = self.count()
        self.baseline = self.held()
        for turn in range(ROUNDS):
            for nth in range(first + 1, last + 1):
                self.fail(nth, ERRNOS[(nth + turn) % len(ERRNOS)])
        self.once()
        return last - first

    def fail(self, nth: int, number: int) -> None:
        from vfiotool.errors import VfiotoolError
        from vfiotool.vfio import dma

        where = f"call {nth} failing with {errno.errorcode[number]}"
        self.fault_set(nth, number)
        try:
            self.once()
            self.outcomes["survived"] += 1
        except VfiotoolError as error:
            self.outcomes["refused"] += 1
            if not str(error):
                self.problems.append(f"{where}: an error without a message")
        except BaseException as error:
            self.problems.append(f"{where}: {type(error).__name__}: {error}")
        self.fault_set(0, 0)
        # An unmap that failed keeps its memory on purpose until the process ends; the mapping
        # itself went with the container.
        self.outcomes["quarantined"] += len(dma._quarantine)
        dma._quarantine.clear()
        gc.collect()
        now = self.held()
        if now != self.baseline:
            left = {k: v for k, v in now[0].items() if k not in self.baseline[0]}
            self.problems.append(f"{where}: left behind {left}, locked {now[1:]} KiB")
            self.baseline = now


def main() -> None:
    name, address, backend, folder = sys.argv[1:5]
    load_test_build(folder)
    runs = Runs(name, address, backend)
    calls = runs.all()
    print(json.dumps({"calls": calls, "problems": runs.problems, **runs.outcomes}))


if __name__ == "__main__":
    main()
