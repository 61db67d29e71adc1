"""Which other tools on a host lay claim to devices: an observation (see host_scan.py).

One line a claim, fields separated by a tab: tool, file, device, setting. A device is written
`pci:ADDRESS`, `mdev:UUID`, `id:VENDOR:DEVICE`, `interface:NAME` (a pattern, as netplan has them),
`netdriver:NAME` (all interfaces of a driver), `mac:ADDRESS` or `path:ID_PATH`.
The files are read here and not through `Host.read`, because they can hold passwords (Wi-Fi keys,
VNC passwords) that have no business in a snapshot: only the claims leave this module.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator

from vfiotool.host.netplan import netplan_claims

_MAX_FILE_BYTES = 1 << 20
_SECTION = re.compile(r"\[([^\]]+)\]")
_HOSTDEV = re.compile(r"<hostdev\b(.*?)</hostdev>", re.DOTALL)
_PCI_SOURCE = re.compile(
    r"<source>.*?<address\s+domain=['\"]0x([0-9a-fA-F]+)['\"]\s+bus=['\"]0x([0-9a-fA-F]+)['\"]"
    r"\s+slot=['\"]0x([0-9a-fA-F]+)['\"]\s+function=['\"]0x([0-7])['\"]",
    re.DOTALL,
)
_MDEV_SOURCE = re.compile(r"<source>.*?<address\s+uuid=['\"]([0-9a-fA-F-]{36})['\"]", re.DOTALL)
_IDS = re.compile(r"\bids=([0-9A-Fa-f:,]+)")


def claims(root: str) -> str:
    """All claims below `root` ("" is this machine), in the order of tools and files."""
    found = [
        *_network_manager(root),
        *_systemd_links(root),
        *_netplan(root),
        *_driverctl(root),
        *_mdevctl(root),
        *_modprobe(root),
        *_libvirt(root),
        *_own_policy(root),
    ]
    lines = ("\t".join(_plain(field) for field in claim) for claim in found)
    return "".join(f"{line}\n" for line in lines)


def _files(root: str, folders: tuple[str, ...], ending: str) -> Iterator[tuple[str, str]]:
    """`(path, text)` of the files of a kind; an earlier folder's file hides a later one's."""
    seen = set()
    for folder in folders:
        try:
            names = sorted(os.listdir(root + folder))
        except OSError:
            continue
        for name in names:
            if not name.endswith(ending) or name in seen or name.startswith("."):
                continue
            seen.add(name)
            try:
                with open(f"{root}{folder}/{name}", "rb") as file:
                    text = file.read(_MAX_FILE_BYTES).decode("utf-8", "backslashreplace")
            except OSError:
                continue
            yield f"{folder}/{name}", text


def _sections(text: str) -> dict[str, dict[str, str]]:
    """An ini file's sections; of repeated sections the keys are merged."""
    found: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip()
        match = _SECTION.fullmatch(line)
        if match is not None:
            section = found.setdefault(match[1].lower(), {})
        elif "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            section[key.strip().lower()] = value.strip()
    return found


def _network_manager(root: str) -> Iterator[tuple[str, str, str, str]]:
    folders = ("/etc/NetworkManager/system-connections", "/run/NetworkManager/system-connections")
    for path, text in _files(root, folders, ".nmconnection"):
        sections = _sections(text)
        vfs = sections.get("sriov", {}).get("total-vfs")
        if vfs is None:
            continue
        name = sections.get("connection", {}).get("interface-name")
        mac = sections.get("ethernet", {}).get("mac-address", "").lower()
        device = f"interface:{name}" if name else f"mac:{mac}"
        yield "NetworkManager", path, device, f"sriov total-vfs={vfs}"


def _systemd_links(root: str) -> Iterator[tuple[str, str, str, str]]:
    folders = ("/etc/systemd/network", "/run/systemd/network", "/usr/lib/systemd/network")
    for path, text in _files(root, folders, ".link"):
        sections = _sections(text)
        vfs = sections.get("link", {}).get("sr-iovvirtualfunctions")
        if vfs is None and "sr-iov" not in sections:
            continue
        match = sections.get("match", {})
        for key, word in (("path", "path"), ("macaddress", "mac"), ("originalname", "interface")):
            for value in match.get(key, "").split():
                setting = f"SR-IOVVirtualFunctions={vfs}" if vfs is not None else "[SR-IOV]"
                yield "systemd.link", path, f"{word}:{value}", setting


def _netplan(root: str) -> Iterator[tuple[str, str, str, str]]:
    folders = ("/etc/netplan", "/run/netplan", "/usr/lib/netplan")
    for path, text in _files(root, folders, ".yaml"):
        yield from (("netplan", path, *claim) for claim in netplan_claims(text))


def _driverctl(root: str) -> Iterator[tuple[str, str, str, str]]:
    for path, text in _files(root, ("/etc/driverctl.d",), ""):
        bus, _, device = path.rpartition("/")[2].partition("-")
        if bus in ("pci", "mdev"):
            yield "driverctl", path, f"{bus}:{device.lower()}", f"driver={text.strip()}"


def _mdevctl(root: str) -> Iterator[tuple[str, str, str, str]]:
    base = "/etc/mdevctl.d"
    try:
        parents = sorted(os.listdir(root + base))
    except OSError:
        return
    for parent in parents:
        for path, text in _files(root, (f"{base}/{parent}",), ""):
            try:
                settings = json.loads(text)
                kind, start = settings["mdev_type"], settings.get("start")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            uuid = path.rpartition("/")[2].lower()
            yield "mdevctl", path, f"mdev:{uuid}", f"{kind} of {parent}, start={start}"


def _modprobe(root: str) -> Iterator[tuple[str, str, str, str]]:
    folders = ("/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d")
    for path, text in _files(root, folders, ".conf"):
        for line in text.splitlines():
            words = line.split()
            if len(words) < 3 or words[0] != "options" or words[1].replace("_", "-") != "vfio-pci":
                continue
            match = _IDS.search(line)
            for entry in match[1].lower().split(",") if match is not None else ():
                yield "modprobe.d", path, f"id:{':'.join(entry.split(':')[:2])}", "vfio-pci ids="


def _libvirt(root: str) -> Iterator[tuple[str, str, str, str]]:
    folder = "/etc/libvirt/qemu"
    for path, text in _files(root, (folder,), ".xml"):
        name = path.rpartition("/")[2].removesuffix(".xml")
        start = os.path.lexists(f"{root}{folder}/autostart/{name}.xml")
        for match in _HOSTDEV.finditer(text):
            body = match[1]
            managed = re.search(r"managed=['\"]yes['\"]", body.partition(">")[0]) is not None
            words = [f"domain {name}"]
            words += ["managed"] if managed else []
            words += ["started at boot"] if start else []
            setting = ", ".join(words)
            pci = _PCI_SOURCE.search(body)
            if pci is not None:
                numbers = [int(text, 16) for text in pci.groups()]
                address = "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)
                yield "libvirt", path, f"pci:{address}", setting
            mdev = _MDEV_SOURCE.search(body)
            if mdev is not None:
                yield "libvirt", path, f"mdev:{mdev[1].lower()}", setting


def _own_policy(root: str) -> Iterator[tuple[str, str, str, str]]:
    """What vfiotool itself applies at boot (change/boot_texts.py)."""
    for path, text in _files(root, ("/etc/vfiotool/boot",), ".toml"):
        try:
            rules = tomllib.loads(text).get("device", [])
            matches = [(rule["match"], rule.get("driver")) for rule in rules]
            pairs = [(match, driver) for match, driver in matches if isinstance(match, dict)]
        except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError):
            continue
        for match, driver in pairs:
            for key, word in (("address", "pci"), ("id", "id")):
                value = match.get(key)
                if isinstance(value, str):
                    yield "vfiotool", path, f"{word}:{value.lower()}", f"driver={driver}"


def _plain(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
