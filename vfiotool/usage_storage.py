"""Disks: from a function to its block devices, what is stacked on them, mounts and swap.

Source: Documentation/ABI/stable/sysfs-block, Documentation/filesystems/proc.rst (3.5 mountinfo),
drivers/nvme/host/multipath.c for the names of native multipath.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from vfiotool.host import (
    BLOCK_CLAIM,
    DEV,
    MOUNTS,
    PROC,
    PROC_MOUNTINFO,
    PROC_SWAPS,
    SYS_BLOCK,
    SYS_FS_BCACHEFS,
    SYS_FS_BTRFS,
    SYS_NVME_TARGETS,
    Host,
)
from vfiotool.usage_blocker import Blocker, Usage, block_paths, is_part_of, observed_lines

_OCTAL = re.compile(r"\\([0-7]{3})")
_HIDDEN_PATH = re.compile(r"nvme(\d+)c\d+n(\d+)")
_DM_KINDS = {
    "LVM": "LVM logical volume",
    "CRYPT": "dm-crypt volume",
    "mpath": "multipath map",
    "DMRAID": "dmraid set",
    "VDO": "VDO volume",
}
_MAX_LAYERS = 4096
# The attribute that holds `major:minor` (Documentation/ABI/stable/sysfs-block).
_NUMBER = "dev"


@dataclass(frozen=True, slots=True)
class Layer:
    """A block device that stands on a function. `chain`: from the function's disk up to it."""

    name: str
    number: str | None
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of a mountinfo. `pid` is `self`, or a process of another mount namespace."""

    pid: str
    number: str
    point: str
    type: str
    source: str


def own_disks(host: Host, path: str) -> tuple[str, ...]:
    """The names of the function's own block devices, partitions included.

    A namespace under native NVMe multipath is not below its controller: the hidden path device
    `nvme0c1n2` is, and names it.
    """
    paths = block_paths(host)
    own = {name for name, where in paths.items() if is_part_of(path, where)}
    for name in tuple(own):
        match = _HIDDEN_PATH.fullmatch(name)
        head = None if match is None else f"nvme{match[1]}n{match[2]}"
        if head in paths:
            own.discard(name)
            own |= {other for other, where in paths.items() if is_part_of(paths[head], where)}
    return tuple(sorted(own))


def stack_on(host: Host, names: Iterable[str]) -> tuple[Layer, ...]:
    """The devices of `names` and all that stands on them: partitions and holders, recursively."""
    paths = block_paths(host)
    loops = _loops(host, paths)
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in sorted(names)}
    queue = list(found)
    while queue and len(found) < _MAX_LAYERS:
        name = queue.pop(0)
        above = host.listdir(f"{SYS_BLOCK}/{name}/holders") + loops.get(name, [])
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
        Layer(name, host.read(f"{SYS_BLOCK}/{name}/{_NUMBER}"), chain)
        for name, chain in found.items()
    )


def _loops(host: Host, names: Iterable[str]) -> dict[str, list[str]]:
    """Block device -> the loop devices straight over it, which are no holders to the kernel."""
    found: dict[str, list[str]] = {}
    for name in names:
        node = host.read(f"{SYS_BLOCK}/{name}/loop/backing_file") if name[:4] == "loop" else None
        lower = None if node is None else block_name(host, node)
        if lower is not None:
            found.setdefault(lower, []).append(name)
    return found


def storage_usage(host: Host, address: str, path: str) -> Usage:
    """Mounts, swap and members of volumes on the disks of the function at `path`."""
    own = own_disks(host, path)
    found = _shared_folders(host, address, path)
    unseen: list[str] = []
    if own:
        layers = stack_on(host, own)
        mounts, unseen = read_mounts(host)
        found += _mounted(host, address, layers, mounts)
        found += _swapped(host, address, layers, mounts)
        found += [
            _member(host, address, layer)
            for layer in layers
            if layer.name not in own and len(layer.chain) > 1
        ]
        found += _pool_members(host, address, layers)
        found += _exports(host, address, layers)
        if not found:
            claimed, unknown = _claimed(host, address, own)
            found += claimed
            unseen += unknown
    return Usage(tuple(found), tuple(unseen))


def read_mounts(host: Host) -> tuple[tuple[Mount, ...], list[str]]:
    """The mounts of all namespaces that could be seen, and what could not."""
    lines, unseen = observed_lines(host, MOUNTS)
    if not lines:
        text = host.read(PROC_MOUNTINFO) or ""
        lines = [["self", line] for line in text.splitlines()]
    parsed = (parse_mount(fields[0], "\t".join(fields[1:])) for fields in lines)
    return tuple(mount for mount in parsed if mount is not None), unseen


def parse_mount(pid: str, line: str) -> Mount | None:
    """One line of a mountinfo; None if it is malformed."""
    left, separator, right = line.partition(" - ")
    head, tail = left.split(), right.split()
    if not separator or len(head) < 5 or len(tail) < 2:
        return None
    return Mount(pid, head[2], unescape(head[4]), tail[0], unescape(tail[1]))


def unescape(text: str) -> str:
    """Octal escapes of /proc's tables (`\\040`) as characters."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8) & 0xFF), text)


def _mounted(
    host: Host, address: str, layers: tuple[Layer, ...], mounts: tuple[Mount, ...]
) -> list[Blocker]:
    numbers = {layer.number: layer for layer in layers if layer.number is not None}
    names = {layer.name: layer for layer in layers}
    shared = _multi_device(host, names)
    found: dict[tuple[str, str], Blocker] = {}
    seen_members: set[str] = set()
    for mount in mounts:
        layer = numbers.get(mount.number)
        if layer is None:
            sources = [block_name(host, part) for part in mount.source.split(":")]
            known = next((source for source in sources if source in names), None)
            through = known or next((source for source in sources if source in shared), None)
            if through is None:
                continue
            layer = names[shared.get(through, through)]
        seen_members.add(layer.name)
        key = (layer.name, mount.point)
        found.setdefault(key, _mount_blocker(address, layer, mount))
    for member in sorted(set(shared.values()) - seen_members):
        found[(member, "")] = Blocker(
            "mounted",
            address,
            member,
            f"{_chain(names[member])} is part of a mounted file system of several devices",
            f"{SYS_FS_BTRFS} or {SYS_FS_BCACHEFS} lists {member}",
        )
    return list(found.values())


def _mount_blocker(address: str, layer: Layer, mount: Mount) -> Blocker:
    where = "" if mount.pid == "self" else f" in the mount namespace of pid {mount.pid}"
    return Blocker(
        "mounted",
        address,
        mount.point,
        f"{_chain(layer)} is mounted on {mount.point} ({mount.type}){where}",
        f"{PROC}/{mount.pid}/mountinfo: {mount.number} {mount.point} from {mount.source}",
        _unmount(mount),
    )


def _unmount(mount: Mount) -> str:
    command = f"umount {shlex.quote(mount.point)}"
    return command if mount.pid == "self" else f"nsenter --target {mount.pid} --mount {command}"


def _multi_device(host: Host, names: Iterable[str]) -> dict[str, str]:
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


def block_name(host: Host, node: str) -> str | None:
    """The kernel name behind a node's path (`/dev/mapper/vg-root` -> `dm-0`), or None."""
    if not node.startswith(f"{DEV}/"):
        return None
    target = host.readlink(node)
    return (target or node).rpartition("/")[2]


def _swapped(
    host: Host, address: str, layers: tuple[Layer, ...], mounts: tuple[Mount, ...]
) -> list[Blocker]:
    names = {layer.name: layer for layer in layers}
    numbers = {layer.number: layer for layer in layers if layer.number is not None}
    found = []
    for line in (host.read(PROC_SWAPS) or "").splitlines()[1:]:
        words = line.split()
        if len(words) < 2:
            continue
        area = unescape(words[0])
        layer = names.get(block_name(host, area) or "")
        if layer is None and words[1] == "file":
            mount = _mount_of(area, mounts)
            layer = None if mount is None else numbers.get(mount.number)
        if layer is not None:
            detail = f"{_chain(layer)} holds the swap area {area}"
            remedy = f"swapoff {shlex.quote(area)}"
            found.append(Blocker("swap", address, area, detail, f"{PROC_SWAPS}: {area}", remedy))
    return found


def _mount_of(path: str, mounts: tuple[Mount, ...]) -> Mount | None:
    """The mount of this namespace that a file lies on: the longest mount point above it."""
    above = [
        mount
        for mount in mounts
        if mount.pid == "self" and path.startswith(mount.point.rstrip("/") + "/")
    ]
    return max(above, key=lambda mount: len(mount.point), default=None)


def _member(host: Host, address: str, layer: Layer) -> Blocker:
    upper, lower = layer.chain[-1], layer.chain[-2]
    evidence = f"{SYS_BLOCK}/{lower}/holders/{upper}"
    if not host.exists(evidence):
        loop = f"{SYS_BLOCK}/{upper}/loop/backing_file"
        evidence = loop if host.exists(loop) else f"{SYS_BLOCK}/{upper}"
    return Blocker(
        "storage-member",
        address,
        upper,
        f"{_chain(layer, -1)} is part of {describe(host, upper)}",
        evidence,
        _take_down(host, upper),
    )


def _take_down(host: Host, name: str) -> str | None:
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
    if host.isdir(f"{base}/md"):
        return f"mdadm --stop {DEV}/{name}"
    return f"echo 1 > {base}/bcache/stop" if host.isdir(f"{base}/bcache") else None


def describe(host: Host, name: str) -> str:
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
    return f"{name} (bcache)" if host.isdir(f"{base}/bcache") else name


def _pool_members(host: Host, address: str, layers: tuple[Layer, ...]) -> list[Blocker]:
    """Members of imported ZFS pools, by udev's probe of the disk and the pools that ZFS runs."""
    found = []
    pools = set(host.listdir(f"{PROC}/spl/kstat/zfs"))
    for layer in layers if pools else ():
        record = f"/run/udev/data/b{layer.number}"
        keys = dict(
            line[2:].split("=", 1)
            for line in (host.read(record) or "").splitlines()
            if line.startswith("E:") and "=" in line
        )
        pool = keys.get("ID_FS_LABEL")
        if keys.get("ID_FS_TYPE") == "zfs_member" and pool in pools:
            detail = f"{_chain(layer)} is part of the ZFS pool {pool}"
            evidence = f"{PROC}/spl/kstat/zfs/{pool}, {record}"
            remedy = f"zpool export {shlex.quote(pool or '')}"
            member = Blocker("storage-member", address, pool or "", detail, evidence, remedy)
            found.append(member)
    return found


def _exports(host: Host, address: str, layers: tuple[Layer, ...]) -> list[Blocker]:
    """Namespaces of the kernel's NVMe target, which opens a disk without claiming it."""
    names = {layer.name: layer for layer in layers}
    found = []
    for system in host.listdir(SYS_NVME_TARGETS):
        folder = f"{SYS_NVME_TARGETS}/{system}/namespaces"
        for number in host.listdir(folder):
            base = f"{folder}/{number}"
            layer = names.get(block_name(host, host.read(f"{base}/device_path") or "") or "")
            if layer is None or not host.read_int(f"{base}/enable"):
                continue
            detail = f"{_chain(layer)} is exported as namespace {number} of {system}"
            remedy = f"echo 0 > {shlex.quote(base)}/enable"
            evidence = f"{base}/device_path"
            found.append(Blocker("storage-member", address, system, detail, evidence, remedy))
    return found


def _claimed(host: Host, address: str, own: tuple[str, ...]) -> tuple[list[Blocker], list[str]]:
    """Disks that the kernel holds although no table names the user."""
    found, unseen = [], []
    for name in own:
        answer = host.read(f"{BLOCK_CLAIM}/{name}") or ""
        if answer == "claimed":
            detail = f"{name} is claimed exclusively (ZFS, a kernel target, a detached mount, …)"
            evidence = f"opening {DEV}/{name} with O_EXCL gives EBUSY"
            found.append(Blocker("storage-member", address, name, detail, evidence))
        elif answer in ("unknown EACCES", "unknown EPERM"):
            unseen.append(f"whether the kernel has claimed {name}")
    return found, unseen


def _shared_folders(host: Host, address: str, path: str) -> list[Blocker]:
    """Mounts of virtio-9p and virtiofs, whose source is a tag and not a block device."""
    found = []
    for name in host.listdir(path):
        base = f"{path}/{name}"
        if not name.startswith("virtio"):
            continue
        tag = (host.read(f"{base}/mount_tag") or "").rstrip("\0")
        driver = host.linkname(f"{base}/driver")
        for mount in read_mounts(host)[0] if tag or driver == "virtiofs" else ():
            by_tag = mount.type == "9p" and tag and mount.source == tag
            if by_tag or (mount.type == "virtiofs" and driver == "virtiofs"):
                found.append(_mount_blocker(address, Layer(name, None, (name,)), mount))
    return found


def _chain(layer: Layer, end: int | None = None) -> str:
    return " > ".join(layer.chain[:end])
