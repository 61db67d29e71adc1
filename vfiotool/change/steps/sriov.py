"""Steps on a physical function and its VFs.

Source: Documentation/PCI/pci-iov-howto.rst, drivers/pci/iov.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from vfiotool.change.steps.base import (
    SetAttribute,
    Step,
    Taken,
    Writer,
    check_identity,
    device_keys,
    drifted,
    pf_nodes,
)
from vfiotool.change.steps.names import require_address
from vfiotool.change.steps.state import UNKNOWN, Identity, gone, read_msix_count, read_num_vfs
from vfiotool.devices.sriov import read_vfs
from vfiotool.errors import KernelError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES


@dataclass(frozen=True)
class SetVfCount(Step):
    """Set a physical function's number of VFs, through 0 where the kernel wants it.

    A change between two numbers destroys all VFs of the function. A partial enable succeeds in
    the kernel; it is read back and counts as a failure here (Documentation/PCI/pci-iov-howto.rst).
    """

    verb: ClassVar[str] = "set-vf-count"
    nested: ClassVar[dict[str, type]] = {"identity": Identity}
    pf: str
    before: int
    after: int
    identity: Identity = UNKNOWN

    @property
    def target(self) -> str:
        return self.pf

    @property
    def path(self) -> str:
        return f"{SYS_PCI_DEVICES}/{self.pf}/sriov_numvfs"

    def ends(self) -> tuple[object, object]:
        return self.before, self.after

    def undo_text(self) -> str | None:
        return f"set {self.before} VFs"

    def inverse(self) -> Step:
        return replace(self, before=self.after, after=self.before)

    def present(self, host: Host) -> bool:
        return host.exists(self.path)

    def check(self, host: Host, *, begun: bool = False) -> None:
        check_identity(host, self.pf, self.identity)
        found = read_num_vfs(host, self.pf)
        if begun and found <= max(self.before, self.after):
            # Through 0, and maybe fewer than were asked for.
            return
        if found not in (self.before, self.after):
            raise drifted(self.pf, f"{found} VFs", self.before, self.after)

    def holds(self, host: Host) -> bool:
        return read_num_vfs(host, self.pf) == self.after

    def check_names(self) -> None:
        require_address(self.pf)

    def takes(self, host: Host) -> Iterator[Taken]:
        """Every VF that stands now: a change between two numbers goes through 0."""
        if host.exists(self.path) and not self.holds(host):
            yield from (Taken(vf.address) for vf in read_vfs(host, self.pf))

    def lock_keys(self, host: Host) -> set[str]:
        return device_keys(host, "pci", self.pf)

    def nodes(self, host: Host) -> tuple[str, ...]:
        return pf_nodes(host, self.pf)

    @property
    def remakes_vfs_of(self) -> str | None:
        return self.pf

    def token_owner(self, host: Host) -> str | None:
        return self.pf if self.after else None

    def run(self, writer: Writer) -> None:
        found = read_num_vfs(writer.host, self.pf)
        if found == self.after:
            return
        if found:
            self._write(writer, 0)
        if self.after:
            self._write(writer, self.after)

    def _write(self, writer: Writer, count: int) -> None:
        writer.write_attribute(self.path, str(count))
        found = read_num_vfs(writer.host, self.pf)
        if found != count:
            raise KernelError(
                f"{self.pf}: the kernel enabled {found} VFs where {count} were asked for",
                hint="the device, its firmware or the bus has room for no more",
                device=self.pf,
            )


@dataclass(frozen=True)
class SetAutoprobe(SetAttribute):
    """Whether the kernel offers new VFs of a physical function to host drivers."""

    verb: ClassVar[str] = "set-autoprobe"
    pf: str
    before: bool
    after: bool

    @property
    def target(self) -> str:
        return self.pf

    def check_names(self) -> None:
        require_address(self.pf)

    def lock_keys(self, host: Host) -> set[str]:
        return device_keys(host, "pci", self.pf)

    @property
    def path(self) -> str:
        return f"{SYS_PCI_DEVICES}/{self.pf}/sriov_drivers_autoprobe"

    @property
    def values(self) -> tuple[str | None, str]:
        return str(int(self.before)), str(int(self.after))

    def reversed_to(self, value: str) -> Step:
        return replace(self, before=self.after, after=value == "1")


@dataclass(frozen=True)
class SetVfNumber(SetAttribute):
    """Base of the steps that set one number of a VF; `before` is None where it was not told."""

    vf: str
    before: int | None
    after: int

    def check_names(self) -> None:
        require_address(self.vf)

    def takes(self, host: Host) -> Iterator[Taken]:
        if self.writes(host):
            yield Taken(self.vf)

    def lock_keys(self, host: Host) -> set[str]:
        return device_keys(host, "pci", self.vf)

    @property
    def target(self) -> str:
        return self.vf

    @property
    def values(self) -> tuple[str | None, str]:
        return None if self.before is None else str(self.before), str(self.after)

    def reversed_to(self, value: str) -> Step:
        return replace(self, before=self.after, after=int(value))


@dataclass(frozen=True)
class SetMsixCount(SetVfNumber):
    """How many MSI-X vectors a VF has (ABI/testing/sysfs-bus-pci, sriov_vf_msix_count).

    The VF must have no driver. The attribute cannot be read: the capability tells the number.
    """

    verb: ClassVar[str] = "set-msix-count"

    @property
    def path(self) -> str:
        return f"{SYS_PCI_DEVICES}/{self.vf}/sriov_vf_msix_count"

    def _read(self, host: Host) -> str | None:
        if not host.exists(self.path):
            raise gone(f"{self.vf} sriov_vf_msix_count")
        count = read_msix_count(host, self.vf)
        return None if count is None else str(count)


@dataclass(frozen=True)
class SetVgpuType(SetVfNumber):
    """The vGPU type of a VF that stays on NVIDIA's driver (its `current_vgpu_type`)."""

    verb: ClassVar[str] = "set-vgpu-type"

    @property
    def path(self) -> str:
        return f"{SYS_PCI_DEVICES}/{self.vf}/nvidia/current_vgpu_type"
