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
# Of the root bus, what its q35 machines leave free: 0x09 to 0x1e are its own (qemu-server:
# PVE/QemuServer/PCI.pm and pve-q35-4.0.cfg, which has sound and USB controllers at 1a to 1d).
_FIRST_SLOT = 0x08


def lines(devices: Sequence[Handed]) -> list[str]:
    """`hostpciN` of the functions of each card together; `args` of what `hostpci` cannot name.

    Proxmox makes mediated devices itself; one that is there already, a domain above ffff, vDPA and
    sockets go to QEMU as they are, with the machine and the size of memory that they take. The
    first card with a display is the VM's (`x-vga`). Raises Unsupported for more cards than it
    counts.
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
    found, shown = ["machine: q35"], False
    words = arguments(passed, first_slot=_FIRST_SLOT) if passed else []
    if words[:1] == ["-m"]:
        # Proxmox says the size itself, of which the shared memory is the whole.
        found.append(f"memory: {words[1].removesuffix('M')}")
        words = words[2:]
    for number, members in enumerate(slots.values()):
        options = [";".join(member.name for member in members), "pcie=1"]
        if not shown and any(map(_shows_vga, members)):
            options.append("x-vga=1")
            shown = True
        found.append(f"hostpci{number}: {','.join(options)}")
    if words:
        found.append(f"args: {shlex.join(words)}")
    return found


def _shows_vga(device: Handed) -> bool:
    """Whether it has VGA's registers, which `x-vga` asks for: a VF has none."""
    function = device.function
    if function is None or function.physfn is not None:
        return False
    return (function.class_code or "").startswith("0300")
