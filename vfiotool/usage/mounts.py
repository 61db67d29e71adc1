"""Mounts and swap on the block devices of a function, in all mount namespaces.

Source: Documentation/filesystems/proc.rst (3.5 mountinfo); fs/btrfs/sysfs.c, fs/bcachefs/sysfs.c
for file systems over several devices, whose mounts name one of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vfiotool.host.paths import (
    MOUNTS,
    PROC,
    PROC_MOUNTINFO,
    PROC_SWAPS,
    SYS_FS_BCACHEFS,
    SYS_FS_BTRFS,
)
from vfiotool.usage.blocker import Blocker
from vfiotool.usage.layers import Layer, block_name, chain_text
from vfiotool.usage.sight import Sight

# A use, and the function's own block device that it came through.
Use = tuple[str, Blocker]

# What makes a host unusable at once when it is taken away.
_VITAL = {
    *("/", "/usr", "/etc", "/var", "/nix", "/nix/store"),
    *("/boot", "/boot/efi", "/boot/firmware", "/efi"),
}
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of a mountinfo. `pid` is `self`, or a process of another mount namespace.

    `lower` and `upper` are the first lower folder of an overlay and its upper one, as they were
    named when that was mounted.
    """

    pid: str
    number: str
    point: str
    type: str
    source: str
    lower: str = ""
    upper: str = ""
    id: str = ""
    parent: str = ""


def read_mounts(host: Sight) -> tuple[Mount, ...]:
    """The mounts of all namespaces that could be seen."""
    return host.once(MOUNTS, _read_mounts)


def _read_mounts(host: Sight) -> tuple[Mount, ...]:
    lines = host.observed(MOUNTS)
    if not lines:
        text = host.read(PROC_MOUNTINFO) or ""
        lines = [["self", line] for line in text.splitlines()]
    parsed = (parse_mount(fields[0], "\t".join(fields[1:])) for fields in lines)
    return tuple(mount for mount in parsed if mount is not None)


def parse_mount(pid: str, line: str) -> Mount | None:
    """One line of a mountinfo; None if it is malformed."""
    left, separator, right = line.partition(" - ")
    head, tail = left.split(), right.split()
    if not separator or len(head) < 5 or len(tail) < 2:
        return None
    lower = upper = ""
    if tail[0] == "overlay":
        options = tail[2].split(",") if len(tail) > 2 else []
        named = [text for text in options if text.startswith(("lowerdir=", "lowerdir+="))]
        lower = unescape(named[0].partition("=")[2].partition(":")[0]) if named else ""
        above = [text for text in options if text.startswith("upperdir=")]
        upper = unescape(above[0].partition("=")[2]) if above else ""
    point, source = unescape(head[4]), unescape(tail[1])
    return Mount(pid, head[2], point, tail[0], source, lower, upper, head[0], head[1])


def unescape(text: str) -> str:
    """Octal escapes of /proc's tables (`\\040`) as characters."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8) & 0xFF), text)


def mounted(
    host: Sight, address: str, layers: tuple[Layer, ...], mounts: tuple[Mount, ...]
) -> list[Use]:
    """One use for each layer and mount point, and for members of file systems over several."""
    numbers = {layer.number: layer for layer in layers if layer.number is not None}
    names = {layer.name: layer for layer in layers}
    shared = _multi_device(host, names)
    found: dict[tuple[str, str], Use] = {}
    seen_members: set[str] = set()
    for mount in mounts:
        layer = numbers.get(mount.number) or _layer_below(mount, mounts, numbers)
        if layer is None:
            sources = [block_name(host, part) for part in mount.source.split(":")]
            known = next((source for source in sources if source in names), None)
            through = known or next((source for source in sources if source in shared), None)
            if through is None:
                continue
            layer = names[shared.get(through, through)]
        seen_members.add(layer.name)
        key = (layer.name, mount.point)
        found.setdefault(key, (layer.chain[0], _mount_blocker(address, layer, mount, mounts)))
    for member in sorted(set(shared.values()) - seen_members):
        detail = f"{chain_text(names[member])} is part of a mounted file system of several devices"
        evidence = f"{SYS_FS_BTRFS} or {SYS_FS_BCACHEFS} lists {member}"
        blocker = Blocker("mounted", address, member, detail, evidence)
        found[(member, "")] = (names[member].chain[0], blocker)
    return list(found.values())


def _layer_below(
    mount: Mount, mounts: tuple[Mount, ...], numbers: Mapping[str, Layer]
) -> Layer | None:
    """What an overlay stands on: it keeps a file system that is mounted nowhere any more."""
    same = [other for other in mounts if other.pid == mount.pid]
    for folder in (mount.upper, mount.lower):
        below = _covering(f"{folder}/", same) if folder.startswith("/") else None
        if below is not None and below.number in numbers:
            return numbers[below.number]
    return None


def _mount_blocker(address: str, layer: Layer, mount: Mount, mounts: tuple[Mount, ...]) -> Blocker:
    where = "" if mount.pid == "self" else f" in {_namespace_text(mount.pid)}"
    # What `umount` would take instead: the mount that the path leads to.
    same = [other for other in mounts if other.pid == mount.pid]
    above = _hiding(mount, {other.id: other for other in same})
    if above is not None:
        where += f", where {above.source} ({above.type}) on {above.point} hides it"
    table = mount.pid if mount.pid.startswith("/") else f"{PROC}/{mount.pid}/mountinfo"
    vital = None
    if mount.point in _VITAL:
        vital = f"{mount.point} is on {address}: it cannot be passed through, the host runs from it"
    return Blocker(
        "mounted",
        address,
        mount.point,
        f"{chain_text(layer)} is mounted on {mount.point} ({mount.type}){where}",
        f"{table}: {mount.number} {mount.point} from {mount.source}",
        None if vital or above is not None else _unmount(mount),
        vital,
    )


def _hiding(mount: Mount, known: Mapping[str, Mount]) -> Mount | None:
    """The mount that the mount point's path leads to instead: upon it, or upon a folder above."""
    seen: set[str] = set()
    one: Mount | None = mount
    while one is not None and one.id not in seen:
        seen.add(one.id)
        for other in known.values():
            upon = other.parent == one.id and other.point == one.point
            folder = other.point.rstrip("/") + "/"
            beside = other.parent == one.parent and one.point.startswith(folder)
            if other.id != one.id and (upon or beside):
                return other
        one = known.get(one.parent)
    return None


def vital_mounts(host: Sight) -> tuple[Mount, ...]:
    """The mounts of this namespace that the host runs from, whatever they are made of."""
    return tuple(
        mount for mount in read_mounts(host) if mount.pid == "self" and mount.point in _VITAL
    )


def _unmount(mount: Mount) -> str:
    command = f"umount {shlex.quote(mount.point)}"
    if mount.pid == "self":
        return command
    if mount.pid.isdecimal():
        return f"nsenter --target {mount.pid} --mount {command}"
    path = mount.pid if mount.pid.startswith("/") else f"{PROC}/{mount.pid}/ns/mnt"
    return f"nsenter --mount={shlex.quote(path)} {command}"


def _namespace_text(where: str) -> str:
    if where.startswith("/"):
        return f"the mount namespace {where}"
    return f"the mount namespace of pid {where}"


def _multi_device(host: Sight, names: Iterable[str]) -> dict[str, str]:
    """Of file systems over several devices: each member's name -> a member that is in `names`."""
    ours = set(names)
    found: dict[str, str] = {}
    groups = [host.listdir(f"{SYS_FS_BTRFS}/{uuid}/devices") for uuid in host.listdir(SYS_FS_BTRFS)]
    for uuid in host.listdir(SYS_FS_BCACHEFS):
        base = f"{SYS_FS_BCACHEFS}/{uuid}"
        links = (host.linkname(f"{base}/{name}/block") for name in host.listdir(base))
        groups.append([name for name in links if name])
    for members in groups:
        mine = sorted(ours.intersection(members))
        if mine:
            found |= {member: member if member in ours else mine[0] for member in members}
    return found


def swapped(
    host: Sight, address: str, layers: tuple[Layer, ...], mounts: tuple[Mount, ...]
) -> list[Use]:
    """Swap partitions on a layer, and swap files on a file system there."""
    names = {layer.name: layer for layer in layers}
    numbers = {layer.number: layer for layer in layers if layer.number is not None}
    found = []
    lines = (host.read(PROC_SWAPS) or "").splitlines()
    if not lines and host.host.live:
        host.miss(PROC_SWAPS, "it has no first line, so that it was cut short")
    for line in lines[1:]:
        words = line.split()
        if len(words) < 2:
            continue
        area = unescape(words[0])
        layer = names.get(block_name(host, area) or "")
        if layer is None and words[1] == "file":
            mount = _mount_of(area, mounts)
            layer = None if mount is None else numbers.get(mount.number)
        if layer is not None:
            detail = f"{chain_text(layer)} holds the swap area {area}"
            remedy = f"swapoff {shlex.quote(area)}"
            evidence = f"{PROC_SWAPS}: {area}"
            blocker = Blocker("swap", address, area, detail, evidence, remedy)
            found.append((layer.chain[0], blocker))
    return found


def _mount_of(path: str, mounts: tuple[Mount, ...]) -> Mount | None:
    """The mount of this namespace that a file lies on."""
    return _covering(path, (mount for mount in mounts if mount.pid == "self"))


def _covering(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that a path of their namespace leads into: the longest mount point above it."""
    above = [mount for mount in mounts if path.startswith(mount.point.rstrip("/") + "/")]
    return max(above, key=lambda mount: len(mount.point), default=None)


def shared_folders(host: Sight, address: str, path: str) -> list[Blocker]:
    """Mounts of virtio-9p and virtiofs, whose source is a tag and not a block device.

    Where an overlay stands on a file system that no table shows any more, any that is mounted
    nowhere else may be that: nothing claims it as a disk is claimed. Below a root, one that is
    mounted elsewhere as well may be: taking that mount away would not free it.
    """
    found: list[Blocker] = []
    for name in host.listdir(path):
        base = f"{path}/{name}"
        if not name.startswith("virtio"):
            continue
        tag = (host.read(f"{base}/mount_tag") or "").rstrip("\0")
        driver = host.linkname(f"{base}/driver")
        before = len(found)
        for mount in read_mounts(host) if tag or driver == "virtiofs" else ():
            by_tag = mount.type == "9p" and tag and mount.source == tag
            if by_tag or (mount.type == "virtiofs" and driver == "virtiofs"):
                found.append(
                    _mount_blocker(address, Layer(name, None, (name,)), mount, read_mounts(host))
                )
        over = _over_hidden(host) if tag or driver == "virtiofs" else None
        if over is not None and (len(found) == before or over.point in _VITAL):
            found.append(_below_overlay(address, name, over))
    return found


def _over_hidden(host: Sight) -> Mount | None:
    """An overlay whose lower file system is mounted out of sight, as an initramfs leaves it: the
    path of its lower folder leads into the overlay itself now."""
    mounts = read_mounts(host)
    for mount in mounts:
        # Docker's are relative to a folder of its own, on a disk that is mounted in sight.
        if mount.lower.startswith("/"):
            same = [other for other in mounts if other.pid == mount.pid]
            covering = _covering(f"{mount.lower}/", same)
            if covering is None or covering.number == mount.number:
                return mount
    return None


def _below_overlay(address: str, name: str, over: Mount) -> Blocker:
    detail = f"{name} may be below the overlay on {over.point}, whose lower file system no table "
    detail += "of mounts shows"
    evidence = f"{PROC}/{over.pid}/mountinfo: {over.point} with lowerdir={over.lower}"
    vital = None
    if over.point in _VITAL:
        vital = f"{over.point} may be on {address}: it cannot be passed through while that is so"
    return Blocker("mounted", address, over.point, detail, evidence, None, vital)
