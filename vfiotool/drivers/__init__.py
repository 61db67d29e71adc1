"""Drivers on top of `vfiotool.vfio`: examples to copy, each readable in one sitting.

A driver here can check its device: `demo` runs it and reports each check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module

from vfiotool.errors import NotFound
from vfiotool.vfio import Device, RegisterMap

# Name -> module with a `demo(device)` and `DRIVES`; a module is imported when it is asked for.
DEMOS = {
    "edu": "vfiotool.drivers.edu",
    "pci_testdev": "vfiotool.drivers.pci_testdev",
    "mtty": "vfiotool.drivers.mtty",
    "nvme": "vfiotool.drivers.nvme.demo",
    "mbochs": "vfiotool.drivers.display",
    "mdpy": "vfiotool.drivers.display",
}


@dataclass(frozen=True, slots=True)
class DeviceId:
    """Which devices a driver drives: what is None may be anything. `class_code` has 24 bits: class,
    subclass, interface."""

    vendor: int | None = None
    device: int | None = None
    class_code: int | None = None

    def matches(self, vendor: int, device: int, class_code: int) -> bool:
        wanted = (self.vendor, self.device, self.class_code)
        found = (vendor, device, class_code)
        return all(a is None or a == b for a, b in zip(wanted, found, strict=True))


@dataclass(frozen=True, slots=True)
class Check:
    """One thing a demo looked at: `detail` is what was seen."""

    name: str
    passed: bool
    detail: str


Demo = Callable[[Device], Iterator[Check]]


def demo(name: str) -> Demo:
    """The demo called `name`, with dashes or underscores. Raises NotFound, listing those there
    are."""
    module = DEMOS.get(name.replace("-", "_"))
    if module is None:
        raise NotFound(f"there is no demo {name!r}", hint=f"one of: {_names()}")
    found: Demo = import_module(module).demo
    return found


def _names(drivers: Iterable[str] = DEMOS) -> str:
    """Drivers as people spell them, and as the devices' documents do."""
    return ", ".join(sorted(name.replace("_", "-") for name in drivers))


def register_map(name: str, device: Device) -> RegisterMap:
    """The registers of `device` as the driver called `name` declares them (its `registers_of`).
    Raises NotFound for a driver that there is not, or that declares none."""
    declared = {
        driver: found
        for driver, module in DEMOS.items()
        if (found := getattr(import_module(module), "registers_of", None))
    }
    if name.replace("-", "_") not in declared:
        raise NotFound(f"no driver {name!r} declares registers", hint=f"one of: {_names(declared)}")
    bound: RegisterMap = declared[name.replace("-", "_")](device)
    return bound


def find_driver(vendor: int, device: int, class_code: int) -> str | None:
    """The name of the driver that drives devices with these ids (PCI Local Bus 3.0, 6.2.1), by
    what each declares in its `DRIVES`; None where there is none."""
    for name, module in DEMOS.items():
        drives: dict[str, tuple[DeviceId, ...]] = import_module(module).DRIVES
        if any(one.matches(vendor, device, class_code) for one in drives.get(name, ())):
            return name
    return None


def driver_of(device: Device) -> str:
    """The name of the driver that drives `device`. Raises NotFound, which tells its ids."""
    name = find_driver(device.vendor, device.device, device.class_code)
    if name is None:
        raise NotFound(
            f"no driver of vfiotool drives {device.name} "
            f"({device.vendor:04x}:{device.device:04x}, class {device.class_code:06x})",
            hint=f"name one: {_names()}",
            device=device.name,
        )
    return name
