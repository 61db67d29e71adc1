"""Proxmox VE's mappings and machine files, and dpdk-devbind's command lines.

Sources: Proxmox VE's `PVE::Mapping::PCI` (/etc/pve/mapping/pci.cfg), qm.conf(5) `hostpci[n]`, and
DPDK's usertools/dpdk-devbind.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from vfiotool.policy.importers.rules import (
    Findings,
    Rule,
    address_name,
    check_name,
    driver_name,
    parent_name,
)

_SLOT = re.compile(r"(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[01][0-9a-f]", re.IGNORECASE | re.ASCII)
_HOSTPCI = re.compile(r"hostpci(\d+):\s*(.*)")
_BIND_TAKES_VALUE = ("-b", "--bind", "--status-dev", "--uid", "-U", "--gid", "-G")


def _pairs(text: str) -> dict[str, str]:
    """`a=b,c` as a property string: a part without `=` is the default key, `host`."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        pairs[key.strip() if equals else "host"] = value.strip() if equals else part.strip()
    return pairs


def _places(found: Findings, where: str, text: str) -> Iterator[str]:
    """The addresses of `01:00.0;01:00.1`; one without function stands for all of its functions."""
    for item in text.split(";"):
        check_name(where, item)
        address = address_name(where, item)
        if address is None and _SLOT.fullmatch(item):
            address = address_name(where, f"{item}.0")
            found.leave(
                where,
                f"the other functions of {item}",
                "Proxmox takes all functions; the rule takes function 0 with its whole group",
            )
        if address is None:
            found.leave(where, item, "not a PCI address")
        else:
            yield address


def _take(found: Findings, where: str, path: str) -> None:
    whole = any(_SLOT.fullmatch(item) for item in path.split(";"))
    for address in _places(found, where, path):
        if whole:
            found.device(where, {"address": address}, "vfio-pci", group="whole")
        else:
            found.device(where, {"address": address}, "vfio-pci")


def import_proxmox_mapping(text: str, where: str, node: str | None = None) -> Findings:
    """From pci.cfg: sections `name` with tab-indented `map id=…,node=…,path=…` lines.

    The file is the whole cluster's: with `node` only that node's lines are taken, without it all
    lines if they name one node, and otherwise none.
    """
    found = Findings()
    entries = list(_mapping_lines(found, text, where))
    nodes = {pairs.get("node", "") for _, _, pairs, _ in entries}
    for place, name, pairs, mediated in entries:
        if node is None and len(nodes) > 1:
            why = f"for node {pairs.get('node')} of several: import again with --node NAME"
            found.leave(place, f"{name}: {pairs.get('path')}", why)
        elif node is not None and pairs.get("node") != node:
            found.leave(place, f"{name}: {pairs.get('path')}", f"for node {pairs.get('node')}")
        elif mediated:
            found.leave(place, f"{name}: {pairs.get('path')}", "a parent of mdevs, made by Proxmox")
        else:
            _take(found, place, pairs.get("path", ""))
    return found


def _mapping_lines(
    found: Findings, text: str, where: str
) -> Iterator[tuple[str, str, dict[str, str], bool]]:
    sections: dict[str, list[tuple[str, dict[str, str]]]] = {}
    mediated: set[str] = set()
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{where}:{number}"
        words = line.split(None, 1)
        if not words or words[0].startswith("#"):
            continue
        if not line[0].isspace():
            name = line.strip().rpartition(" ")[2]
            check_name(place, name)
            sections.setdefault(name, [])
        elif words[0] == "map" and len(words) == 2 and name:
            sections[name].append((place, _pairs(words[1])))
        elif words[0] == "mdev":
            if len(words) < 2 or words[1].strip() != "0":
                mediated.add(name)
        else:
            found.leave(place, line.strip(), "describes the mapping, not the device")
    for title, entries in sections.items():
        yield from ((place, title, pairs, title in mediated) for place, pairs in entries)


def import_proxmox_vm(text: str, where: str) -> Findings:
    """From a machine's file (`<vmid>.conf`); its snapshots' sections are left out."""
    found = Findings()
    number = re.search(r"(\d+)\.conf$", where)
    others = 0
    for line_number, line in enumerate(text.splitlines(), 1):
        place = f"{where}:{line_number}"
        if line.startswith("["):
            found.leave(place, line, "a snapshot of the machine; its devices are the past's")
            break
        match = _HOSTPCI.fullmatch(line.strip())
        if match:
            vmid = int(number.group(1)) if number else None
            _hostpci(found, place, int(match.group(1)), _pairs(match.group(2)), vmid)
        elif line.strip() and not line.startswith("#"):
            others += 1
    found.rest(where, others)
    return found


def _hostpci(
    found: Findings, where: str, index: int, pairs: dict[str, str], vmid: int | None
) -> None:
    path = pairs.get("host", "")
    if "mapping" in pairs:
        why = "a cluster's mapping: import /etc/pve/mapping/pci.cfg"
        found.leave(where, pairs["mapping"], why)
    elif "mdev" in pairs:
        _hostpci_mdev(found, where, index, path, pairs["mdev"], vmid)
    elif pairs.get("driver") == "keep":
        # qm.conf(5): the host's driver stays on it, as a vendor's vGPU wants.
        why = "driver=keep: the host keeps its driver on it, so that no rule is needed"
        found.leave(where, path, why)
    else:
        _take(found, where, path)
    for key in sorted(set(pairs) - {"host", "mapping", "mdev"}):
        if (key, pairs[key]) == ("driver", "keep"):
            continue
        found.leave(where, f"{key}={pairs[key]}", "belongs to the virtual machine, not to the host")


def _hostpci_mdev(
    found: Findings, where: str, index: int, path: str, kind: str, vmid: int | None
) -> None:
    parent = address_name(where, path)
    type_name = parent_name(where, kind)
    if parent is None or type_name is None:
        found.leave(where, f"{path} mdev={kind}", "not a parent's address and an mdev type")
    elif vmid is None:
        found.leave(where, f"{path} mdev={kind}", "its UUID follows from the file's name VMID.conf")
    else:
        # qemu-server derives the UUID from index and machine number (PVE::QemuServer::PCI).
        uuid = f"{index:08d}-0000-0000-0000-{vmid:012d}"
        found.add(Rule("mdev", {"parent": parent, "type": type_name, "uuid": uuid}, where))


def import_dpdk(text: str, where: str) -> Findings:
    """From shell lines that call dpdk-devbind.py; other lines are counted."""
    found = Findings()
    joined = text.replace("\\\n", " ")
    others = 0
    for number, line in enumerate(joined.splitlines(), 1):
        place = f"{where}:{number}"
        if "dpdk-devbind" not in line:
            others += bool(line.strip()) and not line.strip().startswith("#")
            continue
        for command in re.split(r"&&|\|\||;|\|", line):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                if "dpdk-devbind" in command:
                    found.leave(place, command.strip(), "not a shell command that can be read")
                continue
            names = [word.rpartition("/")[2].removesuffix(".py") for word in words]
            if "dpdk-devbind" in names:
                _devbind(found, place, words[names.index("dpdk-devbind") + 1 :])
    found.rest(where, others)
    return found


def _devbind(found: Findings, where: str, words: list[str]) -> None:
    driver: str | None = None
    devices: list[str] = []
    pending = iter(words)
    for word in pending:
        option, equals, value = word.partition("=")
        if option in _BIND_TAKES_VALUE:
            value = value if equals else next(pending, "")
            if option in ("-b", "--bind"):
                driver = value
            else:
                found.leave(where, f"{option} {value}", "an option without a counterpart")
        elif word in ("-u", "--unbind"):
            driver = "none"
        elif word.startswith("-"):
            why = "vfiotool refuses a device in use and names the user; say --allow for that one"
            forced = word == "--force"
            found.leave(where, word, why if forced else "an option without a counterpart")
        else:
            devices.append(word)
    if driver is None:
        if devices:
            found.leave(where, " ".join(devices), "named without a driver to bind them to")
        return
    if "$" in driver or driver_name(where, driver) is None:
        found.leave(where, driver, "not the name of a driver")
        return
    for device in devices:
        if "$" in device:
            found.leave(where, device, "a variable of the script: its value is not known")
        elif (address := address_name(where, device)) is None:
            found.leave(where, device, "an interface's name; policies want its address")
        else:
            found.device(where, {"address": address}, driver)
