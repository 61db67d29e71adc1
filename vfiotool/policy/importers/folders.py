"""driverctl's and mdevctl's folders.

driverctl keeps `/etc/driverctl.d/<bus>-<device>` with the driver's name in it; mdevctl keeps
`/etc/mdevctl.d/<parent>/<uuid>`, JSON `{"mdev_type", "start", "attrs": [{"k": "v"}, …]}`, an
ordered list that may repeat an attribute (driverctl(8), mdevctl(8)).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from vfiotool.policy.importers.rules import (
    Findings,
    Rule,
    Value,
    address_name,
    attribute_pair,
    check_name,
    driver_name,
    parent_name,
    uuid_name,
)


def import_driverctl(files: Mapping[str, str]) -> Findings:
    """From the folder's files, name to content."""
    found = Findings()
    for name, content in sorted(files.items()):
        check_name(name, name)
        bus, dash, device = name.partition("-")
        if not dash:
            found.leave(name, name, "not a driverctl override (<bus>-<device>)")
        elif bus != "pci":
            found.leave(name, device, f"a device of the {bus} bus; policies know PCI devices")
        else:
            _override(found, name, device, content.strip())
    return found


def _override(found: Findings, where: str, device: str, content: str) -> None:
    address = address_name(where, device)
    driver = driver_name(where, content) if content else None
    if address is None:
        found.leave(where, device, "not a PCI address")
    elif driver is None:
        found.leave(where, content, "not the name of a driver")
    else:
        found.device(where, {"address": address}, driver)


def import_mdevctl(files: Mapping[str, str]) -> Findings:
    """From the folder's files, `<parent>/<uuid>` to JSON."""
    found = Findings()
    for path, content in sorted(files.items()):
        if _is_dump(content):
            _dump(found, path, content)
            continue
        parts = path.split("/")
        for part in parts:
            check_name(path, part)
        if parts[0] in ("scripts.d", "notification.d"):
            found.leave(path, parts[-1], "a script that mdevctl calls; vfiotool calls no scripts")
            continue
        parent = parent_name(path, parts[0])
        uuid = uuid_name(path, parts[-1])
        if len(parts) != 2 or parent is None or uuid is None:
            alone = uuid is None and "mdev_type" in content
            why = (
                "a definition without its UUID, which is the name of its file: import "
                "/etc/mdevctl.d/PARENT/UUID, or what mdevctl list --dumpjson prints"
            )
            what = "not an mdevctl definition (<parent>/<uuid>)"
            found.leave(path, path, why if alone else what)
            continue
        definition = _definition(found, path, content)
        if definition is not None:
            _mdev(found, path, parent, uuid, definition)
    return found


def _is_dump(content: str) -> bool:
    return content.lstrip().startswith("[")


def _dump(found: Findings, where: str, content: str) -> None:
    """From `mdevctl list --dumpjson`: `[{"PARENT": [{"UUID": {definition}}, …]}, …]`."""
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        found.leave(where, where, f"not JSON: {str(error)[:80]}")
        return
    for entry in entries:
        if not isinstance(entry, dict):
            found.leave(where, json.dumps(entry), "not a parent with its devices")
            continue
        for parent_text, devices in entry.items():
            parent = parent_name(where, parent_text)
            if parent is None or not isinstance(devices, list):
                found.leave(where, parent_text, "not a parent with its devices")
                continue
            for device in devices:
                _dumped(found, where, parent, device)


def _dumped(found: Findings, where: str, parent: str, device: object) -> None:
    if not isinstance(device, dict):
        found.leave(where, json.dumps(device), f"not a device of {parent}")
        return
    for text, definition in device.items():
        uuid = uuid_name(where, text)
        place = f"{where}: {parent}"
        if uuid is None:
            found.leave(place, text, "not a UUID")
        elif not isinstance(definition, dict) or not isinstance(definition.get("mdev_type"), str):
            found.leave(place, text, "a definition without mdev_type")
        else:
            if definition.get("start") != "auto":
                why = "started by hand; the policy makes it whenever it is applied"
                found.leave(place, uuid, why)
            _mdev(found, place, parent, uuid, {**definition, "start": "auto"})


def _definition(found: Findings, where: str, content: str) -> dict[str, object] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        found.leave(where, where, f"not JSON: {str(error)[:80]}")
        return None
    if not isinstance(value, dict) or not isinstance(value.get("mdev_type"), str):
        found.leave(where, where, "a definition without mdev_type")
        return None
    return value


def _mdev(
    found: Findings, where: str, parent: str, uuid: str, definition: dict[str, object]
) -> None:
    kind = parent_name(where, str(definition["mdev_type"]))
    if kind is None:
        found.leave(where, str(definition["mdev_type"]), "not the name of an mdev type")
        return
    if definition.get("start") != "auto":
        found.leave(where, uuid, "started by hand; a policy would make it at every boot")
        return
    attributes = _attributes(found, where, definition.get("attrs", []))
    if attributes is None:
        return
    values: dict[str, Value] = {"parent": parent, "type": kind, "uuid": uuid}
    if attributes:
        values["attrs"] = attributes
    for key in sorted(set(definition) - {"mdev_type", "start", "attrs"}):
        found.leave(where, key, "a key that is not mdevctl's")
    found.add(Rule("mdev", values, where))


def _attributes(found: Findings, where: str, attrs: object) -> list[Value] | None:
    """Pairs in their order; None if one cannot be written (an mdev without it is another one)."""
    pairs: list[Value] = []
    for item in attrs if isinstance(attrs, list) else [attrs]:
        if not isinstance(item, dict) or len(item) != 1:
            found.leave(where, json.dumps(item), "attrs is not a list of single pairs")
            return None
        [(name, value)] = item.items()
        pair, why = attribute_pair(where, name, value)
        if pair is None:
            found.leave(where, json.dumps(item), why)
            return None
        pairs.append(pair)
    return pairs
