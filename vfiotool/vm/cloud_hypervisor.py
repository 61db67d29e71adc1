"""cloud-hypervisor's `--device` arguments (cloud-hypervisor: docs/vfio.md)."""

from __future__ import annotations

from collections.abc import Sequence

from vfiotool.vm.preflight import Handed


def arguments(devices: Sequence[Handed]) -> list[str]:
    """One `--device` with a path for each device, PCI functions and mdevs alike."""
    return ["--device", *(f"path={device.path}" for device in devices)] if devices else []
