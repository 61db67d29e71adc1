"""SR-IOV as a host shows it: physical functions and their VFs (reading only).

Source: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vfiotool.devices.pci import PciFunction, read_vf_indices
from vfiotool.errors import Stuck
from vfiotool.host.host import Host
from vfiotool.host.paths import ESWITCH, SYS_PCI_DEVICES


@dataclass(frozen=True, slots=True)
class VirtualFunction:
    """A VF: its physical function, its index there (from 0), and where it stands now."""

    pf: str
    index: int
    address: str
    driver: str | None
    iommu_group: int | None


def read_vfs(
    host: Host, pf: str, functions: Mapping[str, PciFunction] | None = None
) -> tuple[VirtualFunction, ...]:
    """The enabled VFs of a physical function, by index; empty for any other device.

    Those of `functions`, by address, are taken as they were read.
    """
    found = []
    for address, index in read_vf_indices(host, pf).items():
        known = (functions or {}).get(address)
        if known is not None and not known.unread:
            found.append(VirtualFunction(pf, index, address, known.driver, known.iommu_group))
            continue
        group = host.linkname(f"{SYS_PCI_DEVICES}/{address}/iommu_group")
        found.append(
            VirtualFunction(
                pf=pf,
                index=index,
                address=address,
                driver=host.linkname(f"{SYS_PCI_DEVICES}/{address}/driver"),
                iommu_group=int(group) if group is not None and group.isdecimal() else None,
            )
        )
    return tuple(sorted(found, key=lambda vf: vf.index))


# What `read_eswitch_mode` says of a function whose driver has no eswitch.
NO_ESWITCH = "none"


def read_eswitch_mode(host: Host, pf: str) -> str | None:
    """`legacy`, `switchdev` or NO_ESWITCH; None where the host or this user is not told.

    Raises Stuck if devlink does not answer: a driver holds the device's lock.
    """
    text = host.read(f"{ESWITCH}/{pf}")
    if text is None or text.startswith("unknown"):
        if text is not None and text.endswith("ETIMEDOUT"):
            raise Stuck(
                f"{pf}: devlink gave no answer: the device is locked",
                hint="end what holds the device, then: vfiotool recover",
                device=pf,
            )
        return None
    return text
