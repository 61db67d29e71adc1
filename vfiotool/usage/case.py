"""All that a verdict on a device is made of, read once, as frozen values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vfiotool.devices.acs import Merger, find_mergers
from vfiotool.devices.iommu import GroupReader, IommuGroup
from vfiotool.devices.pci import PciFunction, read_function
from vfiotool.devices.platform import Platform, read_platform
from vfiotool.devices.reset import lacks_reset
from vfiotool.devices.sriov import read_vfs
from vfiotool.devices.vgpu import Vgpu, may_be_vgpu, read_vgpu
from vfiotool.errors import NotFound
from vfiotool.host.distribution import Distribution, read_distribution
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    PROC_OSRELEASE,
    SYS_LOCKDOWN,
    SYS_MODULE,
    SYS_PCI_DRIVERS,
)
from vfiotool.usage.blocker import Usage
from vfiotool.usage.sight import Sight
from vfiotool.usage.survey import look

# Few commands meet a mediated device.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfiotool.devices.mdev import Mdev


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host says for all its devices alike.

    `denylist_off`: vfio-pci takes even what it counts as unsafe; `has_vfio_pci` is None where the
    tree does not tell; `lockdown` the kernel's mode, None where there is none. `privileged`: root
    looked, who sees all there is; None where the tree is not the running machine.
    """

    platform: Platform
    denylist_off: bool
    has_vfio_pci: bool | None
    lockdown: str | None
    distribution: Distribution
    privileged: bool | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One device with its group and who uses each of its members.

    `function` is None for an mdev, `mdev` for a function. `usages` has the device itself and each
    other member that is on a driver of the host. `noiommu`: its group is one without an IOMMU.
    `mergers` tell why the group is as large as it is, where that was asked for. `neighbours` has
    its other members that are on a driver of the host, as far as they are PCI functions.
    `no_reset`: the kernel has no way to reset the function, None where that is not told.
    """

    facts: HostFacts
    name: str
    function: PciFunction | None
    mdev: Mdev | None
    group: IommuGroup | None
    noiommu: bool
    usages: Mapping[str, Usage] = field(hash=False)
    mergers: tuple[Merger, ...] = ()
    neighbours: Mapping[str, PciFunction] = field(default_factory=dict, hash=False)
    no_reset: bool | None = None
    vgpu: Vgpu | None = None


class CaseReader:
    """Reads one device's case after another by one look at the host: one sight for them all.

    Functions and groups that were read already are taken as they are.
    """

    def __init__(
        self,
        host: Host,
        functions: Mapping[str, PciFunction] | None = None,
        groups: Mapping[int, IommuGroup] | None = None,
        *,
        types: bool = True,
    ) -> None:
        """Without `types` a group's domain type is not read (`GroupReader`)."""
        self._host = host
        self._sight = Sight(host, functions)
        self._group_reader = GroupReader(host, functions, types=types)
        self._functions = functions or {}
        self._groups: dict[int, IommuGroup | None] = dict(groups or {})
        self._usages: dict[str, Usage] = {}
        self._others: dict[str, PciFunction | None] = {}
        self._facts: HostFacts | None = None
        self._mdevs: dict[str, Mdev] | None = None

    def read(self, name: str, *, reasons: bool = False) -> Case:
        """The case of a PCI function (full address) or mdev (UUID); raises NotFound.

        With `reasons`, what merges its group with others is looked up too.
        """
        function = self._functions.get(name) or read_function(self._host, name)
        if function is not None:
            return self.of(function, reasons=reasons)
        if self._mdevs is None:
            from vfiotool.devices.mdev import read_mdevs

            self._mdevs = {mdev.uuid: mdev for mdev in read_mdevs(self._host)}
        mdev = self._mdevs.get(name)
        if mdev is None:
            raise NotFound(
                f"no PCI function or mediated device {name}",
                hint="vfiotool devices and vfiotool mdev list name them",
                device=name,
            )
        group = self._group(mdev.iommu_group)
        usages = {name: self._usage(name, None)}
        return Case(self.facts, name, None, mdev, group, noiommu=False, usages=usages)

    def of(self, function: PciFunction, *, reasons: bool = False) -> Case:
        """The case of a function that was read already."""
        name, group = function.address, self._group(function.iommu_group)
        usages = {name: self._usage(name, function)}
        for member in group.devices if group is not None else ():
            if member.role == "host" and member.address != name:
                known = self._functions.get(member.address)
                usages[member.address] = self._usage(member.address, known)
        mergers: tuple[Merger, ...] = ()
        if reasons and group is not None and len(group.devices) > 1:
            members = {member.address for member in group.devices}
            mergers = find_mergers(self._host, name, function.path, members)
        noiommu = group is not None and group.noiommu
        others = self._neighbours(usages.keys() - {name})
        return Case(
            self.facts,
            name,
            function,
            None,
            group,
            noiommu,
            usages,
            mergers,
            others,
            lacks_reset(self._host, function),
            read_vgpu(self._host, name) if may_be_vgpu(function) else None,
        )

    def _neighbours(self, names: Iterable[str]) -> dict[str, PciFunction]:
        """Those of the devices that are PCI functions, each read once."""
        found = {}
        for name in names:
            if name not in self._others:
                known = self._functions.get(name)
                self._others[name] = known or read_function(self._host, name)
            function = self._others[name]
            if function is not None:
                found[name] = function
        return found

    @property
    def facts(self) -> HostFacts:
        """The host's own facts, read once."""
        if self._facts is None:
            self._facts = read_host_facts(self._host)
        return self._facts

    def _group(self, number: int | None) -> IommuGroup | None:
        if number is None:
            return None
        if number not in self._groups:
            self._groups[number] = self._group_reader.read(number)
        return self._groups[number]

    def _usage(self, name: str, function: PciFunction | None) -> Usage:
        """Who uses a device; of a PF, who uses its VFs too, which go before it can be had."""
        own = self._own_usage(name, function)
        if not any(blocker.kind == "vfs-enabled" for blocker in own.blockers):
            return own
        vfs = [
            self._own_usage(vf.address, self._functions.get(vf.address))
            for vf in read_vfs(self._host, name)
        ]
        return Usage(
            (*own.blockers, *(blocker for usage in vfs for blocker in usage.blockers)),
            (*own.unknown, *(text for usage in vfs for text in usage.unknown)),
        )

    def _own_usage(self, name: str, function: PciFunction | None) -> Usage:
        if name not in self._usages:
            self._usages[name] = look(self._sight, name, function)
        return self._usages[name]


def read_case(host: Host, name: str, *, reasons: bool = False) -> Case:
    """One device's case. Raises NotFound if there is no such device."""
    return CaseReader(host).read(name, reasons=reasons)


def read_host_facts(host: Host) -> HostFacts:
    """What the host says for all its devices."""
    lockdown = re.search(r"\[(\w+)\]", host.read(SYS_LOCKDOWN) or "")
    denylist = host.read(f"{SYS_MODULE}/vfio_pci/parameters/disable_denylist")
    return HostFacts(
        platform=read_platform(host),
        denylist_off=denylist in ("Y", "1"),
        has_vfio_pci=_has_vfio_pci(host),
        lockdown=None if lockdown is None or lockdown[1] == "none" else lockdown[1],
        distribution=read_distribution(host),
        privileged=os.geteuid() == 0 if host.live else None,
    )


def _has_vfio_pci(host: Host) -> bool | None:
    if host.isdir(f"{SYS_PCI_DRIVERS}/vfio-pci"):
        return True
    modules = f"/lib/modules/{host.read(PROC_OSRELEASE)}"
    files = host.listdir(f"{modules}/kernel/drivers/vfio/pci")
    if any(name.startswith("vfio-pci.ko") for name in files):
        return True
    return False if host.listdir(modules) else None
