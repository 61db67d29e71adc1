"""What completes a word on the command line: devices, groups, drivers, types and so on of the host.

Each function takes what was typed so far and gives what may stand there, with a few words on it.
Readers are imported when a shell asks. Whatever fails gives no candidates: a shell is not told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING

import typer

from vfiotool.cli.globals import Globals, open_host

if TYPE_CHECKING:
    from vfiotool.host.host import Host

Found = list[tuple[str, str]]
Completer = Callable[[typer.Context, str], Found]


def _completer(find: Callable[[Host, str], Iterable[tuple[str, str]]]) -> Completer:
    """A completer of what `find` finds on the host that the command line names."""

    @wraps(find)
    def complete(ctx: typer.Context, incomplete: str) -> Found:
        chosen = ctx.find_object(Globals) or Globals()
        try:
            host = open_host(chosen.root)
            return [item for item in find(host, incomplete) if item[0].startswith(incomplete)]
        except Exception:
            # Completing is a convenience: nothing that goes wrong here may disturb a prompt.
            return []

    complete.__annotations__ = {"ctx": typer.Context, "incomplete": str}
    del complete.__wrapped__
    return complete


_KINDS = ("net", "block", "id", "serial", "slot", "path", "vf", "class", "driver", "group")
_PREFIXES = tuple(f"{kind}:" for kind in _KINDS)


@_completer
def devices(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """Addresses, mdevs and the kinds of selectors with what they could name."""
    from vfiotool.devices.pci import list_addresses, read_functions
    from vfiotool.host.paths import SYS_BLOCK, SYS_NET

    kind, colon, _ = incomplete.partition(":")
    if colon and kind in ("net", "block"):
        folder = SYS_NET if kind == "net" else SYS_BLOCK
        for name in sorted(host.listdir(folder)):
            yield f"{kind}:{name}", "network interface" if kind == "net" else "disk"
        return
    functions = list(read_functions(host, list_addresses(host), links=False))
    if colon and kind in ("id", "driver", "group"):
        first: dict[str, str] = {}
        for function in functions:
            values = {
                "id": f"{function.vendor}:{function.device}",
                "driver": function.driver,
                "group": function.iommu_group,
            }
            if values[kind] is not None:
                first.setdefault(f"{kind}:{values[kind]}", function.address)
        yield from first.items()
        return
    from vfiotool.devices.names import read_names

    names = read_names(host)
    short = bool(incomplete) and len(incomplete.split(":")[0]) == 2
    for function in functions:
        known = names.lookup(function.vendor, function.device, class_code=function.class_code)
        address = function.address.removeprefix("0000:") if short else function.address
        yield address, known.device or known.class_name or ""
    yield from _mdevs(host)
    for prefix in _PREFIXES:
        yield prefix, "selector"


@_completer
def served(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """vDPA devices and sockets, as the commands of `vm` name them."""
    from vfiotool.vm.handed import SOCKETS, VDPA

    kind, colon, path = incomplete.partition(":")
    if colon and kind == VDPA:
        from vfiotool.devices.vdpa import read_devices

        for device in read_devices(host):
            yield f"{VDPA}:{device.name}", device.parent or ""
    elif colon and kind in SOCKETS:
        folder, slash, _ = path.rpartition("/")
        for name in sorted(host.listdir(folder or "/")) if slash else ():
            yield f"{kind}:{folder}/{name}", ""
    else:
        for one in (VDPA, *SOCKETS):
            yield f"{one}:", "selector"


def handed(ctx: typer.Context, incomplete: str) -> Found:
    """All that can be handed to a VM: devices of the host, vDPA devices and sockets."""
    return [*devices(ctx, incomplete), *served(ctx, incomplete)]


def _mdevs(host: Host) -> Iterable[tuple[str, str]]:
    from vfiotool.devices.mdev import read_mdevs

    for mdev in read_mdevs(host):
        yield mdev.uuid, f"{mdev.type} on {mdev.parent}"


@_completer
def mdevs(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """UUIDs of mediated devices."""
    return _mdevs(host)


@_completer
def groups(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """Numbers of IOMMU groups."""
    from vfiotool.devices.iommu import read_groups

    for group in read_groups(host):
        yield str(group.id), ", ".join(member.address for member in group.devices[:3])


@_completer
def drivers(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """PCI drivers that are loaded, and the words that stand for VFIO's and for none."""
    from vfiotool.host.paths import SYS_PCI_DRIVERS

    found = set(host.listdir(SYS_PCI_DRIVERS)) | {"vfio-pci"}
    yield "none", "no driver at all"
    for name in sorted(found):
        yield name, "PCI driver"


@_completer
def physical_functions(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """PCI functions that can have VFs."""
    from vfiotool.devices.pci import list_addresses, read_functions

    for function in read_functions(host, list_addresses(host), links=False):
        if function.sriov is not None:
            yield function.address, f"up to {function.sriov.total_vfs} VFs"


@_completer
def parents(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """What mediated devices can be created on."""
    from vfiotool.devices.mdev import read_mdev_types

    return {kind.parent: "" for kind in read_mdev_types(host)}.items()


@_completer
def types(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """Types of mediated devices."""
    from vfiotool.devices.mdev import read_mdev_types

    return [(kind.type, kind.description or kind.name or "") for kind in read_mdev_types(host)]


@_completer
def vdpas(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """vDPA devices."""
    from vfiotool.devices.vdpa import read_devices

    return [(device.name, device.parent or "") for device in read_devices(host)]


@_completer
def vduses(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """VDUSE devices."""
    from vfiotool.devices.vduse import read_vduse

    return [(device.name, device.state) for device in read_vduse(host)]


@_completer
def vdpa_parents(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """What vDPA devices can be created on."""
    from vfiotool.devices.vdpa import read_parents

    return [(parent.name, ", ".join(parent.classes)) for parent in read_parents(host)]


@_completer
def demos(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """Drivers of vfiotool's that have a demo."""
    from vfiotool.drivers import DEMOS

    return [(name.replace("_", "-"), "") for name in DEMOS]


@_completer
def machines(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """The lab's machines."""
    from vfiotool.lab.machines import MACHINES

    return [(name, machine.summary) for name, machine in MACHINES.items()]


@_completer
def kernels(host: Host, incomplete: str) -> Iterable[tuple[str, str]]:
    """The lab's kernels."""
    from vfiotool.lab.kernels.catalogue import statuses

    return [(kernel.name, kernel.summary) for kernel in statuses()]


def demos_and_devices(ctx: typer.Context, incomplete: str) -> Found:
    """For commands that take a driver's name or leave it out."""
    return [*demos(ctx, incomplete), *devices(ctx, incomplete)]


def words(*choices: str) -> Completer:
    """A completer of fixed words."""

    def complete(ctx: typer.Context, incomplete: str) -> Found:
        return [(word, "") for word in choices if word.startswith(incomplete)]

    return complete


def files(ctx: typer.Context, incomplete: str) -> Found:
    """Files and folders."""
    return _files(incomplete, ())


def policies(ctx: typer.Context, incomplete: str) -> Found:
    """Policies and saved plans: *.toml, *.plan, and folders on the way to them."""
    return _files(incomplete, (".toml", ".plan"))


def _files(incomplete: str, endings: tuple[str, ...]) -> Found:
    import os

    folder, _, start = incomplete.rpartition("/")
    where = folder or ("/" if incomplete.startswith("/") else ".")
    before = f"{folder}/" if "/" in incomplete else ""
    found = []
    try:
        with os.scandir(where) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".") and not start.startswith(".")
                if not entry.name.startswith(start) or hidden:
                    continue
                if entry.is_dir():
                    found.append((f"{before}{entry.name}/", ""))
                elif not endings or entry.name.endswith(endings):
                    found.append((f"{before}{entry.name}", ""))
    except OSError:
        return []
    return sorted(found)
