"""What the VFIO tests in guests share: devices put on vfio-pci by hand, mdevs made, backends."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

EDU = "0000:00:01.0"
TESTDEV = "0000:00:02.0"
PCI = Path("/sys/bus/pci/devices")
MDEV_PARENTS = Path("/sys/class/mdev_bus")

# The interfaces of this kernel: every test of the library runs over each.
BACKENDS = ("type1", "iommufd") if Path("/dev/iommu").exists() else ("type1",)


def bind_vfio(address: str) -> None:
    """Put a device on vfio-pci with plain sysfs writes; nothing to do if it is there."""
    device = PCI / address
    if (device / "driver").exists() and (device / "driver").resolve().name == "vfio-pci":
        return
    subprocess.run(["modprobe", "-a", "vfio-pci", "vfio_iommu_type1"], check=False)
    (device / "driver_override").write_text("vfio-pci")
    driver = device / "driver"
    if driver.exists() and driver.resolve().name != "vfio-pci":
        (driver / "unbind").write_text(address)
    if not driver.exists():
        (PCI.parent / "drivers_probe").write_text(address)
    assert driver.resolve().name == "vfio-pci"


def unbind(address: str) -> None:
    """Take a device from whatever driver it is on, and let go of the override."""
    (PCI / address / "driver_override").write_text("\n")
    if (PCI / address / "driver").exists():
        (PCI / address / "driver" / "unbind").write_text(address)


def nvme_functions() -> list[str]:
    """The two NVMe functions of one slot, of the machine `large`."""
    slots: dict[str, list[str]] = {}
    for path in sorted(PCI.iterdir()):
        if (path / "class").read_text().startswith("0x0108"):
            slots.setdefault(path.name.partition(".")[0], []).append(path.name)
    return next(found for found in slots.values() if len(found) == 2)


@contextlib.contextmanager
def mdev(parent: str, kind: str) -> Iterator[str]:
    """A mediated device of the type `kind` on `parent`, for the time of the block: its UUID."""
    subprocess.run(["modprobe", "-a", parent, "vfio_iommu_type1"], check=True)
    name = str(uuid.uuid4())
    types = MDEV_PARENTS / parent / "mdev_supported_types"
    (types / kind / "create").write_text(name)
    try:
        yield name
    finally:
        (Path("/sys/bus/mdev/devices") / name / "remove").write_text("1")


def open_descriptors() -> dict[str, str]:
    """What this process holds open, but for the directory that is read to learn it."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            if not target.startswith("/proc/"):
                found[entry] = target
    return found


def status_kib(field: str) -> int:
    """A line of /proc/self/status in KiB: VmLck, VmPin, VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


class IommuFaults:
    """What the kernel logs of faulting DMA from here on (drivers/iommu/intel/dmar.c; it leaves
    some out where there are many)."""

    _FAULT = re.compile(r"DMAR: \[(DMA|INTR-REMAP)|iommu.*fault|fault.*iommu", re.IGNORECASE)

    def __init__(self) -> None:
        self._log = open("/dev/kmsg", "rb", buffering=0)  # noqa: SIM115
        self._log.seek(0, os.SEEK_END)
        os.set_blocking(self._log.fileno(), False)

    def seen(self) -> list[str]:
        """The lines since the last call."""
        found = []
        while True:
            try:
                record = self._log.read(8192)
            except BrokenPipeError:  # Records were overwritten before they were read.
                continue
            if not record:
                return found
            text = record.decode(errors="replace").partition(";")[2].partition("\n")[0]
            if self._FAULT.search(text):
                found.append(text)

    def close(self) -> None:
        self._log.close()
