"""Which functions have anything hanging on them that a host can use, in one table.

Most functions of a big host have nothing: no disk, interface, display, watchdog, child or open
file. The table is made once a look at the host, of what the parts of a survey look at one by one
(`storage`, `network`, `display`, `parts`, `survey`), and whoever is not in it need not be asked
about each of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from vfiotool.devices.attached import owners
from vfiotool.devices.pci import IOMMU_CLASS, Address, PciFunction
from vfiotool.host.paths import (
    SYS_DMA,
    SYS_DRM,
    SYS_GRAPHICS,
    SYS_INPUT,
    SYS_MDEV_DEVICES,
    SYS_NETCONSOLE,
    SYS_TTY_CONSOLE,
    SYS_VDPA_DEVICES,
    SYS_WATCHDOG,
)
from vfiotool.usage import connected
from vfiotool.usage.connected import CXL_CLASS
from vfiotool.usage.display import bound_console
from vfiotool.usage.links import read_graph
from vfiotool.usage.nodes import read_open_nodes
from vfiotool.usage.parts import CRYPTO_CLASSES, class_by_owner
from vfiotool.usage.sight import Sight
from vfiotool.usage.storage import passed_scsi

# Disks may lie outside of their controller (native multipath), displays have firmware's buffers in
# their BARs, crypto engines are told by their module, IOMMUs and CXL memory by their class.
_ASKED_ONE_BY_ONE = ("01", "03", CXL_CLASS, IOMMU_CLASS, *CRYPTO_CLASSES)


def may_be_used(sight: Sight, function: PciFunction) -> bool:
    """Whether anything can be found on the function but VFs and its VFIO group's node.

    So it is where that was not seen: a driver that could not be read may be virtio's, whose
    devices hang below the function and in no table.
    """
    if (function.class_code or "").startswith(_ASKED_ONE_BY_ONE):
        return True
    if "driver" in function.unread or (function.driver or "").startswith("virtio"):
        return True
    return function.path in sight.once("occupied", _occupied)


def _occupied(sight: Sight) -> frozenset[str]:
    return frozenset(_places(sight))


def _places(sight: Sight) -> Iterator[str]:
    yield from sight.attached.owners
    yield from read_graph(sight).owners
    yield from read_open_nodes(sight).owned
    for folder in (SYS_INPUT, SYS_WATCHDOG, SYS_DMA):
        yield from class_by_owner(sight, folder)
    for folder in (SYS_MDEV_DEVICES, SYS_VDPA_DEVICES):
        for name in sight.listdir(folder):
            yield from _above(sight.realpath(f"{folder}/{name}") or "")
    shown = [f"{SYS_DRM}/{name}" for name in sight.listdir(SYS_DRM) if "-" in name]
    if bound_console(sight, "frame buffer") is not None:
        shown += [f"{SYS_GRAPHICS}/{name}" for name in sight.listdir(SYS_GRAPHICS)]
    consoles = (sight.read(SYS_TTY_CONSOLE) or "").split()
    shown += [SYS_TTY_CONSOLE.replace("console/active", name) for name in consoles]
    for path in shown:
        yield from owners(sight.realpath(path) or "")
    for path in (*connected.places(sight), *passed_scsi(sight)):
        yield from owners(path)
    # What names an interface is found by it, and only its failure has to be known here.
    for target in sight.listdir(SYS_NETCONSOLE):
        sight.read(f"{SYS_NETCONSOLE}/{target}/dev_name")


def _above(path: str) -> Iterator[str]:
    """The functions above a device, bridges too, which take along what lies behind them."""
    pieces = path.split("/")
    for end, piece in enumerate(pieces, 1):
        if Address.is_address(piece):
            yield "/".join(pieces[:end])
