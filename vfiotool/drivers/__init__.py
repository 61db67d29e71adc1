"""Drivers on top of `vfiotool.vfio`: examples to copy, each readable in one sitting.

A driver here can check its device: `demo` runs it and reports each check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from vfiotool.errors import NotFound
from vfiotool.vfio import Device, RegisterMap

# Name -> module with a `demo(device)`; a module is imported when it is asked for.
DEMOS = {
    "edu": "vfiotool.drivers.edu",
    "pci_testdev": "vfiotool.drivers.pci_testdev",
    "mtty": "vfiotool.drivers.mtty",
    "nvme": "vfiotool.drivers.nvme.demo",
    "mbochs": "vfiotool.drivers.display",
    "mdpy": "vfiotool.drivers.display",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing a demo looked at: `detail` is what was seen."""

    name: str
    passed: bool
    detail: str


Demo = Callable[[Device], Iterator[Check]]


def demo(name: str) -> Demo:
    """The demo called `name`. Raises NotFound, listing those there are."""
    module = DEMOS.get(name)
    if module is None:
        raise NotFound(f"there is no demo {name!r}", hint=f"one of: {', '.join(sorted(DEMOS))}")
    found: Demo = import_module(module).demo
    return found


def register_map(name: str, device: Device) -> RegisterMap:
    """The registers of `device` as the driver called `name` declares them (its `registers_of`).
    Raises NotFound for a driver that there is not, or that declares none."""
    declared = {
        driver: found
        for driver, module in DEMOS.items()
        if (found := getattr(import_module(module), "registers_of", None))
    }
    if name not in declared:
        names = ", ".join(sorted(declared))
        raise NotFound(f"no driver {name!r} declares registers", hint=f"one of: {names}")
    bound: RegisterMap = declared[name](device)
    return bound
