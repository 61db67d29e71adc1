"""VF settings in YAML: netplan, and the SR-IOV network operator's SriovNetworkNodePolicy.

Sources: netplan's YAML configuration reference (SR-IOV), and the operator's API,
sriovnetwork.openshift.io/v1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vfiotool.policy.importers.rules import (
    Findings,
    Rule,
    Value,
    address_name,
    check_name,
    interface_name,
)
from vfiotool.policy.importers.yaml_subset import Node, parse_yaml

_GLOB = re.compile(r"[*?\[]")
_HANDLED = frozenset(
    {"virtual-function-count", "embedded-switch-mode", "link", "match", "set-name"}
)
_MODES = ("legacy", "switchdev")


def import_netplan(text: str, where: str) -> Findings:
    """From /etc/netplan/*.yaml: how many VFs each interface has, and its eswitch mode.

    Without a count netplan makes as many VFs as definitions name the interface as their `link`.
    """
    found = Findings()
    for document in parse_yaml(text, where):
        network = document.get("network") if isinstance(document, dict) else None
        if not isinstance(network, dict):
            found.leave(where, "a document", "not a network of netplan")
            continue
        for kind, definitions in network.items():
            if kind == "ethernets" and isinstance(definitions, dict):
                _ethernets(found, definitions, where)
            elif kind not in ("version", "renderer"):
                found.leave(where, kind, "not interfaces with VFs")
    return found


def _ethernets(found: Findings, definitions: Mapping[str, Node], where: str) -> None:
    children: dict[str, int] = {}
    for body in definitions.values():
        link = body.get("link") if isinstance(body, dict) else None
        if isinstance(link, str):
            children[link] = children.get(link, 0) + 1
    for name, body in definitions.items():
        keys = body if isinstance(body, dict) else {}
        place = f"{where}: {name}"
        if isinstance(keys.get("link"), str):
            what = f"link: {keys['link']}"
            found.leave(place, what, "a VF's own network settings; it counts as a VF of its link")
            continue
        count = _count(keys.get("virtual-function-count")) or children.get(name)
        mode = keys.get("embedded-switch-mode")
        if count is None and mode is None:
            found.leave(place, name, "an interface without VFs")
            continue
        rest = ", ".join(key for key in keys if key not in _HANDLED)
        if rest:
            found.leave(place, rest, "not a setting of VFs that a policy has")
        _interface(found, name, keys, place, count, mode)


def _interface(
    found: Findings,
    name: str,
    keys: Mapping[str, Node],
    place: str,
    count: int | None,
    mode: Node | None,
) -> None:
    settings = f"vfs = {count}" + (f", eswitch = {mode}" if mode else "")
    known, why = _named(name, keys)
    if known is None:
        found.leave(place, settings, why)
        return
    interface = interface_name(place, known)
    if interface is None:
        found.leave(place, known, "not the name of an interface")
        return
    if count is None:
        why = "no number of VFs stands with it: give vfs in [[sriov]]"
        found.leave(place, f"eswitch = {mode} of {known}", why)
        return
    values: dict[str, Value] = {"match": {"net": interface}, "vfs": count}
    if mode in _MODES:
        values["eswitch"] = str(mode)
    elif mode is not None:
        found.leave(place, f"embedded-switch-mode: {mode}", "not a mode of an eswitch")
    found.add(Rule("sriov", values, place))


def _named(name: str, keys: Mapping[str, Node]) -> tuple[str | None, str]:
    """The interface's name, or None and why it has none: with `match` the key is just a label."""
    match = keys.get("match")
    if isinstance(match, dict) and match:
        set_name = keys.get("set-name")
        if isinstance(set_name, str):
            return set_name, ""
        given = match.get("name")
        if isinstance(given, str) and not _GLOB.search(given) and set(match) == {"name"}:
            return given, ""
        shown = ", ".join(f"{key}: {value}" for key, value in match.items())
        return None, f"it matches by {shown}: write [[sriov]] with the address of the card meant"
    return name, ""


def _count(node: Node | None) -> int | None:
    return int(node) if isinstance(node, str) and node.isdecimal() and len(node) < 6 else None


def import_node_policy(text: str, where: str) -> Findings:
    """From SriovNetworkNodePolicy objects: VFs of the cards that their nicSelector names."""
    found = Findings()
    for document in parse_yaml(text, where):
        listed = document.get("items") if isinstance(document, dict) else None
        for item in listed if isinstance(listed, list) else [document]:
            if isinstance(item, dict) and item.get("kind") == "SriovNetworkNodePolicy":
                _node_policy(found, item, where)
            else:
                kind = item.get("kind") if isinstance(item, dict) else "a document"
                found.leave(where, str(kind), "not a SriovNetworkNodePolicy")
    return found


def _node_policy(found: Findings, item: Mapping[str, Node], where: str) -> None:
    metadata, spec = item.get("metadata"), item.get("spec")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    place = f"{where}: {name}" if isinstance(name, str) else where
    if not isinstance(spec, dict):
        found.leave(place, "spec", "there is none")
        return
    count = _count(spec.get("numVfs"))
    if count is None:
        found.leave(place, f"numVfs: {spec.get('numVfs')}", "not a number of VFs")
        return
    values: dict[str, Value] = {"vfs": count}
    mode = spec.get("eSwitchMode")
    if mode in _MODES:
        values["eswitch"] = str(mode)
    elif mode is not None:
        found.leave(place, f"eSwitchMode: {mode}", "not a mode of an eswitch")
    if spec.get("deviceType") == "vfio-pci" and count <= 512:
        values["vf"] = [{"index": index, "driver": "vfio-pci"} for index in range(count)]
    handled = {"numVfs", "eSwitchMode", "deviceType", "nicSelector"}
    for key in spec:
        if key not in handled:
            found.leave(place, f"{key}: {spec[key]}", "the operator's own, or set inside the guest")
    matches = _nics(found, spec.get("nicSelector"), place)
    if not matches:
        found.leave(place, f"vfs = {count}", "its nicSelector names no card that a rule could")
    for match in matches:
        found.add(Rule("sriov", {"match": match, **values}, place))


def _nics(found: Findings, selector: Node | None, place: str) -> list[dict[str, Value]]:
    keys = selector if isinstance(selector, dict) else {}
    vendor, device = keys.get("vendor"), keys.get("deviceID")
    pair: dict[str, Value] = {}
    if isinstance(vendor, str) and isinstance(device, str):
        text = f"{vendor}:{device}".lower()
        if re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{4}", text):
            pair = {"id": text}
        else:
            found.leave(place, text, "not vendor:device in hexadecimal")
    elif vendor or device:
        found.leave(place, f"vendor {vendor}, deviceID {device}", "half an id is not a match")
    matches: list[dict[str, Value]] = []
    for text in _texts(keys.get("rootDevices")):
        address = address_name(place, text)
        if address is None:
            found.leave(place, text, "not a PCI address")
        else:
            matches.append({"address": address, **pair})
    for text in _texts(keys.get("pfNames")):
        name, part, _ = text.partition("#")
        if part:
            found.leave(place, text, "a part of the VFs: write them into the vf list of [[sriov]]")
        interface = interface_name(place, name)
        if interface is None:
            found.leave(place, text, "not the name of an interface")
        elif not keys.get("rootDevices"):
            matches.append({"net": interface, **pair})
    for key in sorted(set(keys) - {"vendor", "deviceID", "rootDevices", "pfNames"}):
        check_name(place, key)
        found.leave(place, f"{key}: {keys[key]}", "not a way in which a rule matches")
    return matches or ([pair] if pair else [])


def _texts(node: Node | None) -> list[str]:
    return [item for item in node if isinstance(item, str)] if isinstance(node, list) else []
