"""Incus's devices of a virtual machine (Incus: reference/devices_pci, _gpu, _nic)."""

from __future__ import annotations

from collections.abc import Sequence

from vfiotool.errors import Unsupported
from vfiotool.vm.handed import Handed

PROGRAM = "Incus"


def devices_of(devices: Sequence[Handed]) -> dict[str, object]:
    """The `devices` part of an instance, for `incus config edit`.

    Graphics cards are `gpu`, everything else on PCI is `pci`. Raises Unsupported for mediated
    devices that are there already (Incus makes its own of a type), vDPA, sockets, and domains
    above ffff.
    """
    found: dict[str, object] = {}
    for device in devices:
        if device.function is None:
            hint = "raw.qemu takes what vfiotool vm qemu prints"
            if device.is_mdev and device.parent is not None:
                hint = (
                    "Incus makes it itself, of the parent and the type: type: gpu, gputype: mdev, "
                    f"pci: {device.parent}, mdev: {device.type}"
                )
            raise Unsupported(
                f"Incus has no device for {device.name}", hint=hint, device=device.name
            )
        if device.address.domain > 0xFFFF:
            # shared/validate: IsPCIAddress takes four digits of the domain.
            raise Unsupported(
                f"Incus takes no address with a domain above ffff: {device.name}",
                hint="raw.qemu takes what vfiotool vm qemu prints",
                device=device.name,
            )
        name = "vfio-" + device.name.replace(":", "-").replace(".", "-")
        code = device.function.class_code or ""
        if code.startswith("03"):
            entry = {"type": "gpu", "gputype": "physical", "pci": device.name}
        else:
            entry = {"type": "pci", "address": device.name}
        found[name] = entry
    return {"devices": found}
