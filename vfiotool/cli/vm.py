"""`vm check|qemu|libvirt|cloud-hypervisor`: hand devices to a virtual machine."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import Annotated

import typer

from vfiotool.cli import output
from vfiotool.cli.context import DevicesArgument, area, examples, host_of, uuid_of, wants_json
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.devices.selector import resolve
from vfiotool.host.host import Host
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.saved import ETC_FOLDER, DesiredState
from vfiotool.vm import cloud_hypervisor, libvirt, preflight, qemu

_Token = Annotated[
    str | None,
    typer.Option(
        metavar="UUID",
        help="The token of VFs whose PF is on vfio-pci; default: the applied policy's.",
    ),
]


app = area("Hand devices to a virtual machine: checks, and what its configuration needs.")


@app.command("check", epilog=examples("vfiotool vm check 0000:05:01.0"))
def check(context: typer.Context, devices: DevicesArgument, vf_token: _Token = None) -> int:
    """Check whether a virtual machine can open the devices now; exit code 1 if not."""
    host, inventory, chosen = _chosen(context, devices)
    token = _find_token(host, chosen, vf_token)
    found = [
        finding
        for device in chosen
        for finding in preflight.findings(host, inventory, device, token)
    ]
    if wants_json(context):
        payload = {
            "ready": not found,
            "findings": [finding.as_json() for finding in found],
            "notes": [
                note for device in chosen for note in preflight.notes(host, inventory, device)
            ],
        }
        output.emit(payload)
        return 1 if found else 0
    for device in chosen:
        own = [finding for finding in found if finding.device == device.name]
        state = ("not ready", "bold red") if own else ("ready", "bold green")
        output.write((device.name, "bold"), "  ", state)
        for finding in own:
            output.write((f"  {finding.kind}", "red"), f"  {finding.detail}")
            output.write((f"    {finding.next}", "cyan"))
        for note in preflight.notes(host, inventory, device):
            output.write(f"  note: {note}")
    return 1 if found else 0


@app.command(
    "qemu",
    epilog=examples(
        "vfiotool vm qemu 0000:05:01.0",
        "qemu-system-x86_64 -machine q35 $(vfiotool vm qemu 05:01.0)",
    ),
)
def qemu_options(
    context: typer.Context,
    devices: DevicesArgument,
    iommufd: Annotated[
        bool, typer.Option("--iommufd", help="Use iommufd (QEMU 8.2 or newer).")
    ] = False,
    vf_token: _Token = None,
) -> int:
    """Print the options (-device vfio-pci) for a q35 machine of QEMU."""
    host, inventory, chosen = _chosen(context, devices)
    token = _find_token(host, chosen, vf_token)
    _require_ready(host, inventory, chosen, token)
    _print_words(context, qemu.arguments(chosen, iommufd=iommufd, vf_token=token))
    return 0


def _find_token(host: Host, devices: list[preflight.Handed], given: str | None) -> str | None:
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


@app.command(
    "libvirt",
    epilog=examples(
        "vfiotool vm libvirt 0000:05:01.0 > hostdev.xml",
        "virsh attach-device vm1 hostdev.xml --config",
    ),
)
def libvirt_elements(context: typer.Context, devices: DevicesArgument) -> int:
    """Print libvirt's hostdev elements."""
    text = libvirt.hostdevs(_ready(context, devices))
    if wants_json(context):
        output.emit({"xml": text})
    else:
        output.text(text)
    return 0


@app.command("cloud-hypervisor", epilog=examples("vfiotool vm cloud-hypervisor 0000:05:01.0"))
def ch_options(context: typer.Context, devices: DevicesArgument) -> int:
    """Print cloud-hypervisor's options (--device)."""
    _print_words(context, cloud_hypervisor.arguments(_ready(context, devices)))
    return 0


def _chosen(
    context: typer.Context, names: list[str]
) -> tuple[Host, Inventory, list[preflight.Handed]]:
    host = host_of(context)
    inventory = read_inventory(host)
    unique = dict.fromkeys(resolve(host, name) for name in names)
    return host, inventory, [preflight.handed(inventory, name) for name in unique]


def _ready(context: typer.Context, names: list[str]) -> list[preflight.Handed]:
    """The devices; on the running host only if a VM could open each of them now."""
    host, inventory, chosen = _chosen(context, names)
    _require_ready(host, inventory, chosen)
    return chosen


def _require_ready(
    host: Host,
    inventory: Inventory,
    chosen: list[preflight.Handed],
    vf_token: str | None = None,
) -> None:
    """Refuse what a VM could not open now; on a host that is elsewhere it is only said."""
    if host.live:
        preflight.require_ready(host, inventory, chosen, vf_token)
        return
    for device in chosen:
        for finding in preflight.findings(host, inventory, device, vf_token):
            output.warn(f"vfiotool: {device.name} is not ready there: {finding.detail}")


def _print_words(context: typer.Context, words: list[str]) -> None:
    """The words of a command line."""
    if wants_json(context):
        output.emit({"arguments": words})
        return
    if output.is_terminal():
        # An option a line, to be read and to be pasted into a shell.
        lines = " ".join(
            f"\\\n  {shlex.quote(word)}" if word.startswith("-") else shlex.quote(word)
            for word in words
        )
        output.text(lines.removeprefix("\\\n"))
    else:
        # For $(vfiotool vm qemu …): a substitution would pass a backslash on.
        output.text(" ".join(map(shlex.quote, words)))
