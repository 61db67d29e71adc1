"""The present state of a host as a policy: applying it there would change nothing.

Everything that stands is written, whoever made it; what a policy cannot say is a comment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from vfiotool.change.plans.facts import DeviceFacts, Facts, read_facts
from vfiotool.change.plans.vdpa_facts import read_vdpa_facts
from vfiotool.change.steps.state import PARKED, Binding
from vfiotool.change.steps.vf_network import read_settings
from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.mdev import Mdev, read_mdevs
from vfiotool.devices.pci import list_addresses
from vfiotool.devices.sriov import NO_ESWITCH
from vfiotool.devices.vdpa import VdpaDevice
from vfiotool.errors import Stuck, Unsupported, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.mdev_attributes import read_standing_attributes

_NO_MAC = "00:00:00:00:00:00"


@dataclass(frozen=True)
class PresentState:
    """What stands on a host. `settings` and `vgpu_types` by address, `attributes` by UUID.

    `unread` are the parts that could not be looked at, as lines for people.
    """

    facts: Facts
    settings: Mapping[str, tuple[VfSettings, ...]] = field(default_factory=dict)
    vgpu_types: Mapping[str, int] = field(default_factory=dict)
    mdevs: tuple[Mdev, ...] = ()
    attributes: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    vdpas: tuple[VdpaDevice, ...] = ()
    unread: tuple[str, ...] = ()


def export_policy(host: Host) -> str:
    """A policy's text: VFs, devices taken from their drivers, mdevs, vDPA devices."""
    return policy_of(read_present_state(host))


def read_present_state(host: Host) -> PresentState:
    """Devices whose lock is held, and other parts that fail, are told in `unread`."""
    unread: list[str] = []
    facts = _read_all(host, unread)
    settings, types = {}, {}
    for address, device in facts.devices.items():
        if device.sriov is not None and device.sriov.num:
            try:
                settings[address] = read_settings(host, address) or ()
            except VfiotoolError as error:
                unread.append(f"the settings of the VFs of {address}: {error.message}")
        number = host.read_int(f"{SYS_PCI_DEVICES}/{address}/nvidia/current_vgpu_type")
        if number:
            types[address] = number
    mdevs = read_mdevs(host)
    try:
        vdpas = read_vdpa_facts(host).devices
    except Unsupported:
        # A kernel without vDPA has none to export.
        vdpas = ()
    except VfiotoolError as error:
        vdpas = ()
        unread.append(f"vDPA devices: {error.message}")
    return PresentState(
        facts=facts,
        settings=settings,
        vgpu_types=types,
        mdevs=mdevs,
        attributes={mdev.uuid: read_standing_attributes(host, mdev.uuid) for mdev in mdevs},
        vdpas=vdpas,
        unread=tuple(unread),
    )


def _read_all(host: Host, unread: list[str]) -> Facts:
    """The facts of all functions but those that do not answer."""
    addresses = list_addresses(host)
    while True:
        try:
            return read_facts(host, addresses, eswitch_wanted=True)
        except Stuck as error:
            if error.device not in addresses:
                raise
            unread.append(error.message)
            addresses.remove(error.device)


def policy_of(state: PresentState) -> str:
    """The text; a comment for each thing that a policy cannot say or that was not seen."""
    parts = ["version = 1\n"]
    parts += [_comment(f"not looked at: {text}") for text in state.unread]
    parts += _sriov_rules(state)
    parts += _device_rules(state.facts)
    parts += _mdev_rules(state)
    parts += _vdpa_rules(state.vdpas)
    return "\n".join(parts)


def _comment(text: str) -> str:
    return "# " + "".join(char if char.isprintable() else "?" for char in text) + "\n"


def _taken_driver(binding: Binding) -> str | None:
    """The driver that a rule would name; None for a device on its usual driver."""
    if binding.driver is None:
        return "none" if binding.override == PARKED else None
    if is_vfio_driver(binding.driver) or binding.driver == binding.override:
        return binding.driver
    return None


def _odd(address: str, binding: Binding) -> Iterator[str]:
    """What a rule for this binding would leave out: an override that has not come to pass."""
    if binding.override is not None and binding.override != (binding.driver or PARKED):
        yield _comment(
            f"{address}: its driver_override is {binding.override} though it is on {binding}: "
            "no rule says that"
        )


def _sriov_rules(state: PresentState) -> Iterator[str]:
    facts = state.facts
    for address in sorted(facts.devices):
        device = facts.devices[address]
        sriov = device.sriov
        switched = sriov is not None and sriov.eswitch not in (None, NO_ESWITCH, "legacy")
        if sriov is None or not (sriov.num or switched):
            continue
        lines = ["[[sriov]]", f'match = {{ address = "{address}" }}', f"vfs = {sriov.num}"]
        own = _taken_driver(device.binding)
        if own is not None and sriov.num:
            lines.append(f"driver = {_quoted(own)}")
        elif switched:
            lines.append(f'eswitch = "{sriov.eswitch}"')
        rules, remarks = _vf_rules(state, address, sriov.vfs)
        if rules:
            lines.append(f"vf = [\n{''.join(rules)}]")
        yield "".join((*remarks, *_odd(address, device.binding))) + "\n".join(lines) + "\n"


def _vf_rules(state: PresentState, pf: str, vfs: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The entries of `vf`, and comments on what they cannot say."""
    settings = {found.index: found for found in state.settings.get(pf, ())}
    rules: list[str] = []
    remarks: list[str] = []
    for index, vf in enumerate(vfs):
        device = state.facts.devices.get(vf)
        keys = [] if index not in settings else _vf_keys(settings[index])
        if vf in state.vgpu_types:
            keys.append(f"vgpu_type = {state.vgpu_types[vf]}")
        if device is not None:
            driver = _taken_driver(device.binding)
            if driver is not None:
                keys.append(f"driver = {_quoted(driver)}")
            remarks += _odd(vf, device.binding)
        link = None if index not in settings else settings[index].link_state
        if link:
            shown = {1: "up", 2: "down"}.get(link, str(link))
            remarks.append(_comment(f"VF {index} of {pf}: link state {shown}: no rule says that"))
        if keys:
            rules.append(f"    {{ index = {index}, {', '.join(keys)} }},\n")
    return rules, remarks


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


def _device_rules(facts: Facts) -> Iterator[str]:
    for address in sorted(facts.devices):
        device: DeviceFacts = facts.devices[address]
        driver = _taken_driver(device.binding)
        makes_vfs = device.sriov is not None and device.sriov.num
        if (device.physfn is not None and device.physfn in facts.devices) or makes_vfs:
            # Said with the function that makes them.
            continue
        yield from _odd(address, device.binding)
        if driver is None:
            continue
        ids = device.identity
        known = f', id = "{ids.vendor}:{ids.device}"' if ids.vendor and ids.device else ""
        yield (
            f'[[device]]\nmatch = {{ address = "{address}"{known} }}\n'
            f"expect = {{ count = 1 }}\ndriver = {_quoted(driver)}\n"
        )


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes are among TOML's. A host's names can hold anything."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _mdev_rules(state: PresentState) -> Iterator[str]:
    for mdev in state.mdevs:
        if mdev.parent is None or mdev.type is None:
            yield _comment(f"mdev {mdev.uuid}: its parent or type cannot be read")
            continue
        lines = [
            "[[mdev]]",
            f"parent = {_quoted(mdev.parent)}",
            f"type = {_quoted(mdev.type)}",
            f"uuid = {_quoted(mdev.uuid)}",
        ]
        pairs = state.attributes.get(mdev.uuid, ())
        if pairs:
            rows = (f"    [{_quoted(name)}, {_quoted(value)}],\n" for name, value in pairs)
            lines.append(f"attrs = [\n{''.join(rows)}]")
        yield "\n".join(lines) + "\n"


def _vdpa_rules(devices: Iterable[VdpaDevice]) -> Iterator[str]:
    for device in devices:
        if device.parent is None:
            yield _comment(f"vDPA device {device.name}: its parent is not known here")
            continue
        lines = ["[[vdpa]]", f"name = {_quoted(device.name)}", f"parent = {_quoted(device.parent)}"]
        if device.driver is not None:
            lines.append(f"driver = {_quoted(device.driver)}")
        lines += _vdpa_keys(device.config or {})
        yield "\n".join(lines) + "\n"


def _vdpa_keys(config: Mapping[str, object]) -> Iterator[str]:
    """What a network device was given; a disk has none of these."""
    mac, mtu, pairs = (config.get(name) for name in ("mac", "mtu", "max_vqp"))
    if isinstance(mac, str) and mac != _NO_MAC:
        yield f"mac = {_quoted(mac)}"
    if isinstance(mtu, int) and mtu >= 68:
        yield f"mtu = {mtu}"
    if isinstance(pairs, int) and pairs >= 1:
        yield f"max_vqp = {pairs}"
