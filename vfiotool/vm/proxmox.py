"""Proxmox VE's lines of a VM's configuration (Proxmox VE: qm.conf(5), `hostpci[n]` and `args`)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vfiotool.errors import Unsupported
from vfiotool.vm.handed import Handed
from vfiotool.vm.qemu import arguments, slot_of

PROGRAM = "Proxmox VE"
# qm.conf(5) counts hostpci0 to hostpci15.
_MOST = 16


def lines(devices: Sequence[Handed]) -> list[str]:
    """`hostpciN` of the functions of each card together; `args` of what `hostpci` cannot name.

    Proxmox makes mediated devices itself; one that is there already, a domain above ffff, vDPA and
    sockets go to QEMU as they are. Raises Unsupported for more cards than it counts.
    """
    slots: dict[str, list[Handed]] = {}
    passed: list[Handed] = []
    for device in devices:
        if device.function is not None and device.address.domain <= 0xFFFF:
            slots.setdefault(slot_of(device), []).append(device)
        else:
            passed.append(device)
    if len(slots) > _MOST:
        raise Unsupported(f"Proxmox VE takes {_MOST} PCI devices, these are {len(slots)}")
    found = []
    for number, members in enumerate(slots.values()):
        options = [";".join(member.name for member in members), "pcie=1"]
        if any(((m.function and m.function.class_code) or "").startswith("0300") for m in members):
            options.append("x-vga=1")
        found.append(f"hostpci{number}: {','.join(options)}")
    if slots:
        found.insert(0, "machine: q35")
    if passed:
        found.append(f"args: {shlex.join(arguments(passed))}")
    return found
