"""The names of drivers: which are registered, which a module brings, which VFIO driver fits.

A module's name and its driver's can differ by dashes and underscores, and only the folder below
`bus/pci/drivers` tells which it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from vfiotool.host.host import Host
from vfiotool.host.paths import PROC_OSRELEASE, SYS_MODULE
from vfiotool.host.tree import Tree

DEFAULT_DRIVER = "vfio-pci"
_VFIO_ALIAS = "alias vfio_pci:"
# Of VFIO drivers all others register as KBUILD_MODNAME, with underscores (drivers/vfio/pci).
_WITH_DASHES = frozenset({"vfio-pci", "xe-vfio-pci", "pci-stub"})
_MODPROBE_FOLDERS = ("/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d")


def canonical_name(name: str) -> str:
    """The name under which the driver of that module registers, for those that are known here.

    `vfio_pci` -> `vfio-pci`, `mlx5-vfio-pci` -> `mlx5_vfio_pci`; any other name as it is.
    """
    dashes = name.replace("_", "-")
    if dashes in _WITH_DASHES:
        return dashes
    return name.replace("-", "_") if dashes.endswith("-vfio-pci") else name


def kernel_name(name: str, registered: Iterable[str]) -> str:
    """The driver's name as this kernel has it, however it was spelt; else `canonical_name`."""
    names = frozenset(registered)
    if name in names:
        return name
    plain = name.replace("-", "_")
    same = sorted(other for other in names if other.replace("-", "_") == plain)
    return same[0] if same else canonical_name(name)


def read_missing(host: Host, names: Iterable[str], registered: frozenset[str]) -> frozenset[str]:
    """Those of `names` that no driver here has and no module brings.

    What is not known for certain is not named: a host whose list of modules cannot be read is
    taken to have them all.
    """
    wanted = {kernel_name(name, registered) for name in names} - {"none"}
    wanted -= registered
    if not wanted:
        return frozenset()
    known = _module_names(host)
    if known is None:
        return frozenset()
    return frozenset(name for name in wanted if name.replace("-", "_") not in known)


def is_listed(host: Host, driver: str) -> bool | None:
    """Whether a module of that name is listed; None where the list of modules cannot be read."""
    known = _module_names(host)
    return None if known is None else driver.replace("-", "_") in known


def _module_names(host: Host) -> frozenset[str] | None:
    """All that modprobe would find, with underscores; None where the list cannot be read."""
    release = host.read(PROC_OSRELEASE)
    folder = f"/lib/modules/{release}"
    table = _whole(host, f"{folder}/modules.dep") if release else None
    if table is None:
        return None
    paths = (line.partition(":")[0] for line in table.splitlines())
    built_in = (_whole(host, f"{folder}/modules.builtin") or "").splitlines()
    found = {path.rpartition("/")[2].partition(".ko")[0] for path in (*paths, *built_in)}
    found |= set(host.listdir(SYS_MODULE))
    aliases = [_whole(host, f"{folder}/modules.alias") or ""]
    aliases += [
        _whole(host, f"{place}/{name}") or ""
        for place in _MODPROBE_FOLDERS
        for name in host.listdir(place)
    ]
    for text in aliases:
        found.update(re.findall(r"(?m)^\s*(?:alias|install)\s+([\w-]+)\s", text))
    return frozenset(name.replace("-", "_") for name in found)


def _whole(host: Host, path: str) -> str | None:
    try:
        return host.read_bytes(path).decode("utf-8", "replace")
    except OSError:
        return None


@dataclass(frozen=True)
class Variant:
    """A `vfio_pci:` alias: which functions a VFIO driver is made for."""

    pattern: re.Pattern[str]
    exactness: int
    driver: str


# Reading a megabyte of aliases is what planning a bind costs most: once a tree is enough.
_VARIANTS: WeakKeyDictionary[Tree, tuple[Variant, ...]] = WeakKeyDictionary()


def read_variants(host: Host) -> tuple[Variant, ...]:
    """The VFIO drivers that the kernel's modules offer, most exact first; read once a host.

    Source: include/linux/mod_devicetable.h, PCI_ID_F_VFIO_DRIVER_OVERRIDE.
    """
    found = _VARIANTS.get(host.tree)
    if found is None:
        release = host.read(PROC_OSRELEASE)
        text = host.read(f"/lib/modules/{release}/modules.alias") if release else None
        found = _VARIANTS[host.tree] = parse_variants(text or "")
    return found


def parse_variants(text: str) -> tuple[Variant, ...]:
    """The `alias vfio_pci:… module` lines of a modules.alias."""
    found = []
    for line in _alias_lines(text):
        words = line.split()
        if len(words) != 3:
            continue
        alias = words[1].removeprefix("vfio_pci:")
        # Globs of modprobe: `*` alone occurs in these aliases.
        pattern = re.compile(
            ".*".join(re.escape(piece) for piece in alias.split("*")), re.IGNORECASE
        )
        found.append(Variant(pattern, len(alias.replace("*", "")), canonical_name(words[2])))
    return tuple(sorted(found, key=lambda variant: -variant.exactness))


def _alias_lines(text: str) -> Iterator[str]:
    """The few lines of a megabyte, found as fast as memory is read."""
    at = text.find(_VFIO_ALIAS)
    while at >= 0:
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if at == 0 or text[at - 1] == "\n":
            yield text[at:end]
        at = text.find(_VFIO_ALIAS, end)


def best_driver(modalias: str | None, variants: tuple[Variant, ...]) -> str:
    """The most exact VFIO driver for a device's `pci:v…` modalias, else vfio-pci."""
    name = (modalias or "").removeprefix("pci:")
    for variant in variants:
        if variant.pattern.fullmatch(name):
            return variant.driver
    return DEFAULT_DRIVER
