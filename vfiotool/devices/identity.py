"""Groups and their members read with the fewest system calls and the lightest imports.

`groups` must start fast and list thousands of functions, so nothing here needs dataclasses,
regular expressions or more than the host; `iommu.py` gives the same facts as values.
`modalias` and the `driver` link tell a function's identity and driver, as its `uevent` would: that
one read less would hang on kernels that take the device's lock for it (see `read_uevent`).
"""

from __future__ import annotations

import os
from functools import lru_cache

from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_IOMMU_GROUPS, SYS_MDEV_DEVICES, SYS_PCI_DEVICES, SYS_VFIO_DEV
from vfiotool.host.tree import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    # vendor, device, class, driver, role
    Facts = tuple[str | None, str | None, str | None, str | None, str]
    Members = list[tuple[str, Facts]]

# Drivers with `driver_managed_dma` that are not VFIO drivers: they never claim the group's DMA.
# drivers/pci/pcie/portdrv.c, drivers/pci/pci-stub.c; no other driver of Linux 6.1 to 6.12 sets it,
# neither shpchp on a bridge nor pci-pf-stub (tests/lab/test_viable.py asks the kernel).
NO_DMA_DRIVERS = frozenset({"pcieport", "pci-stub"})
_VFIO_DRIVERS = frozenset({"vfio-fsl-mc", "vfio-platform", "vfio-amba", "vfio-cdx"})

_ALIAS_LENGTH = len("pci:v00008086d000010C9sv00008086sd0000A03Cbc02sc00i00")

# The file and the link that tell what a function is and who has it, for `Tree.read_many`.
IDENTITY = (("modalias",), ("driver",))

_VANISHED: Facts = (None, None, None, None, "unbound")


# A host has thousands of functions and few drivers.
@lru_cache(maxsize=256)
def is_vfio_driver(driver: str) -> bool:
    """Whether a driver's name is that of a VFIO driver (vfio-pci or a variant of it)."""
    name = driver.replace("_", "-")
    return "vfio-pci" in name or name in _VFIO_DRIVERS


def role_of(driver: str | None) -> str:
    """A PCI or platform member's role: `unbound`, `vfio`, `bridge` or `host`."""
    if driver is None:
        return "unbound"
    if is_vfio_driver(driver):
        return "vfio"
    return "bridge" if driver in NO_DMA_DRIVERS else "host"


def list_groups(host: Host) -> list[int]:
    """The ids of all groups, ascending."""
    try:
        names = host.tree.listdir(SYS_IOMMU_GROUPS)
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())


class GroupScan:
    """Reads one group after another, parsing what they have in common once."""

    def __init__(self, host: Host, given: Mapping[str, Facts] | None = None) -> None:
        """`given` has the facts of PCI functions that were read already, by address."""
        self._host = host
        self._tree = host.tree
        self._given = given or {}
        self._facts: dict[object, Facts] = {}
        self._nodes: bool | None = None

    def members(self, group: int) -> Members | None:
        """Each member's name and facts by name, or None if there is no such group (any more).

        A member's name is a PCI address, an mdev's UUID or another bus's device name; the facts
        of one that vanished while it was read are None.
        """
        try:
            names = self._tree.listdir(f"{SYS_IOMMU_GROUPS}/{group}/devices")
        except OSError:
            return [] if self._host.isdir(f"{SYS_IOMMU_GROUPS}/{group}") else None
        if len(names) > 1:
            names.sort()
        tree = self._tree
        known = self._facts
        found: Members = []
        for name in names:
            given = self._given.get(name)
            if given is not None:
                found.append((name, given))
                continue
            base = f"{SYS_PCI_DEVICES}/{name}"
            # The same for every VF of a function: parsed once.
            (alias,), (driver,) = tree.read_many(base, *IDENTITY)
            key = modalias_of(alias, driver)
            facts = None if key is None else known.get(key)
            if facts is None:
                text = read_uevent(tree, base) if key is None else as_uevent(*key, base)
                if text is None:
                    found.append((name, self._foreign(group, name)))
                    continue
                facts = parse_facts(text)
                if key is not None:
                    known[key] = facts
            if facts[4] == "host" and self._has_vfio_device(name):
                facts = (*facts[:4], "vfio")
            found.append((name, facts))
        return found

    def _has_vfio_device(self, address: str) -> bool:
        """Whether a driver that is none of VFIO's by its name has made a VFIO device all the same.

        NVIDIA's does for vGPUs, which are opened as they stand. Asked where the host has any.
        """
        if self._nodes is None:
            try:
                self._nodes = bool(self._tree.listdir(SYS_VFIO_DEV))
            except OSError:
                self._nodes = False
        return self._nodes and self._tree.isdir(f"{SYS_PCI_DEVICES}/{address}/vfio-dev")

    def attributes(self, group: int, names: tuple[str, ...]) -> tuple[bytes | None, ...]:
        """What these files of a group hold; None in the place of what is absent."""
        found, _ = self._tree.read_many(f"{SYS_IOMMU_GROUPS}/{group}", names)
        return tuple([None if isinstance(content, int) else content for content in found])

    def _foreign(self, group: int, name: str) -> Facts:
        """A member that is no readable PCI function: an mdev, another bus's device, or gone."""
        host = self._host
        if host.exists(f"{SYS_MDEV_DEVICES}/{name}"):
            driver = host.linkname(f"{SYS_MDEV_DEVICES}/{name}/driver")
            return (None, None, None, driver, "mdev")
        link = f"{SYS_IOMMU_GROUPS}/{group}/devices/{name}"
        target = host.realpath(link)
        if target is None or not host.exists(target):
            return _VANISHED
        driver = host.linkname(f"{target}/driver")
        return (None, None, None, driver, role_of(driver))


def read_uevent(tree: Tree, base: str) -> bytes | None:
    """What the `uevent` of the PCI function at `base` tells, or None if it is gone.

    It is put together from `modalias` and the `driver` link, which the kernel gives at any time.
    `uevent` itself waits for the device's lock on Debian 12's 6.1 (drivers/base/core.c,
    uevent_show), and so hangs for as long as somebody keeps a device that is being unbound. It is
    read where there is no `modalias`, which a running kernel always has.
    """
    (alias,), (driver,) = tree.read_many(base, *IDENTITY)
    found = modalias_of(alias, driver)
    if found is not None:
        return as_uevent(*found, base)
    try:
        return tree.read(f"{base}/uevent")
    except OSError:
        return _from_attributes(tree, base)


def modalias_of(alias: bytes | int, driver: str | int) -> tuple[bytes, str] | None:
    """A function's `modalias` and driver ("" for none), as `read_many` gives what IDENTITY names;
    None where there is no `modalias`."""
    if isinstance(alias, int):
        return None
    alias = alias.rstrip()
    if len(alias) < _ALIAS_LENGTH or not alias.startswith(b"pci:v"):
        return None
    return alias, "" if isinstance(driver, int) else driver.rpartition("/")[2]


def as_uevent(alias: bytes, driver_name: str, base: str) -> bytes:
    """What `uevent` of the function at `base` would tell, by its `modalias` and driver."""
    driver = os.fsencode(driver_name)
    # pci:v00008086d000010C9sv00008086sd0000A03Cbc02sc00i00 (drivers/pci/pci-sysfs.c, modalias_show)
    return b"".join(
        (
            b"DRIVER=%b\n" % driver if driver else b"",
            b"PCI_CLASS=%b%b%b\n" % (alias[44:46], alias[48:50], alias[51:53]),
            b"PCI_ID=%b:%b\n" % (alias[9:13], alias[18:22]),
            b"PCI_SUBSYS_ID=%b:%b\n" % (alias[28:32], alias[38:42]),
            b"PCI_SLOT_NAME=%b\n" % base[base.rindex("/") + 1 :].encode(),
            b"MODALIAS=%b\n" % alias,
        )
    )


def _from_attributes(tree: Tree, base: str) -> bytes | None:
    """The same from single attributes, for a part of a machine's tree that has no `uevent`."""

    def value(name: str) -> bytes:
        try:
            return tree.read(f"{base}/{name}").strip().removeprefix(b"0x")
        except OSError:
            return b""

    vendor, device, code = value("vendor"), value("device"), value("class")
    if not vendor and not code:
        return None
    try:
        driver = tree.readlink(f"{base}/driver").rpartition("/")[2].encode()
    except OSError:
        driver = b""
    subsystem = (value("subsystem_vendor"), value("subsystem_device"))
    return b"".join(
        (
            b"DRIVER=%b\n" % driver if driver else b"",
            b"PCI_CLASS=%b\n" % code if code else b"",
            b"PCI_ID=%b:%b\n" % (vendor, device) if vendor and device else b"",
            b"PCI_SUBSYS_ID=%b:%b\n" % subsystem if all(subsystem) else b"",
            b"PCI_SLOT_NAME=%b\n" % base[base.rindex("/") + 1 :].encode(),
        )
    )


def parse_facts(uevent: bytes) -> Facts:
    """Vendor, device, class, driver and role from a function's `uevent`."""
    keys: dict[str, str] = {}
    for line in uevent.decode("utf-8", "backslashreplace").split("\n"):
        key, separator, value = line.partition("=")
        if separator:
            keys[key] = value.strip()
    vendor, device = parse_id_pair(keys.get("PCI_ID"))
    class_code = keys.get("PCI_CLASS")
    driver = keys.get("DRIVER") or None
    code = None if class_code is None else class_code.lower().zfill(6)
    return (vendor, device, code, driver, role_of(driver))


def parse_id_pair(text: str | None) -> tuple[str | None, str | None]:
    """`"8086:10C9"` -> `("8086", "10c9")`; a pair of None for anything without a colon."""
    if text is None or ":" not in text:
        return None, None
    vendor, _, device = text.partition(":")
    return vendor.lower().zfill(4), device.lower().zfill(4)


def parse_windows(text: str) -> list[tuple[int, int, str]]:
    """Lines of `start end type` of `reserved_regions`; malformed ones are passed over."""
    windows = []
    for line in text.splitlines():
        words = line.split()
        try:
            windows.append((int(words[0], 16), int(words[1], 16), words[2]))
        except (ValueError, IndexError):
            continue
    return windows
