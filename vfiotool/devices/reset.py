"""Whether a function can be reset by itself.

The kernel shows `reset_method` (and, before 5.15, `reset` alone) of functions that it has some
way to reset, and of no others (drivers/pci/pci.c, pci_reset_supported; pci-sysfs.c). A function
without one keeps its state from one virtual machine to the next.
"""

from __future__ import annotations

from vfiotool.devices.pci import PciFunction
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES


def lacks_reset(host: Host, function: PciFunction) -> bool | None:
    """Whether the kernel has no way to reset the function; None where the tree does not tell."""
    if function.reset_methods:
        return False
    base = f"{SYS_PCI_DEVICES}/{function.address}"
    if host.exists(f"{base}/reset_method"):
        return True
    if host.exists(f"{base}/reset"):
        return False
    # Each function of a running kernel has this: a tree without it is a part of one.
    return True if host.exists(f"{base}/rescan") else None
