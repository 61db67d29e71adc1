"""QEMU's machine for guests of the host's own kind: its program, its type, where its memory lies.

Source: QEMU, hw/i386/pc_q35.c (pc_q35_init), hw/arm/virt.c (base_memmap), hw/riscv/virt.c
(virt_memmap); s390-ccw-virtio and pseries begin at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
# q35's memory up to here lies below 4 GiB; of more than that, 2 GiB do, and the rest from 4 GiB on.
_Q35_LOW_MOST = 0xB0000000
_Q35_LOW = 2 * GIB


@dataclass(frozen=True, slots=True)
class GuestMachine:
    """`kind`: what -machine takes; `options`: more of it; `cpu`: what -cpu takes, "" to leave it.

    `base` is the guest's first address of memory. `root_ports`: whether its root bus is PCI
    Express and takes root ports; pseries has a conventional one, where devices stand themselves.
    """

    program: str
    kind: str
    options: str = ""
    cpu: str = "max"
    base: int = 0
    root_bus: str = "pcie.0"
    root_ports: bool = True

    def ranges(self, memory: int) -> tuple[tuple[int, int], ...]:
        """Where the guest finds `memory` bytes: first and last address of each part."""
        if self.kind != "q35":
            return ((self.base, self.base + memory - 1),)
        low = memory if memory <= _Q35_LOW_MOST else _Q35_LOW
        rest = memory - low
        return ((0, low - 1), (4 * GIB, 4 * GIB + rest - 1)) if rest else ((0, low - 1),)

    def end(self, memory: int) -> int:
        """The first address after `memory` bytes, at least 4 GiB: BARs of 64 bits come later."""
        return max(4 * GIB, self.ranges(memory)[-1][1] + 1) if memory else 4 * GIB


# On virt, only the newest interrupt controller takes a device's MSIs by itself (GICv3 with ITS).
_MACHINES = {
    "arm64": GuestMachine("qemu-system-aarch64", "virt", ",gic-version=max", base=GIB),
    "riscv64": GuestMachine("qemu-system-riscv64", "virt", ",aia=aplic-imsic", base=2 * GIB),
    "s390x": GuestMachine("qemu-system-s390x", "s390-ccw-virtio"),
    # hw/ppc/spapr_pci.c registers its root bus without a name: it is pci.0.
    "ppc64": GuestMachine(
        "qemu-system-ppc64", "pseries", cpu="", root_bus="pci.0", root_ports=False
    ),
}
Q35 = GuestMachine("qemu-system-x86_64", "q35")


def machine_of(architecture: str | None) -> GuestMachine:
    """The machine for guests of a host of `architecture` (`Platform.architecture`), q35 if None."""
    return _MACHINES.get(architecture or "", Q35)
