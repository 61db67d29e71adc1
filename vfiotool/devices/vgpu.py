"""NVIDIA's vGPUs without mdev, since Linux 6.8: types of VFs that stay on the vendor's driver.

A VF with a type other than 0 has a VFIO device and is ready as it stands; binding it to vfio-pci
would destroy the vGPU (NVIDIA's vGPU software: `current_vgpu_type`, `creatable_vgpu_types`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vfiotool.devices.pci import PciFunction
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES

_NVIDIA = "10de"


@dataclass(frozen=True)
class Vgpu:
    """What a VF is and could be; `current` 0 is no vGPU, `creatable` maps a type to its name."""

    current: int
    creatable: Mapping[int, str] = field(default_factory=dict, hash=False)

    @property
    def listed(self) -> str:
        """The types that it could be, for people."""
        rows = (f"{number} ({name})" for number, name in sorted(self.creatable.items()))
        return ", ".join(rows) or "none"


def may_be_vgpu(function: PciFunction) -> bool:
    """Whether it is worth asking: a VF of NVIDIA's."""
    return function.physfn is not None and function.vendor == _NVIDIA


def type_path(vf: str) -> str:
    """The attribute that sets a VF's type."""
    return f"{SYS_PCI_DEVICES}/{vf}/nvidia/current_vgpu_type"


def read_vgpu(host: Host, vf: str) -> Vgpu | None:
    """None for a function that has no such type."""
    current = host.read_int(type_path(vf))
    if current is None:
        return None
    text = host.read(f"{SYS_PCI_DEVICES}/{vf}/nvidia/creatable_vgpu_types")
    return Vgpu(current, parse_creatable(text or ""))


def parse_creatable(text: str) -> dict[int, str]:
    """The types in `creatable_vgpu_types`, number to name: lines `1148  : NVIDIA L40S-1Q`."""
    rows = (line.partition(":") for line in text.splitlines())
    return {int(first): name.strip() for first, _, name in rows if first.strip().isdecimal()}
