"""Steps on mediated devices (Documentation/driver-api/vfio-mediated-device.rst)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from vfiotool.change.steps.base import SetAttribute, Step, Taken, Writer, drifted
from vfiotool.change.steps.names import ATTRIBUTE, PART, UUID, require
from vfiotool.change.steps.state import device_nodes, read_mdev_place
from vfiotool.errors import KernelError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_MDEV_DEVICES, SYS_MDEV_PARENTS


@dataclass(frozen=True)
class SetMdev(Step):
    """Create an mdev of a type (`exists` true), or remove it."""

    verb: ClassVar[str] = "set-mdev"
    uuid: str
    parent: str
    type: str
    exists: bool

    @property
    def target(self) -> str:
        return self.uuid

    def ends(self) -> tuple[object, object]:
        made = f"{self.parent}/{self.type}"
        return (None, made) if self.exists else (made, None)

    def undo_text(self) -> str | None:
        return "remove it" if self.exists else f"create it as {self.parent}/{self.type}"

    def inverse(self) -> Step:
        return replace(self, exists=not self.exists)

    def present(self, host: Host) -> bool:
        return host.exists(f"{SYS_MDEV_PARENTS}/{self.parent}")

    def check(self, host: Host, *, begun: bool = False) -> None:
        place = read_mdev_place(host, self.uuid)
        if place not in (None, (self.parent, self.type)):
            raise drifted(self.uuid, "/".join(place or ()), f"{self.parent}/{self.type}", "nothing")

    def holds(self, host: Host) -> bool:
        place = read_mdev_place(host, self.uuid)
        return place == (self.parent, self.type) if self.exists else place is None

    def check_names(self) -> None:
        require("an mdev's UUID", UUID, self.uuid)
        require("an mdev's parent", PART, self.parent)
        require("an mdev type", PART, self.type)

    def takes(self, host: Host) -> Iterator[Taken]:
        if not self.exists and not self.holds(host):
            yield Taken(self.uuid)

    @property
    def removes(self) -> str | None:
        return None if self.exists else self.uuid

    def lock_keys(self, host: Host) -> set[str]:
        return {f"mdev-{self.uuid}", f"device-{self.parent}"}

    def nodes(self, host: Host) -> tuple[str, ...]:
        return device_nodes(host, "mdev", self.uuid)

    def run(self, writer: Writer) -> None:
        if self.holds(writer.host):
            return
        if self.exists:
            base = f"{SYS_MDEV_PARENTS}/{self.parent}/mdev_supported_types/{self.type}"
            writer.write_attribute(f"{base}/create", self.uuid)
        else:
            writer.write_attribute(f"{SYS_MDEV_DEVICES}/{self.uuid}/remove", "1")
        if not self.holds(writer.host):
            done = "created" if self.exists else "removed"
            raise KernelError(
                f"{self.uuid} was not {done} though the kernel took the request", device=self.uuid
            )


@dataclass(frozen=True)
class SetMdevAttribute(SetAttribute):
    """One attribute of an mdev, named relative to its folder (`vendor/budget`)."""

    verb: ClassVar[str] = "set-mdev-attribute"
    uuid: str
    attribute: str
    before: str | None
    after: str

    @property
    def target(self) -> str:
        return self.uuid

    @property
    def path(self) -> str:
        return f"{SYS_MDEV_DEVICES}/{self.uuid}/{self.attribute}"

    @property
    def values(self) -> tuple[str | None, str]:
        return self.before, self.after

    def reversed_to(self, value: str) -> Step:
        return replace(self, before=self.after, after=value)

    @property
    def facet(self) -> str:
        return self.attribute

    def check_names(self) -> None:
        require("an mdev's UUID", UUID, self.uuid)
        require("an mdev's attribute", ATTRIBUTE, self.attribute)

    def takes(self, host: Host) -> Iterator[Taken]:
        if self.writes(host):
            yield Taken(self.uuid)

    def lock_keys(self, host: Host) -> set[str]:
        place = read_mdev_place(host, self.uuid)
        return {f"mdev-{self.uuid}"} | (set() if place is None else {f"device-{place[0]}"})

    def nodes(self, host: Host) -> tuple[str, ...]:
        return device_nodes(host, "mdev", self.uuid)
