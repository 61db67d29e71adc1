"""What planning needs to know of vDPA, read once into a frozen value.

Apart from `facts.py`, so that who plans for PCI functions alone loads nothing of netlink.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.devices.vdpa import (
    VdpaDevice,
    VdpaParent,
    knows_netlink,
    read_devices,
    read_parents,
)
from vfiotool.errors import NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_VDPA_AUTOPROBE, SYS_VDPA_DRIVERS


@dataclass(frozen=True)
class VdpaFacts:
    """What planning needs. `complete` is False where the host could not be asked over netlink:
    then no parent is known, and a device's own parent neither."""

    parents: tuple[VdpaParent, ...]
    devices: tuple[VdpaDevice, ...]
    drivers: frozenset[str]
    complete: bool
    autoprobe: bool = False

    def device(self, name: str) -> VdpaDevice:
        """Raises NotFound."""
        for device in self.devices:
            if device.name == name:
                return device
        raise NotFound(
            f"there is no vDPA device {name[:80]!r}", hint="vfiotool vdpa list", device=name[:80]
        )


def read_vdpa_facts(host: Host) -> VdpaFacts:
    """Raises Unsupported if the running kernel has no vDPA, Stuck if it does not answer."""
    return VdpaFacts(
        parents=read_parents(host),
        devices=read_devices(host),
        drivers=frozenset(host.listdir(SYS_VDPA_DRIVERS)),
        complete=knows_netlink(host),
        autoprobe=host.read(SYS_VDPA_AUTOPROBE) == "1",
    )
