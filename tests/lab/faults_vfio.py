"""Every call into the kernel failing once, at each point of a driver's life; run by
test_vfio_faults.py with a build of the C library that has fault injection.

    python faults_vfio.py DEVICE BACKEND FOLDER      FOLDER holds the test build

Runs a whole scenario again and again; the nth call of run n fails, twice with different errnos. A
run must end with success (the failure did not matter) or one VfiotoolError; afterwards no
descriptor, mapping or locked page may be left, and the device must open. Prints one JSON object.
"""

from __future__ import annotations

import errno
import gc
import importlib.util
import json
import sys
from array import array
from pathlib import Path

ERRNOS = (errno.EIO, errno.ENOMEM, errno.EBUSY, errno.EINVAL, errno.ENODEV, errno.EPERM)
ROUNDS = 2


def load_test_build(folder: str) -> None:
    """Put FOLDER's extensions in the place of the installed ones."""
    import vfiotool

    for path in sorted(Path(folder).glob("_*.so")):
        name = path.name.partition(".")[0]
        spec = importlib.util.spec_from_file_location(f"vfiotool.{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[f"vfiotool.{name}"] = module
        setattr(vfiotool, name, module)


def main() -> None:
    address, backend, folder = sys.argv[1:4]
    load_test_build(folder)
    from vfio_guest import open_descriptors, status_kib

    from vfiotool.errors import VfiotoolError
    from vfiotool.vfio import Device, dma, native

    def scenario() -> None:
        with Device.open(address, backend=backend) as device:
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

    scenario()
    baseline = (open_descriptors(), status_kib("VmLck"), status_kib("VmPin"))
    native.fault_set(0, 0)
    scenario()
    calls = native.fault_set(0, 0)
    problems: list[str] = []
    outcomes = {"survived": 0, "refused": 0, "quarantined": 0}
    for turn in range(ROUNDS):
        for nth in range(1, calls + 1):
            number = ERRNOS[(nth + turn) % len(ERRNOS)]
            where = f"call {nth} of {calls} failing with {errno.errorcode[number]}"
            native.fault_set(nth, number)
            try:
                scenario()
                outcomes["survived"] += 1
            except VfiotoolError as error:
                outcomes["refused"] += 1
                if not str(error):
                    problems.append(f"{where}: an error without a message")
            except BaseException as error:
                problems.append(f"{where}: {type(error).__name__}: {error}")
            native.fault_set(0, 0)
            # An unmap that failed keeps its memory on purpose until the process ends; the mapping
            # itself went with the container.
            outcomes["quarantined"] += len(dma._quarantine)
            dma._quarantine.clear()
            gc.collect()
            now = (open_descriptors(), status_kib("VmLck"), status_kib("VmPin"))
            if now != baseline:
                left = {k: v for k, v in now[0].items() if k not in baseline[0]}
                problems.append(f"{where}: left behind {left}, locked {now[1:]} KiB")
                baseline = now
    scenario()
    print(json.dumps({"calls": calls, "problems": problems, **outcomes}))


if __name__ == "__main__":
    main()
