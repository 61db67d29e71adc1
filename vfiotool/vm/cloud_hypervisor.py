"""cloud-hypervisor's arguments (cloud-hypervisor: docs/vfio.md, vhost-user-*.md, vdpa.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vfiotool.errors import Unsupported
from vfiotool.vm.handed import VDPA, Handed

PROGRAM = "cloud-hypervisor"
_OPTIONS = {
    VDPA: ("--vdpa", "path={}"),
    "vhost-user-blk": ("--disk", "vhost_user=on,socket={}"),
    "vhost-user-net": ("--net", "vhost_user=on,socket={}"),
    "vfio-user": ("--user-device", "socket={}"),
}


def arguments(devices: Sequence[Handed], *, memory_bytes: int | None = None) -> list[str]:
    """`--device` with a path for each device, PCI functions and mdevs alike; `--vdpa`, `--disk`,
    `--net` and `--user-device` for those that other processes serve, with the memory shared.

    Raises Unsupported for what is not a PCI device in the guest (vfio-ap, vfio-ccw).
    """
    found: dict[str, list[str]] = {}
    if any(device.shares_memory for device in devices) or memory_bytes is not None:
        size = f"size={(memory_bytes or 1 << 30) >> 20}M"
        shared = any(device.shares_memory for device in devices)
        found["--memory"] = [size + (",shared=on" if shared else "")]
    for device in devices:
        if device.model in ("vfio-ap", "vfio-ccw"):
            raise Unsupported(
                f"cloud-hypervisor takes PCI devices only, and {device.name} is {device.model}",
                hint="vfiotool vm qemu knows it",
                device=device.name,
            )
        if device.model == VDPA and not device.path:
            raise Unsupported(
                f"{device.name} has no vhost-vdpa node",
                hint=f"vfiotool vdpa bind {device.name} vhost_vdpa",
                device=device.name,
            )
        option, value = _OPTIONS.get(device.model, ("--device", "path={}"))
        value = value.format(_value(device))
        if device.model == VDPA:
            value += f",num_queues={_queues(device)}"
        found.setdefault(option, []).append(value)
    return [word for option, values in found.items() for word in (option, *values)]


def _queues(device: Handed) -> int:
    """All virtqueues, as docs/vdpa.md wants them: the guest's driver fails on one that is missing,
    such as that of a network device's control. Where they are not known, the fewest."""
    return device.queues or (2 if device.virtio == "net" else 1)


def _value(device: Handed) -> str:
    """A path as the options' parser reads it back. Raises Unsupported for one with a quote.

    Source: cloud-hypervisor, option_parser: quotes keep what is special, and have no escape.
    """
    if '"' in device.path:
        raise Unsupported(
            f"cloud-hypervisor takes no path with a quotation mark: {device.path}",
            hint="serve it on another path",
            device=device.name,
        )
    return f'"{device.path}"' if set(device.path) & set(",[]") else device.path


def features_of(devices: Iterable[Handed]) -> set[str]:
    """What of `releases.OLDEST` the arguments make use of."""
    return {device.model for device in devices}
