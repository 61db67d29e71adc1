"""The same thing a great many times: what it costs must come back.

    python soak_vfio.py [--device 0000:00:01.0] [--backend NAME] [--maps N] [--interrupts N]
                        [--opens N] [--resets N]

Runs in a guest, with the device on vfio-pci. After each kind it prints the descriptors, locked
pages and resident KiB before and after; ends with 1 if any of them has grown.
test_vfio_soak.py runs it with small numbers; the full ones are 10⁶, 10⁵, 10⁴ and 10³.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from vfio_guest import open_descriptors, status_kib

from vfiotool.vfio import Device

# The pools of malloc and the interpreter grow for some hundred cycles and then stand still; a leak
# of one page a cycle would be far above.
RESIDENT_SLACK_KIB = 1024


@dataclass(frozen=True)
class Usage:
    descriptors: int
    locked_kib: int
    pinned_kib: int
    resident_kib: int


def usage() -> Usage:
    gc.collect()
    fields = (status_kib(name) for name in ("VmLck", "VmPin", "VmRSS"))
    return Usage(len(open_descriptors()), *fields)


def soak(name: str, count: int, warm_up: int, action: Callable[[], object]) -> bool:
    """Runs `action` often; prints what it left behind. False if anything grew."""
    if not count:
        return True
    for _ in range(warm_up):
        action()
    before = usage()
    begin = time.monotonic()
    for _ in range(count):
        action()
    took = time.monotonic() - begin
    after = usage()
    grown = (
        after.descriptors > before.descriptors
        or after.locked_kib > before.locked_kib
        or after.pinned_kib > before.pinned_kib
        or after.resident_kib > before.resident_kib + RESIDENT_SLACK_KIB
    )
    verdict = "GREW" if grown else "ok"
    print(f"{verdict} {name}: {count} in {took:.1f} s, {before} -> {after}", flush=True)
    return not grown


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="0000:00:01.0")
    parser.add_argument("--reset-device", help="one that can be reset; default: none is")
    parser.add_argument("--backend", default="auto")
    for name in ("maps", "interrupts", "opens", "resets"):
        parser.add_argument(f"--{name}", type=int, default=0)
    given = parser.parse_args()
    fine = True

    def open_and_close() -> None:
        with Device.open(given.device, backend=given.backend) as device:
            device.region(0).map().read32(0)

    fine &= soak("opens", given.opens, 20, open_and_close)
    with Device.open(given.device, backend=given.backend) as device:
        bar = device.region(0).map()
        device.set_bus_master(True)
        memory = device.dma.alloc(4096)

        def map_and_unmap() -> None:
            device.space.map(memory.address, 0x100000, 4096, read=True, write=True)
            assert device.space.unmap(0x100000, 4096) == 4096

        fine &= soak("maps and unmaps", given.maps, 100, map_and_unmap)
        interrupt = device.irqs.msi()[0]

        def interrupted() -> None:
            bar.write32(0x60, 1)
            assert interrupt.wait(10.0) == 1
            bar.write32(0x64, 1)

        fine &= soak("interrupts", given.interrupts, 10, interrupted)
    if given.resets:
        with Device.open(given.reset_device or given.device, backend=given.backend) as device:
            fine &= soak("resets", given.resets, 3, device.reset)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
