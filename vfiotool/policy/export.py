"""The present state of a host as a policy: applying it there would change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable

from vfiotool.change.plans.facts import DeviceFacts, Facts
from vfiotool.change.steps.state import PARKED, Binding
from vfiotool.change.steps.vf_network import read_settings
from vfiotool.devices.mdev import Mdev, read_mdevs
from vfiotool.devices.pci import list_addresses
from vfiotool.devices.sriov import NO_ESWITCH
from vfiotool.errors import VfiotoolError
from vfiotool.host.host import Host
from vfiotool.netlink.route import VfSettings

_NO_MAC = "00:00:00:00:00:00"


def export_policy(host: Host) -> str:
    """A policy's text: VFs, devices taken from their drivers, mdevs, vDPA devices."""
    from vfiotool.change.plans.facts import read_facts

    facts = read_facts(host, list_addresses(host), eswitch_wanted=True)
    parts = ["version = 1\n", *_sriov_rules(host, facts), *_device_rules(facts)]
    parts += _mdev_rules(read_mdevs(host))
    parts += _vdpa_rules(host)
    return "\n".join(parts)


def _taken_driver(binding: Binding) -> str | None:
    """The driver that a rule would name; None for a device on its usual driver."""
    if binding.driver is None:
        return "none" if binding.override == PARKED else None
    return binding.driver if binding.driver == binding.override else None


def _sriov_rules(host: Host, facts: Facts) -> Iterable[str]:
    for address in sorted(facts.devices):
        sriov = facts.devices[address].sriov
        if sriov is None or not sriov.num:
            continue
        lines = ["[[sriov]]", f'match = {{ address = "{address}" }}', f"vfs = {sriov.num}"]
        own = _taken_driver(facts.devices[address].binding)
        if own is not None:
            lines.append(f"driver = {_quoted(own)}")
        elif sriov.eswitch not in (None, NO_ESWITCH, "legacy"):
            lines.append(f'eswitch = "{sriov.eswitch}"')
        settings = {found.index: found for found in read_settings(host, address) or ()}
        rules = []
        for index, vf in enumerate(sriov.vfs):
            device = facts.devices.get(vf)
            driver = None if device is None else _taken_driver(device.binding)
            keys = [] if index not in settings else _vf_keys(settings[index])
            if driver is not None:
                keys.append(f"driver = {_quoted(driver)}")
            if keys:
                rules.append(f"    {{ index = {index}, {', '.join(keys)} }},\n")
        if rules:
            lines.append(f"vf = [\n{''.join(rules)}]")
        yield "\n".join(lines) + "\n"


def _vf_keys(found: VfSettings) -> list[str]:
    """The settings of a VF that are not a new VF's own."""
    keys = []
    if found.mac is not None and found.mac != _NO_MAC:
        keys.append(f"mac = {_quoted(found.mac)}")
    if found.spoof_check is False:
        keys.append("spoof_check = false")
    if found.trust:
        keys.append("trust = true")
    for name in ("vlan", "qos", "min_rate_mbps", "max_rate_mbps"):
        value = getattr(found, name)
        if value:
            keys.append(f"{name} = {value}")
    return keys


def _device_rules(facts: Facts) -> Iterable[str]:
    for address in sorted(facts.devices):
        device: DeviceFacts = facts.devices[address]
        driver = _taken_driver(device.binding)
        makes_vfs = device.sriov is not None and device.sriov.num
        if driver is None or device.physfn is not None or makes_vfs:
            continue
        ids = device.identity
        known = f', id = "{ids.vendor}:{ids.device}"' if ids.vendor and ids.device else ""
        yield (
            f'[[device]]\nmatch = {{ address = "{address}"{known} }}\n'
            f"expect = {{ count = 1 }}\ndriver = {_quoted(driver)}\n"
        )


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes are among TOML's. A host's names can hold anything."""
    return json.dumps(text, ensure_ascii=False)


def _mdev_rules(mdevs: Iterable[Mdev]) -> Iterable[str]:
    for mdev in mdevs:
        if mdev.parent is not None and mdev.type is not None:
            lines = [f"parent = {_quoted(mdev.parent)}", f"type = {_quoted(mdev.type)}"]
            yield "\n".join(["[[mdev]]", *lines, f"uuid = {_quoted(mdev.uuid)}"]) + "\n"


def _vdpa_rules(host: Host) -> Iterable[str]:
    from vfiotool.change.plans.vdpa import read_vdpa_facts

    try:
        devices = read_vdpa_facts(host).devices
    except VfiotoolError:
        # A kernel without vDPA has none to export.
        return
    for device in devices:
        if device.parent is None:
            continue
        lines = ["[[vdpa]]", f"name = {_quoted(device.name)}", f"parent = {_quoted(device.parent)}"]
        if device.driver is not None:
            lines.append(f"driver = {_quoted(device.driver)}")
        yield "\n".join(lines) + "\n"
