"""Which other tools on a host lay claim to devices: an observation (see observe.py).

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
import stat
from collections.abc import Iterator

from vfiotool.host.netplan import netplan_claims
from vfiotool.host.processes import plain
from vfiotool.host.toml import load_toml

_MAX_FILE_BYTES = 1 << 20
_SECTION = re.compile(r"\[([^\]]+)\]")
_MAX_HOSTDEVS = 1024
# What a domain never has, and what makes a parser work for ever (billion laughs).
_DOCTYPE = "<!DOCTYPE"
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
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
    lines = ("\t".join(plain(field) for field in claim) for claim in found)
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
            text = _text(f"{root}{folder}/{name}")
            if text is not None:
                yield f"{folder}/{name}", text


def _text(path: str) -> str | None:
    """A plain file's text, cut at 1 MiB; None of a FIFO, which would wait for a writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            return file.read(_MAX_FILE_BYTES).decode("utf-8", "backslashreplace")
    except OSError:
        return None


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
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
        for managed, device in _host_devices(text):
            words = [f"domain {name}"]
            words += ["managed"] if managed else []
            words += ["started at boot"] if start else []
            yield "libvirt", path, device, ", ".join(words)


def _host_devices(text: str) -> Iterator[tuple[bool, str]]:
    """Of a libvirt domain, each host device and whether libvirt itself rebinds it."""
    from xml.etree import ElementTree

    if _DOCTYPE in text:
        return
    try:
        domain = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        return
    for _, element in zip(range(_MAX_HOSTDEVS), domain.iter("hostdev"), strict=False):
        address = element.find("source/address")
        device = None if address is None else _source(address.attrib)
        if device is not None:
            yield element.get("managed") == "yes", device


def _source(address: dict[str, str]) -> str | None:
    uuid = address.get("uuid", "")
    if _UUID.fullmatch(uuid):
        return f"mdev:{uuid.lower()}"
    try:
        numbers = [int(address[key], 16) for key in ("domain", "bus", "slot", "function")]
    except (KeyError, ValueError):
        return None
    return "pci:{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)


def _own_policy(root: str) -> Iterator[tuple[str, str, str, str]]:
    """What vfiotool itself applies at boot (change/boot_texts.py)."""
    for path, text in _files(root, ("/etc/vfiotool/boot",), ".toml"):
        try:
            rules = load_toml(text).get("device", [])
            matches = [(rule["match"], rule.get("driver")) for rule in rules]
            pairs = [(match, driver) for match, driver in matches if isinstance(match, dict)]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for match, driver in pairs:
            for key, word in (("address", "pci"), ("id", "id")):
                value = match.get(key)
                if isinstance(value, str):
                    yield "vfiotool", path, f"{word}:{value.lower()}", f"driver={driver}"
