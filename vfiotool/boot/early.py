"""The early variant: have vfio-pci take devices before any other driver, inside the initramfs.

vfio-pci takes devices by id there, so an id is given only where every device that bears it is
wanted; the others are left to the unit that runs later. Where vfio-pci is built into the kernel
modprobe.d is never read, and only the kernel's command line counts
(Documentation/admin-guide/kernel-parameters.rst).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vfiotool.devices.pci import PciIdentity
from vfiotool.host.host import Host
from vfiotool.host.paths import PROC_OSRELEASE, SYS_PCI_DEVICES

_MODULES = "/lib/modules"


@dataclass(frozen=True)
class ModuleFacts:
    """What the running kernel's modules offer: (pattern, module) of the loadable and built in."""

    release: str | None
    loadable: tuple[tuple[str, str], ...] = ()
    built_in: tuple[tuple[str, str], ...] = ()
    vfio_built_in: bool = False


@dataclass(frozen=True)
class Early:
    """What the early variant can do. `left` pairs a device or id with the reason it cannot."""

    ids: tuple[str, ...] = ()
    soft_dependencies: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    vfio_built_in: bool = False
    aliases_known: bool = True

    @property
    def kernel_words(self) -> str:
        """What would have to stand on the kernel's command line to the same end."""
        return f"vfio-pci.ids={','.join(self.ids)}"


def read_modules(host: Host) -> ModuleFacts:
    """From the running kernel's modules.alias, modules.builtin and modules.builtin.modinfo."""
    release = host.read(PROC_OSRELEASE)
    if release is None or not re.fullmatch(r"[A-Za-z0-9_.+~-]+", release):
        return ModuleFacts(None)
    base = f"{_MODULES}/{release}"
    built_in = host.read(f"{base}/modules.builtin") or ""
    return ModuleFacts(
        release=release,
        loadable=parse_aliases(host.read(f"{base}/modules.alias") or ""),
        built_in=parse_built_in(host.read(f"{base}/modules.builtin.modinfo") or ""),
        vfio_built_in=re.search(r"/vfio-pci\.ko$", built_in, re.MULTILINE) is not None,
    )


def parse_aliases(text: str) -> tuple[tuple[str, str], ...]:
    """The `alias pci:… module` lines of a modules.alias."""
    found = re.findall(r"^alias (pci:\S+) (\S+)$", text, re.MULTILINE)
    return tuple((pattern, module) for pattern, module in found)


def parse_built_in(text: str) -> tuple[tuple[str, str], ...]:
    """The `module.alias=pci:…` entries of a modules.builtin.modinfo (separated by NUL)."""
    found = re.findall(r"(?:^|\0)([A-Za-z0-9_-]+)\.alias=(pci:[^\0]+)", text)
    return tuple((pattern, module) for module, pattern in found)


def read_modaliases(host: Host, addresses: Iterable[str]) -> dict[str, str]:
    """Each function's modalias (`pci:v…`), where the host tells."""
    read = {address: host.read(f"{SYS_PCI_DEVICES}/{address}/modalias") for address in addresses}
    return {address: text for address, text in read.items() if text}


def plan_early(
    wanted: Mapping[str, str],
    ids: Iterable[str],
    functions: Iterable[PciIdentity],
    modaliases: Mapping[str, str],
    modules: ModuleFacts,
) -> Early:
    """Decide what can be taken early.

    `wanted` maps the addresses that the policy takes to their drivers; `ids` are those that it
    takes by id, whether such a device is there or not; `functions` are all of the host's.
    """
    by_id: dict[str, list[PciIdentity]] = {}
    for function in functions:
        by_id.setdefault(f"{function.vendor}:{function.device}", []).append(function)
    left: list[tuple[str, str]] = []
    taken: dict[str, None] = {}
    for name in dict.fromkeys([*ids, *(_id_of(by_id, address) for address in wanted)]):
        bearers = by_id.get(name, [])
        why = _why_not(name, bearers, wanted)
        if why is None:
            taken[name] = None
        else:
            left += [(item.address, why) for item in bearers if item.address in wanted]
    soft: set[str] = set()
    for address in wanted:
        if _id_of(by_id, address) not in taken:
            continue
        owner = _match(modules.built_in, modaliases.get(address))
        if owner - {"vfio_pci"} and not modules.vfio_built_in:
            names = ", ".join(sorted(owner))
            left.append((address, f"{names} is built into the kernel and takes it before modules"))
        soft |= {
            module.replace("_", "-") for module in _match(modules.loadable, modaliases.get(address))
        }
    soft -= {"vfio-pci"}
    return Early(
        ids=tuple(taken),
        soft_dependencies=tuple(sorted(soft)),
        left=tuple(left),
        vfio_built_in=modules.vfio_built_in,
        aliases_known=bool(modules.loadable),
    )


def _id_of(by_id: Mapping[str, list[PciIdentity]], address: str) -> str:
    for name, bearers in by_id.items():
        if any(item.address == address for item in bearers):
            return name
    return ""


def _why_not(name: str, bearers: list[PciIdentity], wanted: Mapping[str, str]) -> str | None:
    drivers = {wanted[item.address] for item in bearers if item.address in wanted}
    if drivers - {"vfio-pci"}:
        return f"vfio-pci takes ids early; it is to have {', '.join(sorted(drivers))}"
    others = [item.address for item in bearers if item.address not in wanted]
    if others:
        return f"{', '.join(others)} has the same id {name} and would be taken as well"
    if any(item.is_bridge for item in bearers):
        return "it is a bridge"
    return None if name else "the host does not show it"


def _match(aliases: Iterable[tuple[str, str]], modalias: str | None) -> set[str]:
    if modalias is None:
        return set()
    return {module for pattern, module in aliases if fnmatch.fnmatchcase(modalias, pattern)}
