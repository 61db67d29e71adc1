"""Disks in use: mounts, swap, volumes, pools, exports, and claims that no table explains."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping

from vfiotool.devices.attached import is_part_of
from vfiotool.host.paths import (
    BLOCK_CLAIM,
    BLOCK_TARGETS,
    DEV,
    NO_CONFIGFS,
    PROC_ZFS,
    SYS_BLOCK,
    SYS_CLUSTERS,
    SYS_LIO_CORE,
    SYS_MODULE,
    SYS_NVME_TARGETS,
    SYS_SCSI,
    SYS_USB_GADGETS,
)
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.layers import (
    NUMBER,
    Layer,
    block_name,
    chain_text,
    describe,
    stack_on,
    take_down,
)
from vfiotool.usage.mounts import Use, mounted, read_mounts, shared_folders, swapped, vital_mounts
from vfiotool.usage.sight import Sight

# What tells that nobody has claimed a disk: a drive without a medium cannot be opened by anybody.
_UNCLAIMED = ("free", "unknown ENOMEDIUM")


def storage_usage(host: Sight, address: str, path: str, *, virtio: bool = True) -> Usage:
    """Mounts, swap and members of volumes on the disks of the function at `path`.

    `virtio`: it may have virtio devices, whose mounts name no block device.
    """
    shared = shared_folders(host, address, path) if virtio else []
    shared += _passed_through(host, address, path)
    scsi = _scsi_passed_through(host, address, path)
    shared += scsi.values()
    own = host.attached.blocks(path)
    if not own:
        return Usage(tuple(shared))
    layers = stack_on(host, own)
    mounts = read_mounts(host)
    uses = [
        *mounted(host, address, layers, mounts),
        *swapped(host, address, layers, mounts),
        *(_member(host, address, layer) for layer in layers if len(layer.chain) > 1),
        *_pool_members(host, address, layers),
        *_exports(host, address, layers),
        *_heartbeats(host, address, layers),
    ]
    explained = {root for root, _ in uses}
    explained |= {name for name in own for device in scsi if _lies_below(host, name, device)}
    claimed = _claims(host, address, own, explained)
    found = [*shared, *(blocker for _, blocker in uses), *claimed]
    return Usage(tuple(found))


def _member(host: Sight, address: str, layer: Layer) -> Use:
    upper, lower = layer.chain[-1], layer.chain[-2]
    evidence = f"{SYS_BLOCK}/{lower}/holders/{upper}"
    if not host.exists(evidence):
        loop = f"{SYS_BLOCK}/{upper}/loop/backing_file"
        evidence = loop if host.exists(loop) else f"{SYS_BLOCK}/{upper}"
    detail = f"{chain_text(layer, -1)} is part of {describe(host, upper)}"
    remedy = take_down(host, upper)
    return layer.chain[0], Blocker("storage-member", address, upper, detail, evidence, remedy)


def _pool_members(host: Sight, address: str, layers: tuple[Layer, ...]) -> list[Use]:
    """Members of imported ZFS pools, by udev's probe of the disk and the pools that ZFS runs."""
    found = []
    pools = set(host.listdir(PROC_ZFS))
    for layer in layers if pools else ():
        record = f"/run/udev/data/b{layer.number}"
        keys = dict(
            line[2:].split("=", 1)
            for line in (host.read(record) or "").splitlines()
            if line.startswith("E:") and "=" in line
        )
        pool = keys.get("ID_FS_LABEL")
        if keys.get("ID_FS_TYPE") == "zfs_member" and pool in pools:
            detail = f"{chain_text(layer)} is part of the ZFS pool {pool}"
            evidence = f"{PROC_ZFS}/{pool}, {record}"
            remedy: str | None = f"zpool export {shlex.quote(pool or '')}"
            vital = _vital_pool(host, address, pool or "")
            if vital is not None:
                remedy = None
            member = Blocker("storage-member", address, pool or "", detail, evidence, remedy, vital)
            found.append((layer.chain[0], member))
    return found


def _vital_pool(host: Sight, address: str, pool: str) -> str | None:
    """Why a pool cannot be given up, where the host runs from a dataset of it."""
    for mount in vital_mounts(host):
        if mount.type == "zfs" and mount.source.partition("/")[0] == pool:
            return (
                f"{mount.point} is on the ZFS pool {pool}, partly on {address}: it cannot be "
                "passed through, the host runs from it"
            )
    return None


def _exports(host: Sight, address: str, layers: tuple[Layer, ...]) -> list[Use]:
    """What the kernel's NVMe and SCSI targets export: they may open a disk without claiming it."""
    numbers = {layer.number: layer for layer in layers if layer.number is not None}
    names = {layer.name: layer for layer in layers}
    found = []
    opened = _opened_files(host)
    for system, number, path, layer in (
        *_nvme_targets(host, numbers, names),
        *_scsi_targets(host, numbers, names, opened),
        *_gadgets(opened, numbers),
    ):
        if layer is None:
            continue
        detail = f"{chain_text(layer)} is exported as {number} of {system}"
        evidence, remedy = f"{path}/info", None
        if path.startswith(SYS_NVME_TARGETS):
            evidence, remedy = f"{path}/device_path", f"echo 0 > {shlex.quote(path)}/enable"
        elif path.startswith(SYS_USB_GADGETS):
            evidence, remedy = f"{path}/file", f"echo > {shlex.quote(path)}/file"
        blocker = Blocker("storage-member", address, system, detail, evidence, remedy)
        found.append((layer.chain[0], blocker))
    return found


def _passed_through(host: Sight, address: str, path: str) -> list[Blocker]:
    """A whole controller that the NVMe target exports: none of its disks is opened for that."""
    own = {host.read(f"{path}/nvme/{name}/{NUMBER}"): name for name in host.listdir(f"{path}/nvme")}
    found = []
    for fields in host.observed(BLOCK_TARGETS) if own else ():
        if len(fields) == 4 and fields[1] == "passthru" and fields[3] in own:
            system, controller = fields[0], own[fields[3]]
            base = f"{SYS_NVME_TARGETS}/{system}/passthru"
            detail = f"the controller {controller} is exported as {system}"
            evidence = f"{base}/device_path is {fields[2]}"
            remedy = f"echo 0 > {shlex.quote(base)}/enable"
            found.append(Blocker("storage-member", address, system, detail, evidence, remedy))
    return found


# drivers/target/target_core_pscsi.c, pscsi_show_configfs_dev_params; of an adapter that is passed
# through as a whole the host's number is not told.
_PSCSI = re.compile(r"Channel ID: (\d+) Target ID: (\d+) LUN: (\d+) Host ID: (\d+|PHBA Mode)")


def passed_scsi(host: Sight) -> dict[str, str]:
    """The paths of SCSI devices that the SCSI target hands on as they are -> the export's name.

    A tape drive or a changer has no block device that could be claimed for it.
    """
    return host.once("scsi passed through", _passed_scsi)


def _passed_scsi(host: Sight) -> dict[str, str]:
    found: dict[str, str] = {}
    for adapter in host.listdir(SYS_LIO_CORE):
        for name in host.listdir(f"{SYS_LIO_CORE}/{adapter}") if adapter[:6] == "pscsi_" else ():
            told = _PSCSI.search(host.read(f"{SYS_LIO_CORE}/{adapter}/{name}/info") or "")
            if told is None:
                continue
            wanted = ":".join(told.groups()[:3])
            for device in host.listdir(SYS_SCSI):
                number, _, place = device.partition(":")
                if place == wanted and told[4] in (number, "PHBA Mode"):
                    found[host.realpath(f"{SYS_SCSI}/{device}") or ""] = f"{adapter}/{name}"
    return found


def _scsi_passed_through(host: Sight, address: str, path: str) -> dict[str, Blocker]:
    """The function's SCSI devices that the SCSI target hands on, by their paths."""
    found = {}
    for device, export in passed_scsi(host).items():
        if is_part_of(path, device):
            name = device.rpartition("/")[2]
            detail = f"the SCSI device {name} is exported as {export} (pscsi)"
            evidence = f"{SYS_LIO_CORE}/{export}/info"
            found[device] = Blocker("storage-member", address, export, detail, evidence)
    return found


def _lies_below(host: Sight, name: str, device: str) -> bool:
    return host.attached.block.get(name, "").startswith(f"{device}/")


# The attribute of a heartbeat's region that names its disk.
_ITS_DISK = "dev"


def _heartbeats(host: Sight, address: str, layers: tuple[Layer, ...]) -> list[Use]:
    """Disks that a cluster's heartbeat is written to, without a claim and by no process.

    A host that misses it is fenced by the others, or resets itself. Source:
    fs/ocfs2/cluster/heartbeat.c, o2hb_region_dev_store and o2hb_region_dev_show.
    """
    if host.exists(f"{SYS_MODULE}/ocfs2_nodemanager/initstate") and not host.exists(SYS_CLUSTERS):
        host.miss(SYS_CLUSTERS, f"a cluster of OCFS2 may have a heartbeat, {NO_CONFIGFS}")
    names = {layer.name: layer for layer in layers}
    found = []
    for cluster in host.listdir(SYS_CLUSTERS):
        for region in host.listdir(f"{SYS_CLUSTERS}/{cluster}/heartbeat"):
            evidence = f"{SYS_CLUSTERS}/{cluster}/heartbeat/{region}/{_ITS_DISK}"
            layer = names.get((host.read(evidence) or "").replace("/", "!"))
            if layer is not None:
                detail = f"{chain_text(layer)} has the heartbeat of the cluster {cluster} (OCFS2)"
                evidence = f"{evidence} is {layer.name}"
                found.append(
                    (
                        layer.chain[0],
                        Blocker("storage-member", address, cluster, detail, evidence),
                    )
                )
    return found


_Export = tuple[str, str, str, "Layer | None"]


def _nvme_targets(
    host: Sight, numbers: Mapping[str, Layer], names: Mapping[str, Layer]
) -> list[_Export]:
    if host.host.live or host.exists(BLOCK_TARGETS):
        lines = (fields for fields in host.observed(BLOCK_TARGETS) if len(fields) == 4)
        return [
            (
                system,
                f"namespace {number}",
                f"{SYS_NVME_TARGETS}/{system}/namespaces/{number}",
                numbers.get(where),
            )
            for system, number, _, where in lines
            if number not in ("passthru", "file")
        ]
    found: list[_Export] = []
    for system in host.listdir(SYS_NVME_TARGETS):
        for number in host.listdir(f"{SYS_NVME_TARGETS}/{system}/namespaces"):
            base = f"{SYS_NVME_TARGETS}/{system}/namespaces/{number}"
            name = block_name(host, host.read(f"{base}/device_path") or "")
            if host.read_int(f"{base}/enable"):
                found.append((system, f"namespace {number}", base, names.get(name or "")))
    return found


# drivers/target/target_core_iblock.c, iblock_show_configfs_dev_params; target_core_file.c.
_LIO_NUMBER = re.compile(r"Major: (\d+) Minor: (\d+)")
_LIO_FILE = re.compile(r"File: (\S+)")


def _opened_files(host: Sight) -> dict[str, str]:
    """The folders of exports that opened a block device as a file -> its number."""
    lines = host.observed(BLOCK_TARGETS) if host.host.live or host.exists(BLOCK_TARGETS) else []
    return {fields[0]: fields[3] for fields in lines if len(fields) == 4 and fields[1] == "file"}


def _gadgets(opened: Mapping[str, str], numbers: Mapping[str, Layer]) -> list[_Export]:
    """Disks that a USB gadget of this machine shows to another one."""
    return [
        ("a USB gadget", base.rpartition("/")[2], base, numbers.get(number))
        for base, number in opened.items()
        if base.startswith(SYS_USB_GADGETS)
    ]


def _scsi_targets(
    host: Sight,
    numbers: Mapping[str, Layer],
    names: Mapping[str, Layer],
    opened: Mapping[str, str],
) -> list[_Export]:
    """LIO's back ends, by the number that each prints, or a file back end's path."""
    found: list[_Export] = []
    if host.exists(f"{SYS_MODULE}/target_core_mod/initstate") and not host.exists(SYS_LIO_CORE):
        host.miss(SYS_LIO_CORE, f"the SCSI target is loaded, {NO_CONFIGFS}")
    for adapter in host.listdir(SYS_LIO_CORE):
        for name in host.listdir(f"{SYS_LIO_CORE}/{adapter}"):
            base = f"{SYS_LIO_CORE}/{adapter}/{name}"
            text = host.read(f"{base}/info") if adapter != "alua" else None
            number, file = _LIO_NUMBER.search(text or ""), _LIO_FILE.search(text or "")
            where = f"{number[1]}:{number[2]}" if number else opened.get(base, "")
            layer = numbers.get(where)
            if layer is None and file is not None:
                layer = names.get(block_name(host, file[1]) or "")
            found.append((adapter, name, base, layer))
    return found


def _claims(
    host: Sight, address: str, own: tuple[str, ...], explained: Collection[str]
) -> list[Blocker]:
    """Of the disks whose user no table names, those that the kernel holds all the same.

    A disk is claimed along with any partition of its own, so partitions are asked first.
    """
    paths = host.attached.block
    found = []
    settled = set(explained)
    for name in sorted(own, key=lambda name: -len(paths.get(name, ""))):
        below = paths.get(name, name) + "/"
        if name in settled or any(paths.get(part, "").startswith(below) for part in settled):
            continue
        answer = host.read(f"{BLOCK_CLAIM}/{name}")
        if answer == "claimed":
            settled.add(name)
            detail = f"{name} is claimed exclusively (ZFS, a kernel target, a detached mount, …)"
            evidence = f"opening {DEV}/{name} with O_EXCL gives EBUSY"
            found.append(Blocker("storage-member", address, name, detail, evidence))
        elif answer not in _UNCLAIMED and not (answer is None and not host.host.live):
            host.miss(f"block-claim/{name}", f"whether the kernel has claimed it: {answer}")
    return found
