"""The devices that a `vm` command is for: their options, what they are, whether they are ready."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

import typer

from vfiotool.change.steps.vf_network import read_settings
from vfiotool.cli import candidates, output
from vfiotool.cli.context import SELECTORS, host_of, uuid_of
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.devices.selector import resolve
from vfiotool.devices.vdpa import read_devices
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.saved import ETC_FOLDER, DesiredState
from vfiotool.vm import preflight
from vfiotool.vm.handed import SOCKETS, VDPA, Handed, handed, handed_socket, handed_vdpa

Token = Annotated[
    str | None,
    typer.Option(
        metavar="UUID",
        help="The token of VFs whose PF is on vfio-pci; default: the applied policy's.",
    ),
]

HandedArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="DEVICE…",
        help=f"{SELECTORS} Also vdpa:NAME, vhost-user-blk:SOCKET, vhost-user-net:SOCKET, "
        "vfio-user:SOCKET.",
        autocompletion=candidates.handed,
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="The VM's memory, such as 16G.")
]
Vcpus = Annotated[
    int, typer.Option("--vcpus", min=1, metavar="N", help="With --script: the VM's processors.")
]
Release = Annotated[
    str | None,
    typer.Option(
        "--release",
        metavar="X.Y",
        help="The program's release; refused if it is older than what is printed.",
    ),
]
Script = Annotated[
    bool,
    typer.Option("--script", help="Print a whole start script: bind, start, release at its end."),
]
Iommufd = Annotated[bool, typer.Option("--iommufd", help="Through iommufd, not through the group.")]


def chosen_devices(
    context: typer.Context, names: list[str]
) -> tuple[Host, Inventory, list[Handed]]:
    """The host, its inventory, and the devices of these names. Raises NotFound, UsageError."""
    host = host_of(context)
    inventory = read_inventory(host)
    found: dict[str, Handed] = {}
    for name in names:
        kind, _, rest = name.partition(":")
        if kind in SOCKETS:
            device = handed_socket(kind, rest)
        elif kind == VDPA:
            device = handed_vdpa(host, rest, *_virtio_of(host, rest))
        else:
            device = _with_network(host, handed(inventory, resolve(host, name)))
        if found.setdefault(device.name, device).model != device.model:
            raise UsageError(
                f"{device.name} cannot be both {found[device.name].model} and {device.model}",
                hint="a socket serves one device: name it once",
            )
    return host, inventory, list(found.values())


def _with_network(host: Host, device: Handed) -> Handed:
    """A network VF with what its physical function's interface was told of it."""
    function = device.function
    if function is None or function.physfn is None:
        return device
    if not (function.class_code or "").startswith("02"):
        return device
    try:
        settings = read_settings(host, function.physfn) or ()
    except VfiotoolError:
        settings = ()
    own = [one for one in settings if one.index == function.vf_index]
    index = function.vf_index
    interfaces = host.listdir(f"{SYS_PCI_DEVICES}/{function.physfn}/net")
    return replace(
        device,
        network=own[0] if own else VfSettings(0 if index is None else index),
        parent_interface=interfaces[0] if len(interfaces) == 1 else None,
    )


def _virtio_of(host: Host, name: str) -> tuple[str | None, int | None]:
    """What a vDPA device is and how many virtqueues it has, where netlink can be asked."""
    try:
        known = {device.name: (device.type, device.max_vqs) for device in read_devices(host)}
    except VfiotoolError:
        return None, None
    return known.get(name, (None, None))


def ready_devices(context: typer.Context, names: list[str]) -> list[Handed]:
    """The devices; on the running host only if a VM could open each of them now."""
    host, inventory, chosen = chosen_devices(context, names)
    require_ready(host, inventory, chosen)
    return chosen


def require_ready(
    host: Host,
    inventory: Inventory,
    chosen: list[Handed],
    vf_token: str | None = None,
) -> None:
    """Refuse what a VM could not open now; on a host that is elsewhere it is only said."""
    if host.live:
        preflight.require_ready(host, inventory, chosen, vf_token)
        return
    for finding in preflight.findings_of(host, inventory, chosen, vf_token):
        output.warn(f"vfiotool: {finding.device} is not ready there: {finding.detail}")


def find_token(host: Host, devices: list[Handed], given: str | None) -> str | None:
    """The VF token that was given, or that the applied policy names for a device's guard."""
    if given is not None:
        return uuid_of("--vf-token", given)
    guards = {device.guard for device in devices} - {None}
    if not guards or not host.live or not os.path.isdir(ETC_FOLDER):
        return None
    policy = DesiredState().load()
    rules = () if policy is None else tuple(rule for rule in policy.sriov if rule.vf_token)
    if policy is None or not rules:
        return None
    named = replace(policy, devices=(), sriov=rules, mdevs=(), vdpas=())
    found = zip(rules, read_policy_facts(host, named).sriov, strict=True)
    return next((rule.vf_token for rule, names in found if guards & set(names)), None)
