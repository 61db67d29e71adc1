"""Capture a host in one file, which `load.py` opens anywhere as a root.

`capture` follows the rules below, which name all that a reading command may want, and then runs
the commands themselves on a recording host (`snapshot_record.py`): so every one of them gives the
same from the snapshot as from the host.
"""

from __future__ import annotations

import gzip
import lzma
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase

from vfiotool import __version__
from vfiotool.devices.firmware import IOMMU_TABLES
from vfiotool.errors import UsageError
from vfiotool.host import paths
from vfiotool.host.host import Host
from vfiotool.host.tree import Tree
from vfiotool.snapshot.record import RecordingHost
from vfiotool.snapshot.reduce import reduce_tables
from vfiotool.snapshot.text import Snapshot, format_snapshot

Probe = Callable[[Host], object]

_FUNCTION = (
    "{uevent,vendor,device,subsystem_vendor,subsystem_device,class,revision,config,resource,irq,"
    "numa_node,local_cpulist,boot_vga,driver_override,enable,power_state,d3cold_allowed,"
    "reset_method,current_link_speed,current_link_width,max_link_speed,max_link_width,sriov_*,"
    "label,acpi_index,index,ari_enabled,dma_mask_bits,consistent_dma_mask_bits,vpd,modalias,"
    "current_vgpu_type,creatable_vgpu_types,driver,iommu,iommu_group,physfn,virtfn*,subsystem,"
    "vfio-dev,mdev_supported_types,rom,msi_bus}"
)
_SYS = "/sys"
# Patterns: `*` and `?` match within a component, `{a,b}` lists names. What is a link is recorded
# as a link, a directory as a directory, and a file with its content.
RULES: tuple[str, ...] = (
    f"{paths.SYS_PCI_DEVICES}/*/{_FUNCTION}",
    f"{paths.SYS_PCI_DEVICES}/*/power/{{control,runtime_status}}",
    f"{paths.SYS_PCI_DEVICES}/*/link/*",
    f"{paths.SYS_PCI_DEVICES}/*/vfio-dev/*/dev",
    f"{paths.SYS_PCI_DEVICES}/*/nvidia/{{current_vgpu_type,creatable_vgpu_types}}",
    f"{_SYS}/bus/pci/{{drivers_autoprobe}}",
    f"{paths.SYS_PCI_DRIVERS}/*/{{module}}",
    f"{paths.SYS_PCI_SLOTS}/*/{{address,adapter,attention,power,cur_bus_speed,max_bus_speed}}",
    f"{paths.SYS_IOMMU_GROUPS}/*/{{type,reserved_regions,name}}",
    f"{paths.SYS_IOMMU_GROUPS}/*/devices/*",
    f"{paths.SYS_IOMMU}/*",
    f"{paths.SYS_IOMMU}/*/*/{{version,cap,ecap,address,domains_supported,domains_used,features}}",
    f"{paths.SYS_IOMMU}/*/devices/*",
    f"{paths.SYS_MDEV_PARENTS}/*",
    f"{paths.SYS_MDEV_PARENTS}/*/mdev_supported_types/*/"
    "{available_instances,device_api,name,description}",
    f"{paths.SYS_MDEV_DEVICES}/*",
    f"{paths.SYS_MDEV_DEVICES}/*/{{driver,iommu_group,mdev_type,uevent,subsystem}}",
    f"{paths.SYS_MDEV_DRIVERS}/*",
    f"{paths.SYS_VDPA_DEVICES}/*",
    f"{paths.SYS_VDPA_DEVICES}/*/{{driver,driver_override,uevent,subsystem}}",
    f"{paths.SYS_VDPA_DRIVERS}/*",
    f"{paths.SYS_BLOCK}/*",
    f"{paths.SYS_BLOCK}/*/{{dev,size,ro,removable,partition,uevent,device,subsystem,hidden,"
    "serial,wwid,uuid,nguid,eui}",
    f"{paths.SYS_BLOCK}/*/{{holders,slaves,bcache}}/*",
    f"{paths.SYS_BLOCK}/*/dm/{{name,uuid}}",
    f"{paths.SYS_BLOCK}/*/md/{{level,array_state,raid_disks}}",
    f"{paths.SYS_BLOCK}/*/loop/backing_file",
    f"{_SYS}/class/nvme/*",
    f"{_SYS}/class/nvme/*/{{dev,serial,model,firmware_rev,subsysnqn,transport,state,address,cntlid}}",
    f"{paths.SYS_NVME_SUBSYSTEM}/*",
    f"{paths.SYS_NVME_SUBSYSTEM}/*/{{nvme*,subsysnqn,model,serial,firmware_rev}}",
    f"{paths.SYS_NET}/*",
    f"{paths.SYS_NET}/*/{{address,operstate,carrier,flags,ifindex,iflink,type,mtu,master,device,"
    "uevent,subsystem,dev_id,dev_port,phys_port_name,upper_*,lower_*,bridge,bonding,brif,brport}",
    f"{paths.SYS_NET}/*/bonding/{{mode,slaves,active_slave}}",
    f"{paths.SYS_NET}/*/brif/*",
    f"{paths.SYS_DRM}/*",
    f"{paths.SYS_DRM}/*/{{dev,device,status,enabled,dpms,modes,subsystem,uevent}}",
    f"{paths.SYS_GRAPHICS}/*",
    f"{paths.SYS_GRAPHICS}/*/{{name,dev,device,state,subsystem}}",
    f"{paths.SYS_VTCONSOLE}/*",
    f"{paths.SYS_VTCONSOLE}/*/{{name,bind}}",
    f"{paths.SYS_VFIO_DEV}/*",
    f"{paths.SYS_MODULE}/{{vfio*,iommufd,kvm*,mdev,vdpa,vduse,irqbypass,pci_stub}}",
    f"{paths.SYS_MODULE}/{{vfio*,kvm*}}/parameters/*",
    f"{paths.SYS_NODES}/node*/hugepages/*/{{nr_hugepages,free_hugepages}}",
    f"{paths.SYS_NODES}/node*/distance",
    f"{_SYS}/kernel/mm/hugepages/*/{{nr_hugepages,free_hugepages}}",
    f"{paths.SYS_FIRMWARE_ACPI_TABLES}/{{{','.join(IOMMU_TABLES)}}}",
    paths.SYS_LOCKDOWN,
    f"{paths.PROC}/{{modules,swaps,mdstat}}",
    paths.PROC_CMDLINE,
    paths.PROC_MOUNTINFO,
    paths.PROC_BOOT_ID,
    paths.PROC_OSRELEASE,
    f"{paths.PROC}/sys/kernel/hostname",
    paths.PROC_ROUTE,
    paths.PROC_ROUTE6,
    f"{paths.DEV}/{{iommu,kvm}}",
    f"{paths.DEV_VFIO}/*",
    f"{paths.DEV_VFIO}/devices/*",
    "/etc/os-release",
    "/etc/{modprobe.d,modules-load.d,driverctl.d}/*",
    "/etc/mdevctl.d/*/*",
)
# Reading these can wait for a lock that a user of the device holds.
_GUARDED = ("sriov_numvfs", "driver_override", "uevent")
# The content is not wanted: presence says it all, or it belongs to the firmware's maker.
_PRESENCE = (paths.SYS_FIRMWARE_ACPI_TABLES, paths.DEV)
_PRESENCE_NAMES = ("rom",)


def capture(
    source: Host,
    probes: Iterable[Probe] = (),
    *,
    header: Mapping[str, str] | None = None,
) -> Snapshot:
    """Read a host into a snapshot.

    `probes` are run on the recording host in turn: what they read is captured too. What a probe
    raises is not caught, except OSError. The header gets `tool` and `kernel` besides `header`.
    """
    recorder = RecordingHost(source)
    tree = recorder.recording
    wanted = [path for rule in RULES for path in expand(source.tree, rule)]
    recorder.read_guarded(path for path in wanted if path.endswith(_GUARDED))
    for path in wanted:
        _take(recorder, path)
    for probe in probes:
        with suppress(OSError):
            probe(recorder)
    files = dict(tree.files)
    reduce_tables(files, live=source.live)
    release = source.read(paths.PROC_OSRELEASE)
    own = {"tool": f"vfiotool {__version__}", **({"kernel": release} if release else {})}
    links = {path: target for path, target in tree.links.items() if path not in files}
    return Snapshot(
        header={**own, **(header or {})},
        files=files,
        links=links,
        directories=frozenset(tree.directories - files.keys() - links.keys()),
    )


def expand(tree: Tree, pattern: str) -> Iterator[str]:
    """The paths that a rule's pattern names on a tree, in order of names."""
    found = [""]
    for part in pattern.split("/")[1:]:
        if not any(char in part for char in "*?{"):
            found = [f"{path}/{part}" for path in found]
            continue
        grown = []
        for path in found:
            try:
                names = sorted(tree.listdir(path))
            except OSError:
                continue
            literal, patterns = _choices(part)
            grown += [
                f"{path}/{name}"
                for name in names
                if name in literal or any(fnmatchcase(name, pattern) for pattern in patterns)
            ]
        found = grown
    yield from found


def _choices(part: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """A pattern's choices: plain names, and those that want matching."""
    before, brace, rest = part.partition("{")
    middle, _, after = rest.partition("}")
    choices = [before + choice + after for choice in middle.split(",")] if brace else [part]
    wild = tuple(choice for choice in choices if "*" in choice or "?" in choice)
    return frozenset(choices) - set(wild), wild


def _take(recorder: RecordingHost, path: str) -> None:
    tree = recorder.recording
    try:
        tree.inner.readlink(path)
    except OSError:
        pass
    else:
        with suppress(OSError):
            tree.readlink(path)
        return
    name = path.rpartition("/")[2]
    if tree.inner.isdir(path) or path.startswith(_PRESENCE) or name in _PRESENCE_NAMES:
        tree.exists(path)
    elif name not in _GUARDED:
        recorder.read(path)


def save(snapshot: Snapshot, path: str) -> None:
    """Write a snapshot: plain text if the name ends in .txt, xz for .xz, gzip for any other.

    The file appears whole or not at all, and readable by its owner alone. Raises UsageError for a
    folder that cannot be written.
    """
    data = format_snapshot(snapshot).encode()
    if path.endswith(".xz"):
        data = lzma.compress(data)
    elif not path.endswith(".txt"):
        # No time stamp: the same host gives the same file.
        data = gzip.compress(data, mtime=0)
    folder = os.path.dirname(os.path.abspath(path))
    try:
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".snapshot-")
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
