"""cloud-hypervisor's `--device` arguments (cloud-hypervisor: docs/vfio.md)."""

from __future__ import annotations

from collections.abc import Sequence

from vfiotool.errors import Unsupported
from vfiotool.vm.handed import Handed


def arguments(devices: Sequence[Handed]) -> list[str]:
    """One `--device` with a path for each device, PCI functions and mdevs alike.

    Raises Unsupported for what is not a PCI device in the guest (vfio-ap, vfio-ccw).
    """
    for device in devices:
        if device.model != "vfio-pci":
            raise Unsupported(
                f"cloud-hypervisor takes PCI devices only, and {device.name} is {device.model}",
                hint="vfiotool vm qemu knows it",
                device=device.name,
            )
    return ["--device", *(f"path={device.path}" for device in devices)] if devices else []
