"""From a function to its block devices, and what is stacked on them.

Source: Documentation/ABI/stable/sysfs-block; drivers/nvme/host/multipath.c for the names of
native multipath; drivers/md/dm-sysfs.c, md-sysfs of Documentation/admin-guide/md.rst.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from vfiotool.host.paths import BLOCK_LOOPS, DEV, SYS_BLOCK
from vfiotool.usage.sight import Sight

_DM_KINDS = {
    "LVM": "LVM logical volume",
    "CRYPT": "dm-crypt volume",
    "mpath": "multipath map",
    "DMRAID": "dmraid set",
    "VDO": "VDO volume",
}
_MAX_LAYERS = 4096
# The attribute that holds `major:minor`.
NUMBER = "dev"


@dataclass(frozen=True, slots=True)
class Layer:
    """A block device that stands on a function. `chain`: from the function's disk up to it."""

    name: str
    number: str | None
    chain: tuple[str, ...]


def stack_on(host: Sight, names: Iterable[str]) -> tuple[Layer, ...]:
    """The devices of `names` and all that stands on them: partitions and holders, recursively."""
    paths = host.attached.block
    loops = _loops(host, paths)
    backed = host.once("disks behind zram", lambda sight: _backed(sight, paths))
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in sorted(names)}
    queue = list(found)
    while queue and len(found) < _MAX_LAYERS:
        name = queue.pop(0)
        above = host.listdir(f"{SYS_BLOCK}/{name}/holders") + loops.get(name, [])
        above += backed.get(name, [])
        if name in paths and len(found[name]) > 1:
            inside = (
                other for other, where in paths.items() if where.startswith(paths[name] + "/")
            )
            above += sorted(inside)
        for upper in above:
            if upper not in found:
                found[upper] = (*found[name], upper)
                queue.append(upper)
    return tuple(
        Layer(name, host.read(f"{SYS_BLOCK}/{name}/{NUMBER}"), chain)
        for name, chain in found.items()
    )


def _loops(host: Sight, names: Iterable[str]) -> dict[str, list[str]]:
    """Block device -> the loop devices straight over it, which are no holders to the kernel.

    By the number that the kernel has for what is below; a tree of files tells a path alone.
    """
    found: dict[str, list[str]] = {}
    if host.host.live or host.exists(BLOCK_LOOPS):
        for fields in host.observed(BLOCK_LOOPS):
            lower = by_number(host).get(fields[-1])
            if lower is not None:
                found.setdefault(lower, []).append(fields[0])
        return found
    for name in names:
        node = host.read(f"{SYS_BLOCK}/{name}/loop/backing_file") if name[:4] == "loop" else None
        lower = None if node is None else block_name(host, node)
        if lower is not None:
            found.setdefault(lower, []).append(name)
    return found


def _backed(host: Sight, names: Iterable[str]) -> dict[str, list[str]]:
    """Block device -> the zram devices that write their pages back to it, no holders either.

    Source: Documentation/admin-guide/blockdev/zram.rst, writeback. It claims what is below, so
    that a path that leads nowhere any more is told by the claim.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        node = host.read(f"{SYS_BLOCK}/{name}/backing_dev") if name[:4] == "zram" else None
        lower = None if node is None else block_name(host, node)
        if lower is not None:
            found.setdefault(lower, []).append(name)
    return found


def by_number(host: Sight) -> dict[str, str]:
    """All block devices by `major:minor`."""
    return host.once("block devices by number", _by_number)


def _by_number(host: Sight) -> dict[str, str]:
    numbers = ((host.read(f"{SYS_BLOCK}/{name}/{NUMBER}"), name) for name in host.attached.block)
    return {number: name for number, name in numbers if number}


def block_name(host: Sight, node: str) -> str | None:
    """The kernel name behind a node's path (`/dev/mapper/vg-root` -> `dm-0`), or None."""
    if not node.startswith(f"{DEV}/"):
        return None
    target = host.readlink(node)
    return (target or node).rpartition("/")[2]


def describe(host: Sight, name: str) -> str:
    """A stacked block device in words: `dm-0 (LVM logical volume vg-root)`, `md0 (raid1)`."""
    base = f"{SYS_BLOCK}/{name}"
    uuid = host.read(f"{base}/dm/uuid")
    label = host.read(f"{base}/dm/name")
    if label is not None:
        kind = _DM_KINDS.get((uuid or "").partition("-")[0], "device-mapper device")
        return f"{name} ({kind} {label})"
    level = host.read(f"{base}/md/level")
    if level is not None:
        return f"{name} (MD {level})"
    if host.exists(f"{base}/loop/backing_file"):
        return f"{name} (loop device)"
    if host.exists(f"{base}/backing_dev"):
        return f"{name} (zram, which writes pages back to it)"
    return f"{name} (bcache)" if host.isdir(f"{base}/bcache") else name


def take_down(host: Sight, name: str) -> str | None:
    """The command that takes a stacked device apart, by the tool that made it."""
    base = f"{SYS_BLOCK}/{name}"
    label = host.read(f"{base}/dm/name")
    if label is not None:
        kind = (host.read(f"{base}/dm/uuid") or "").partition("-")[0]
        command = {"CRYPT": "cryptsetup close", "mpath": "multipath -f"}.get(kind)
        if kind == "LVM":
            # A volume group's name and a volume's are joined by one dash, their own are doubled.
            group, _, volume = label.replace("--", "\0").partition("-")
            target = f"{group}/{volume}".replace("\0", "-")
            return f"lvchange --activate n {shlex.quote(target)}"
        return f"{command or 'dmsetup remove'} {shlex.quote(label)}"
    if host.exists(f"{base}/loop/backing_file"):
        return f"losetup --detach {DEV}/{name}"
    if host.exists(f"{base}/backing_dev"):
        return f"zramctl --reset {DEV}/{name}"
    if host.isdir(f"{base}/md"):
        return f"mdadm --stop {DEV}/{shlex.quote(name)}"
    return f"echo 1 > {base}/bcache/stop" if host.isdir(f"{base}/bcache") else None


def chain_text(layer: Layer, end: int | None = None) -> str:
    """`nvme0n1p2 > md0 > dm-0`, up to but not including the layer number `end`."""
    return " > ".join(layer.chain[:end])
