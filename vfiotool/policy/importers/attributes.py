"""Files that write sysfs attributes at boot: sysfs.conf, tmpfiles.d, udev rules.

Sources: sysfsutils' sysfs.conf, tmpfiles.d(5) (`w`), udev(7).
"""

from __future__ import annotations

import re

from vfiotool.policy.importers.rules import (
    Findings,
    Rule,
    Value,
    address_name,
    check_name,
    driver_name,
    interface_name,
)

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]", re.IGNORECASE | re.ASCII)
_PAIR = re.compile(r'([A-Z_]+(?:\{[^}]*\})?)\s*(==|!=|\+=|-=|:=|=)\s*e?"((?:[^"\\]|\\.)*)"')
# Conditions that always hold where the rule is about one device anyhow.
_FREE = frozenset({"ACTION", "SUBSYSTEM", "SUBSYSTEMS"})
_NOT_SET = "an attribute that a policy does not set"


def _attribute(found: Findings, where: str, path: str, value: str, line: str) -> None:
    """A write of an attribute below a device, as a rule."""
    folder, _, name = path.strip().rpartition("/")
    parts = [part for part in folder.split("/") if part]
    match: dict[str, Value] | None = None
    addresses = [part for part in parts if _ADDRESS.fullmatch(part)]
    if addresses:
        address = address_name(where, addresses[-1])
        match = None if address is None else {"address": address}
    elif "net" in parts[:-1]:
        interface = interface_name(where, parts[parts.index("net") + 1])
        match = None if interface is None else {"net": interface}
    if match is None:
        found.leave(where, line, "not an attribute of a PCI device by its address")
        return
    _set(found, where, match, name, value, line)


def _set(
    found: Findings, where: str, match: dict[str, Value], name: str, value: str, line: str
) -> None:
    value = value.strip()
    if name == "sriov_numvfs" and value.isdecimal() and len(value) < 6:
        found.add(Rule("sriov", {"match": match, "vfs": int(value)}, where))
    elif name == "driver_override" and driver_name(where, value) is not None:
        found.device(where, match, value)
    elif name == "sriov_drivers_autoprobe":
        why = "write autoprobe = true or false into the [[sriov]] rule of that device"
        found.leave(where, line, why)
    else:
        found.leave(where, line, _NOT_SET)


def import_sysfs_conf(text: str, where: str) -> Findings:
    """From /etc/sysfs.conf and /etc/sysfs.d: `devices/…/sriov_numvfs = 7`."""
    found = Findings()
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.partition("#")[0].strip()
        if not stripped:
            continue
        place = f"{where}:{number}"
        path, equals, value = stripped.partition("=")
        if not equals or len(path.split()) != 1:
            found.leave(place, stripped, "a mode or an owner, or not a line of sysfs.conf")
        else:
            _attribute(found, place, path, value, stripped)
    return found


def import_tmpfiles(text: str, where: str) -> Findings:
    """From tmpfiles.d: `w /sys/bus/pci/devices/…/sriov_numvfs - - - - 8`."""
    found = Findings()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split(None, 6)
        if not words or words[0].startswith("#"):
            continue
        place = f"{where}:{number}"
        if words[0][0] != "w" or len(words) < 7:
            found.leave(place, line.strip(), "writes no attribute")
        else:
            _attribute(found, place, words[1], words[6], line.strip())
    return found


def import_udev(text: str, where: str) -> Findings:
    """From udev rules: `KERNEL=="0000:01:00.0", ATTR{sriov_numvfs}="4"`.

    A rule with a condition that a policy cannot have is left out: without it it would take more.
    """
    found = Findings()
    held, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        start = start or number
        held += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if held.strip() and not held.lstrip().startswith("#"):
            _udev_rule(found, f"{where}:{start}", held.strip())
        held, start = "", 0
    if held.strip():
        _udev_rule(found, f"{where}:{start}", held.strip())
    return found


def _udev_rule(found: Findings, where: str, line: str) -> None:
    pairs = [(key, sign, value) for key, sign, value in _PAIR.findall(line)]
    conditions = {key: value for key, sign, value in pairs if sign == "=="}
    writes = [
        (key[5:-1], value)
        for key, sign, value in pairs
        if key.startswith("ATTR{") and sign in ("=", ":=")
    ]
    others = [f"{key}{sign}" for key, sign, _ in pairs if sign == "!="]
    others += [
        key
        for key, sign, _ in pairs
        if sign in ("=", "+=", ":=", "-=") and not key.startswith("ATTR{")
    ]
    if not writes:
        found.leave(where, line, "sets no attribute")
        return
    match, unknown = _udev_match(where, conditions)
    if match is None or unknown or [item for item in others if item.endswith("!=")]:
        why = ", ".join([*unknown, *others]) or "no device by its address, id or interface"
        found.leave(where, line, f"its condition is not one that a rule has: {why}")
        return
    for name, value in writes:
        _set(found, where, dict(match), name.removeprefix("device/"), value, line)
    if others:
        found.leave(where, ", ".join(others), "not an attribute: no part of a policy")


def _udev_match(
    where: str, conditions: dict[str, str]
) -> tuple[dict[str, Value] | None, list[str]]:
    """The rule's match, and the conditions that it cannot have."""
    match: dict[str, Value] = {}
    unknown: list[str] = []
    ids: dict[str, str] = {}
    for key, value in conditions.items():
        bare = key.replace("ATTRS{", "ATTR{").removeprefix("ATTR{device/").removeprefix("ATTR{")
        if key in _FREE:
            continue
        if key in ("KERNEL", "KERNELS") and _ADDRESS.fullmatch(value):
            match["address"] = value.lower()
        elif key in ("KERNEL", "NAME", "ENV{INTERFACE}") and conditions.get("SUBSYSTEM") == "net":
            check_name(where, value)
            interface = interface_name(where, value)
            if interface is None:
                unknown.append(f"{key}=={value}")
            else:
                match["net"] = interface
        elif bare.rstrip("}") in ("vendor", "device") and re.fullmatch(r"0x[0-9a-fA-F]{4}", value):
            ids[bare.rstrip("}")] = value[2:].lower()
        else:
            unknown.append(f"{key}=={value}")
    if len(ids) == 2:
        match["id"] = f"{ids['vendor']}:{ids['device']}"
    elif ids:
        unknown.append("half an id")
    return match or None, unknown


def attribute_kinds(text: str) -> str | None:
    """The kind of a file that writes attributes, by its content."""
    if re.search(r'(?m)^[^#\n]*(ATTR\{[^}]*\}|KERNEL|SUBSYSTEM|ACTION)\s*==\s*"', text):
        return "udev"
    if re.search(r"(?m)^\s*[a-zA-Z][+!=~^$-]*\s+/\S+\s+\S+\s+\S+\s+\S+", text):
        return "tmpfiles"
    if re.search(r"(?m)^\s*(mode\s+|owner\s+)?(devices|bus|class|block|module)/\S+\s*=", text):
        return "sysfs"
    return None
