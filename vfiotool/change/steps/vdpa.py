"""Steps on vDPA devices: make one on a parent, or remove it (include/uapi/linux/vdpa.h)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from vfiotool.change.steps.base import SetAttribute, Step, Taken, Writer, drifted
from vfiotool.change.steps.names import PART, require
from vfiotool.devices.vdpa import (
    VdpaSettings,
    delete_request,
    find_family,
    new_request,
    read_device_names,
    read_devices,
    set_mac_request,
)
from vfiotool.errors import KernelError, NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_VDPA_AUTOPROBE


@dataclass(frozen=True)
class SetVdpa(Step):
    """Make vDPA device `name` on `parent` (`exists` true), or remove it.

    The settings are those that the device is made with, and made again with when a removal is
    undone. Binding it to vhost_vdpa or virtio_vdpa is a BindDriver on the bus `vdpa`.
    """

    verb: ClassVar[str] = "set-vdpa"
    name: str
    parent: str
    exists: bool
    mac: str | None = None
    mtu: int | None = None
    max_vqp: int | None = None
    features: int | None = None

    @property
    def target(self) -> str:
        return self.name

    @property
    def settings(self) -> VdpaSettings:
        return VdpaSettings(self.mac, self.mtu, self.max_vqp, self.features)

    def ends(self) -> tuple[object, object]:
        return (None, self.parent) if self.exists else (self.parent, None)

    def undo_text(self) -> str | None:
        return "remove it" if self.exists else f"make it on {self.parent} again"

    def inverse(self) -> Step:
        return replace(self, exists=not self.exists)

    def present(self, host: Host) -> bool:
        # A removed device is made again on its parent, which netlink alone shows.
        return True

    def check(self, host: Host, *, begun: bool = False) -> None:
        # Both ends are states of this step; a device of that name on another parent is refused by
        # whoever plans, who has read the parents.
        new_request(0, self.name, self.parent, self.settings)

    def holds(self, host: Host) -> bool:
        return (self.name in read_device_names(host)) == self.exists

    def check_names(self) -> None:
        require("a vDPA device's name", PART, self.name)
        # Where it would be made and with what: raises for names and values that cannot be.
        new_request(0, self.name, self.parent, self.settings)

    def takes(self, host: Host) -> Iterator[Taken]:
        if not self.exists and not self.holds(host):
            yield Taken(self.name)

    @property
    def removes(self) -> str | None:
        return None if self.exists else self.name

    def lock_keys(self, host: Host) -> set[str]:
        return {f"device-{self.name}", "vdpa"}

    def run(self, writer: Writer) -> None:
        if self.holds(writer.host):
            return
        family = find_family(writer.host)
        if self.exists:
            writer.send_netlink(new_request(family, self.name, self.parent, self.settings))
        else:
            writer.send_netlink(delete_request(family, self.name))
        if not self.holds(writer.host):
            done = "made" if self.exists else "removed"
            raise KernelError(
                f"{self.name} was not {done} though the kernel took the request", device=self.name
            )


@dataclass(frozen=True)
class SetVdpaAutoprobe(SetAttribute):
    """Whether new vDPA devices are offered to drivers at once (the bus's drivers_autoprobe).

    It is off while a device is made for a virtual machine: else the host would take it first, and
    look for partitions on the disk of a guest.
    """

    verb: ClassVar[str] = "set-vdpa-autoprobe"
    before: bool
    after: bool

    @property
    def target(self) -> str:
        return "vdpa"

    @property
    def path(self) -> str:
        return SYS_VDPA_AUTOPROBE

    @property
    def values(self) -> tuple[str, str]:
        return str(int(self.before)), str(int(self.after))

    def reversed_to(self, value: str) -> Step:
        return replace(self, before=self.after, after=value == "1")

    def check_names(self) -> None:
        return

    def lock_keys(self, host: Host) -> set[str]:
        return {"vdpa"}


@dataclass(frozen=True)
class SetVdpaMac(Step):
    """Give a network device another MAC address (VDPA_CMD_DEV_ATTR_SET, from Linux 6.12 on)."""

    verb: ClassVar[str] = "set-vdpa-mac"
    name: str
    before: str
    after: str

    @property
    def target(self) -> str:
        return self.name

    def ends(self) -> tuple[object, object]:
        return self.before, self.after

    def undo_text(self) -> str | None:
        return f"set {self.before}"

    def inverse(self) -> Step:
        return replace(self, before=self.after, after=self.before)

    def present(self, host: Host) -> bool:
        return self.name in read_device_names(host)

    def check(self, host: Host, *, begun: bool = False) -> None:
        found = self._read(host)
        if found not in (self.before.lower(), self.after.lower()):
            raise drifted(self.name, found, self.before, self.after)

    def holds(self, host: Host) -> bool:
        return self._read(host) == self.after.lower()

    def _read(self, host: Host) -> str:
        device = next((item for item in read_devices(host) if item.name == self.name), None)
        if device is None:
            raise NotFound(f"there is no vDPA device {self.name}", device=self.name)
        return str((device.config or {}).get("mac")).lower()

    def check_names(self) -> None:
        require("a vDPA device's name", PART, self.name)
        for mac in (self.before, self.after):
            set_mac_request(0, self.name, mac)

    def takes(self, host: Host) -> Iterator[Taken]:
        """Who uses it has another address afterwards."""
        if not self.holds(host):
            yield Taken(self.name)

    def lock_keys(self, host: Host) -> set[str]:
        return {f"device-{self.name}", "vdpa"}

    def run(self, writer: Writer) -> None:
        if self.holds(writer.host):
            return
        family = find_family(writer.host)
        writer.send_netlink(set_mac_request(family, self.name, self.after))
        if not self.holds(writer.host):
            raise KernelError(
                f"{self.name} kept its address though the kernel took the request", device=self.name
            )
