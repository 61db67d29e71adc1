"""Steps that give a device a driver.

Source: Documentation/ABI/testing/sysfs-bus-pci, drivers/pci/pci-driver.c, drivers/base/bus.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from vfiotool.change.steps.base import (
    Rebinding,
    Step,
    Taken,
    Writer,
    check_identity,
    device_keys,
    drifted,
)
from vfiotool.change.steps.names import DRIVER, OVERRIDE, PART, require, require_address
from vfiotool.change.steps.state import (
    ANY,
    BUSES,
    PARKED,
    UNKNOWN,
    Binding,
    Identity,
    device_exists,
    device_nodes,
    driver_registered,
    read_binding,
    read_driver,
)
from vfiotool.devices.attached import functions_behind
from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES

_SETTLE_S = 1.0


@dataclass(frozen=True)
class BindDriver(Step):
    """Give a PCI or vDPA device a driver (None: park it) and an override.

    The override is set before the old driver lets go, so that no other driver takes the device in
    between (Documentation/ABI/testing/sysfs-bus-pci, driver_override); `new_id` is never used.
    """

    verb: ClassVar[str] = "bind-driver"
    nested: ClassVar[dict[str, type]] = {
        "before": Binding,
        "after": Binding,
        "identity": Identity,
    }
    address: str
    before: Binding
    after: Binding
    identity: Identity = UNKNOWN
    bus: str = "pci"
    # A VF that this plan makes or destroys: where it stands when the step runs is no drift.
    fresh: bool = False

    @property
    def target(self) -> str:
        return self.address

    def ends(self) -> tuple[object, object]:
        return self.before.driver, self.after.driver

    def words(self) -> tuple[str, str]:
        if self.before.driver != self.after.driver:
            return str(self.before), str(self.after)
        # The driver stays, and only what keeps it on the device changes.
        overrides = (self.before.override, self.after.override)
        first, second = (f"override {text}" if text else "no override" for text in overrides)
        return f"{self.before} with {first}", second

    def undo_text(self) -> str | None:
        if self.before.driver == ANY:
            return "give it back to the kernel's choice"
        override = self.before.override
        kept = f"set the override {override}" if override else "clear the override"
        driver = self.before.driver
        return f"bind to {driver}, {kept}" if driver else f"leave without a driver, {kept}"

    def inverse(self) -> Step:
        return replace(self, before=self.after, after=self.before)

    def present(self, host: Host) -> bool:
        return device_exists(host, self.bus, self.address)

    def check(self, host: Host, *, begun: bool = False) -> None:
        if self.bus == "pci":
            check_identity(host, self.address, self.identity)
        found = read_binding(host, self.bus, self.address)
        if self.fresh or self.before.driver == ANY or (begun and self._on_the_way(found)):
            return
        if found not in (self.before, self.after):
            raise drifted(self.address, found, self.before, self.after)

    def _on_the_way(self, found: Binding) -> bool:
        """Whether nobody else's driver has the device: the step itself can have left it so."""
        ends = {self.before.driver, self.after.driver}
        return found.driver in {*ends, None} or ANY in ends

    def check_names(self) -> None:
        if self.bus not in BUSES:
            raise UsageError(f"{self.bus[:80]!r} is not a bus whose devices are given drivers")
        if self.bus == "pci":
            require_address(self.address)
        else:
            require("a device's name", PART, self.address)
        for binding in (self.before, self.after):
            require("a driver's name", DRIVER, None if binding.driver == ANY else binding.driver)
            require("an override", OVERRIDE, binding.override)

    def takes(self, host: Host) -> Iterator[Taken]:
        """The device, by the driver that it has now, and what lies behind it if it is a bridge."""
        base = f"{BUSES[self.bus].devices}/{self.address}"
        now = host.linkname(f"{base}/driver")
        if now == self.after.driver or not host.exists(base):
            return
        if self.after.driver == ANY and now is not None and not is_vfio_driver(now):
            return
        yield Taken(self.address, held_only=now is None and not self.after.taken)
        if now is not None and self.bus == "pci":
            for name in functions_behind(host, self.address):
                yield Taken(name)

    def lock_keys(self, host: Host) -> set[str]:
        return device_keys(host, self.bus, self.address)

    def nodes(self, host: Host) -> tuple[str, ...]:
        return device_nodes(host, self.bus, self.address)

    @property
    def rebinding(self) -> Rebinding | None:
        return Rebinding(self.bus, self.address, self.identity, self.before, self.after)

    def token_owner(self, host: Host) -> str | None:
        driver = self.after.driver
        if driver is None or not is_vfio_driver(driver):
            return None
        return host.linkname(f"{SYS_PCI_DEVICES}/{self.address}/physfn")

    def holds(self, host: Host) -> bool:
        found = read_binding(host, self.bus, self.address)
        if self.after.driver == ANY:
            return found.override is None
        return found == self.after

    def run(self, writer: Writer) -> None:
        found = read_binding(writer.host, self.bus, self.address)
        if self.after.driver == ANY:
            self._hand_back(writer, found)
            return
        override = found.override
        if found.driver != self.after.driver:
            guide = self.after.driver or PARKED
            self._set_override(writer, override, guide)
            self._unbind(writer, found.driver)
            if self.after.driver is not None:
                self._probe(writer, self.after.driver)
            override = guide
        self._set_override(writer, override, self.after.override)

    def _hand_back(self, writer: Writer, found: Binding) -> None:
        self._set_override(writer, found.override, None)
        if found.driver is not None and is_vfio_driver(found.driver):
            self._unbind(writer, found.driver)
        if read_driver(writer.host, self.bus, self.address) is None:
            writer.write_attribute(BUSES[self.bus].probe, self.address)

    def _set_override(self, writer: Writer, found: str | None, wanted: str | None) -> None:
        if found == wanted:
            return
        path = f"{BUSES[self.bus].devices}/{self.address}/driver_override"
        writer.write_attribute(path, f"{wanted or ''}\n", harmless=True)
        now = read_binding(writer.host, self.bus, self.address).override
        if now != wanted:
            raise self._failed(f"its driver_override reads {now!r} after {wanted!r} was written")

    def _unbind(self, writer: Writer, driver: str | None) -> None:
        if driver is None:
            return
        writer.write_attribute(f"{BUSES[self.bus].drivers}/{driver}/unbind", self.address)
        still = read_driver(writer.host, self.bus, self.address)
        if still is not None:
            raise self._failed(f"it is bound to {still} after it was unbound")

    def _probe(self, writer: Writer, driver: str) -> None:
        if not driver_registered(writer.host, self.bus, driver):
            raise self._failed(f"no driver named {driver} is registered with the kernel")
        writer.write_attribute(BUSES[self.bus].probe, self.address)
        bound = read_driver(writer.host, self.bus, self.address)
        if bound is None:
            # drivers_probe succeeds even if nothing bound; `bind` tells why.
            try:
                writer.write_attribute(f"{BUSES[self.bus].drivers}/{driver}/bind", self.address)
            except KernelError as error:
                raise KernelError(
                    f"{self.address}: {driver} did not take it: {error.message}",
                    hint="the kernel's log (dmesg) may tell more",
                    device=self.address,
                    errno_name=error.errno_name,
                ) from error
            bound = read_driver(writer.host, self.bus, self.address)
        if self.after.override == driver and not is_vfio_driver(driver):
            bound = self._settled(writer.host, driver)
        if bound != driver:
            raise self._failed(f"{driver} did not take it (it has {bound or 'no driver'})")

    def _settled(self, host: Host, driver: str) -> str | None:
        """The driver once a host's driver has had time to let go again of what it was forced on:
        nvme of Linux 6.1 takes any device, and looks at it in a work item."""
        end = host.clock.monotonic() + _SETTLE_S
        bound = read_driver(host, self.bus, self.address)
        while bound == driver and host.clock.monotonic() < end:
            host.clock.sleep(0.02)
            bound = read_driver(host, self.bus, self.address)
        return bound

    def _failed(self, what: str) -> KernelError:
        return KernelError(f"{self.address}: {what}", device=self.address)


@dataclass(frozen=True)
class LoadModule(Step):
    """Have modprobe load the module that brings a driver. Nothing has to be undone for it."""

    verb: ClassVar[str] = "load-module"
    module: str
    driver: str
    bus: str = "pci"

    @property
    def target(self) -> str:
        return self.module

    def ends(self) -> tuple[object, object]:
        return None, "loaded"

    def undo_text(self) -> str | None:
        return None

    def inverse(self) -> Step | None:
        return None

    def present(self, host: Host) -> bool:
        return True

    def check(self, host: Host, *, begun: bool = False) -> None:
        return

    def check_names(self) -> None:
        require("a module's name", DRIVER, self.module)
        require("a driver's name", DRIVER, self.driver)
        if self.bus not in BUSES:
            raise UsageError(f"{self.bus[:80]!r} is not a bus whose devices are given drivers")

    def holds(self, host: Host) -> bool:
        return driver_registered(host, self.bus, self.driver)

    @property
    def loads(self) -> str | None:
        return self.driver

    def run(self, writer: Writer) -> None:
        if self.holds(writer.host):
            return
        try:
            writer.load_module(self.module)
        except KernelError as error:
            if not is_vfio_driver(self.driver):
                raise KernelError(
                    f"no driver named {self.driver} is registered, and no module brings it: "
                    f"{error.message}",
                    hint=f"ls {BUSES[self.bus].drivers} shows the names",
                    errno_name=error.errno_name,
                ) from error
            raise Unsupported(
                f"this kernel has no {self.driver}: {error.message}",
                hint=f"install or build the module {self.module} (CONFIG_VFIO_PCI for vfio-pci)",
            ) from error
