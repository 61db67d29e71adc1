"""`vm check|qemu|libvirt|cloud-hypervisor`: hand devices to a virtual machine."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from typing import Annotated

from vfiotool.cli import output as render
from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.devices.selector import resolve
from vfiotool.host.host import Host
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.saved import ETC_FOLDER, DesiredState
from vfiotool.vm import cloud_hypervisor, libvirt, preflight, qemu

_Devices = Annotated[list[str], Argument(metavar="DEVICE…", help="PCI functions or mdevs.")]
_Token = Annotated[
    str | None,
    Option(metavar="UUID", help="Of VFs whose PF is on vfio-pci; else the policy's."),
]


def register(app: Commands) -> None:
    """Add this area's commands."""
    area = Commands(help="Hand devices to a virtual machine.")
    area.command("check", help="Say whether a VM can open the devices now.")(check)
    area.command("qemu", help="Print the options for a q35 machine of QEMU.")(qemu_options)
    area.command("libvirt", help="Print libvirt's hostdev elements.")(libvirt_elements)
    area.command("cloud-hypervisor", help="Print cloud-hypervisor's options.")(ch_options)
    app.add_typer(area, name="vm")


def check(context: Context, devices: _Devices, vf_token: _Token = None) -> int:
    host, inventory, chosen = _chosen(context, devices)
    token = _find_token(host, chosen, vf_token)
    found = [
        finding
        for device in chosen
        for finding in preflight.findings(host, inventory, device, token)
    ]
    if render.state(context).json:
        payload = {"ready": not found, "findings": [finding.as_json() for finding in found]}
        render.emit(payload)
        return 1 if found else 0
    for device in chosen:
        own = [finding for finding in found if finding.device == device.name]
        sys.stdout.write(f"{device.name}  {'not ready' if own else 'ready'}\n")
        for finding in own:
            sys.stdout.write(render.escape(f"  {finding.kind}  {finding.detail}\n"))
            sys.stdout.write(render.escape(f"    {finding.next}\n"))
    return 1 if found else 0


def qemu_options(
    context: Context,
    devices: _Devices,
    iommufd: Annotated[bool, Option("--iommufd", help="Use iommufd (QEMU 8.2 or newer).")] = False,
    vf_token: _Token = None,
) -> int:
    host, inventory, chosen = _chosen(context, devices)
    token = _find_token(host, chosen, vf_token)
    if host.live:
        preflight.require_ready(host, inventory, chosen, token)
    _print_words(context, qemu.arguments(chosen, iommufd=iommufd, vf_token=token))
    return 0


def _find_token(host: Host, devices: list[preflight.Handed], given: str | None) -> str | None:
    """The VF token that was given, or that the applied policy names for a device's guard."""
    if given is not None:
        return render.uuid_of("--vf-token", given)
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


def libvirt_elements(context: Context, devices: _Devices) -> int:
    text = libvirt.hostdevs(_ready(context, devices))
    if render.state(context).json:
        render.emit({"xml": text})
    else:
        sys.stdout.write(text)
    return 0


def ch_options(context: Context, devices: _Devices) -> int:
    _print_words(context, cloud_hypervisor.arguments(_ready(context, devices)))
    return 0


def _chosen(context: Context, names: list[str]) -> tuple[Host, Inventory, list[preflight.Handed]]:
    host = render.host(context)
    inventory = read_inventory(host)
    unique = dict.fromkeys(resolve(host, name) for name in names)
    return host, inventory, [preflight.handed(inventory, name) for name in unique]


def _ready(context: Context, names: list[str]) -> list[preflight.Handed]:
    """The devices; on the running host only if a VM could open each of them now."""
    host, inventory, chosen = _chosen(context, names)
    if host.live:
        preflight.require_ready(host, inventory, chosen)
    return chosen


def _print_words(context: Context, words: list[str]) -> None:
    """An option a line, each ready to be pasted into a shell."""
    if render.state(context).json:
        render.emit({"arguments": words})
        return
    lines = " ".join(
        f"\\\n  {shlex.quote(word)}" if word.startswith("-") else shlex.quote(word)
        for word in words
    )
    sys.stdout.write(lines.removeprefix("\\\n") + "\n")
