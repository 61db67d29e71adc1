"""Other tools' settings as a policy: what was found, and what could not be carried over and why.

All importers are pure functions of text. `detect` tells by name and content which one fits;
`import_files` runs it. Hostile names (`../`, control characters, thousands of characters) are
refused with UsageError, whatever the source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vfiotool.errors import UsageError
from vfiotool.policy.importers.attributes import (
    attribute_kinds,
    import_sysfs_conf,
    import_tmpfiles,
    import_udev,
)
from vfiotool.policy.importers.boot_loader import (
    boot_kinds,
    import_grub,
    import_kernelstub,
    import_loader_entry,
    import_nix,
    import_refind,
)
from vfiotool.policy.importers.clusters import import_netplan, import_node_policy
from vfiotool.policy.importers.commands import (
    import_dpdk,
    import_proxmox_mapping,
    import_proxmox_vm,
)
from vfiotool.policy.importers.folders import import_driverctl, import_mdevctl
from vfiotool.policy.importers.kernel import import_command_line, import_modprobe
from vfiotool.policy.importers.libvirt import import_libvirt
from vfiotool.policy.importers.rules import Findings, Leftover, Rule, to_toml

KINDS = {
    "driverctl": "driverctl's folder, /etc/driverctl.d",
    "mdevctl": "mdevctl's folder, /etc/mdevctl.d",
    "cmdline": "a kernel command line",
    "grub": "/etc/default/grub",
    "loader-entry": "/boot/loader/entries/NAME.conf",
    "refind": "refind_linux.conf or refind.conf",
    "kernelstub": "/etc/kernelstub/configuration",
    "nix": "a NixOS module with boot.kernelParams or boot.extraModprobeConfig",
    "modprobe": "modprobe.d's folder or a file of it",
    "libvirt": "XML from virsh dumpxml, nodedev-dumpxml or net-dumpxml",
    "proxmox-mapping": "/etc/pve/mapping/pci.cfg",
    "proxmox-vm": "a machine's file, /etc/pve/qemu-server/VMID.conf",
    "dpdk": "dpdk-devbind.py command lines",
    "netplan": "/etc/netplan/*.yaml",
    "node-policy": "SriovNetworkNodePolicy objects of the SR-IOV network operator",
    "sysfs": "/etc/sysfs.conf",
    "tmpfiles": "tmpfiles.d lines that write attributes",
    "udev": "udev rules",
}
LARGEST_BYTES = 4 << 20
_MODPROBE_LINE = re.compile(r"^\s*(options|softdep|blacklist|install|alias|remove)\s", re.MULTILINE)
_COMMAND_LINE = re.compile(
    r"(\bvfio[-_]pci\.\w+=|\bpci[-_]stub\.ids=|^BOOT_IMAGE=|\broot=|GRUB_CMDLINE|iommu=)",
    re.MULTILINE,
)
_UUID_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


_OF_TEXT: Mapping[str, Callable[[str, str], Findings]] = {
    "cmdline": import_command_line,
    "grub": import_grub,
    "loader-entry": import_loader_entry,
    "refind": import_refind,
    "kernelstub": import_kernelstub,
    "nix": import_nix,
    "libvirt": import_libvirt,
    "proxmox-vm": import_proxmox_vm,
    "dpdk": import_dpdk,
    "netplan": import_netplan,
    "node-policy": import_node_policy,
    "sysfs": import_sysfs_conf,
    "tmpfiles": import_tmpfiles,
    "udev": import_udev,
}


@dataclass(frozen=True)
class Import:
    """The outcome: the policy's text, its rules, and the leftovers in the source's order."""

    kind: str
    policy: str
    rules: tuple[Rule, ...]
    leftovers: tuple[Leftover, ...]


def detect(origin: str, files: Mapping[str, str]) -> str:
    """The kind of source. Raises UsageError if none fits, naming those that there are.

    `files` maps the paths below `origin` to their contents; a single file has its own name.
    """
    names = sorted(files)
    nested = [name for name in names if "/" in name]
    if nested:
        if any(_UUID_NAME.fullmatch(name.rpartition("/")[2]) for name in nested):
            return "mdevctl"
    elif any(re.match(r"[a-z]+-", name) and not name.endswith(".conf") for name in names) and (
        len(names) > 1 or _is_override(names[0], files[names[0]])
    ):
        return "driverctl"
    for name in names:
        kind = _detect_text(name, files[name])
        if kind is not None:
            return kind
    if not names:
        # An empty folder still says whose it is.
        for part, kind in (("driverctl", "driverctl"), ("mdevctl", "mdevctl")):
            if part in origin:
                return kind
    kinds = ", ".join(KINDS)
    raise UsageError(
        f"{origin}: neither its name nor its content tells what wrote it",
        hint=f"say it with --from KIND, one of {kinds}",
    )


def _is_override(name: str, content: str) -> bool:
    return name.startswith("pci-") and len(content.split()) <= 1


def _detect_text(name: str, text: str) -> str | None:
    base = name.rpartition("/")[2]
    if text.lstrip("\ufeff \t\r\n").startswith("<"):
        return "libvirt"
    if re.search(r"^hostpci\d+:", text, re.MULTILINE):
        return "proxmox-vm"
    if base == "pci.cfg" or re.search(r"^\s+map\s+\S*(id|path|node)=", text, re.MULTILINE):
        return "proxmox-mapping"
    if "dpdk-devbind" in text:
        return "dpdk"
    if re.search(r"^\s*kind:\s*SriovNetworkNodePolicy", text, re.MULTILINE):
        return "node-policy"
    if re.search(r"^network:", text, re.MULTILINE):
        return "netplan"
    if _is_definition(text) or _is_dump(text):
        return "mdevctl"
    found = next(boot_kinds(base, text), None) or attribute_kinds(text)
    if found is not None:
        return found
    if _MODPROBE_LINE.search(text):
        return "modprobe"
    if _COMMAND_LINE.search(text):
        return "cmdline"
    return None


def _is_dump(text: str) -> bool:
    return text.lstrip().startswith("[") and '"mdev_type"' in text


def _is_definition(text: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "mdev_type" in value


def import_files(
    origin: str, files: Mapping[str, str], kind: str | None = None, *, node: str | None = None
) -> Import:
    """Run the importer for `kind` (detected if None) over `files`, path below `origin` to text.

    `node` picks one node of a Proxmox cluster. Raises UsageError for an unknown kind, a source
    that none fits, hostile names, and broken XML.
    """
    kind = kind or detect(origin, files)
    if kind not in KINDS:
        raise UsageError(f"no importer named {kind!r}", hint=f"there are {', '.join(KINDS)}")
    found = Findings()
    if kind == "driverctl":
        found = import_driverctl(files)
    elif kind == "mdevctl":
        found = import_mdevctl(files)
    elif kind == "modprobe":
        found = import_modprobe(files)
    else:
        for name, text in sorted(files.items()):
            _merge(found, _import_text(kind, name, text, node))
    return Import(kind, to_toml(found.rules, origin), tuple(found.rules), tuple(found.leftovers))


def _import_text(kind: str, name: str, text: str, node: str | None) -> Findings:
    if kind == "proxmox-mapping":
        return import_proxmox_mapping(text, name, node)
    return _OF_TEXT[kind](text, name)


def _merge(whole: Findings, part: Findings) -> None:
    for rule in part.rules:
        whole.add(rule)
    whole.leftovers += part.leftovers
