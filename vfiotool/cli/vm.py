"""`vm check|qemu|libvirt|cloud-hypervisor`: hand devices to a virtual machine."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import SELECTORS, area, examples, host_of, uuid_of, wants_json
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.devices.selector import resolve
from vfiotool.errors import UsageError
from vfiotool.host.host import Host
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.saved import ETC_FOLDER, DesiredState
from vfiotool.vm import cloud_hypervisor, libvirt, preflight, qemu
from vfiotool.vm.finding import (
    BLOCKER,
    HYPERVISORS,
    WARNING,
    PreflightFinding,
    WantedGuest,
    parse_memory,
)
from vfiotool.vm.handed import SOCKETS, VDPA, Handed, handed, handed_socket, handed_vdpa

_Token = Annotated[
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
        autocompletion=candidates.devices,
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="The VM's memory, such as 16G.")
]
Iommufd = Annotated[bool, typer.Option("--iommufd", help="Through iommufd, not through the group.")]
_READY = ("ready", "bold green")
_NOT_READY = ("not ready", "bold red")

app = area("Hand devices to a virtual machine: checks, and what its configuration needs.")


@app.command(
    "check",
    epilog=examples(
        "vfiotool vm check 0000:05:01.0",
        "vfiotool vm check 01:00.0 01:00.1 --memory 16G --vcpus 8 --hypervisor libvirt",
        "vfiotool --root host.gz vm check 01:00.0 --memory 16G",
    ),
)
def check(
    context: typer.Context,
    devices: HandedArgument,
    memory: Memory = None,
    vcpus: Annotated[
        int | None, typer.Option("--vcpus", min=1, metavar="N", help="The VM's processors.")
    ] = None,
    hypervisor: Annotated[
        str,
        typer.Option(
            metavar="|".join(HYPERVISORS),
            help="Whose remedies to print; libvirt raises limits by itself.",
            autocompletion=candidates.words(*HYPERVISORS),
        ),
    ] = "qemu",
    iommufd: Iommufd = False,
    viommu: Annotated[bool, typer.Option("--viommu", help="The VM has a virtual IOMMU.")] = False,
    vf_token: _Token = None,
) -> int:
    """Check whether a virtual machine can open the devices now; exit code 1 if not.

    Says before the start what would break it: memory that may not be locked, addresses that the
    IOMMU does not reach, devices that cannot be reset for a second start. What counts for the
    whole machine needs --memory and --vcpus.
    """
    if hypervisor not in HYPERVISORS:
        raise UsageError(
            f"{hypervisor[:40]!r} is not a hypervisor known here",
            hint=f"one of {', '.join(HYPERVISORS)}",
        )
    size = None if memory is None else parse_memory(memory)
    wanted = WantedGuest(size, vcpus, hypervisor, iommufd, viommu)
    host, inventory, chosen = _chosen(context, devices)
    token = _find_token(host, chosen, vf_token)
    found = preflight.check(host, inventory, chosen, wanted, token)
    ready = all(item.severity != BLOCKER for item in found)
    notes = [note for device in chosen for note in preflight.notes(host, inventory, device)]
    if wants_json(context):
        payload = {"ready": ready, "findings": [item.as_json() for item in found], "notes": notes}
        output.emit(payload)
        return 0 if ready else 1
    _print_check(chosen, found, notes)
    return 0 if ready else 1


def _print_check(
    chosen: list[Handed], found: tuple[PreflightFinding, ...], notes: list[str]
) -> None:
    """Device by device, and last what counts for several."""
    for device in chosen:
        own = [item for item in found if item.device == device.name]
        bad = any(item.severity == BLOCKER for item in own)
        output.write((device.name, "bold"), "  ", _NOT_READY if bad else _READY)
        for item in own:
            _print_finding(item)
        if not any(item.kind == "reset" for item in own):
            for note in notes:
                if device.name in note or len(chosen) == 1:
                    output.write(f"  note: {note}")
    names = {device.name for device in chosen}
    whole = [item for item in found if item.device not in names]
    if whole:
        bad = any(item.severity == BLOCKER for item in whole)
        output.write(("together", "bold"), "  ", _NOT_READY if bad else _READY)
        for item in whole:
            _print_finding(item)


def _print_finding(item: PreflightFinding) -> None:
    colour = {BLOCKER: "red", WARNING: "yellow"}.get(item.severity, "")
    label = item.kind if item.severity == BLOCKER else f"{item.severity}: {item.kind}"
    output.write((f"  {label}", colour), f"  {item.detail}")
    if item.evidence:
        output.write((f"      {item.evidence}", "dim"))
    for line in item.remedy:
        output.write((f"    {line}", "cyan"))


@app.command(
    "qemu",
    epilog=examples(
        "vfiotool vm qemu 0000:05:01.0",
        "qemu-system-x86_64 -machine q35 $(vfiotool vm qemu 05:01.0)",
    ),
)
def qemu_options(
    context: typer.Context,
    devices: HandedArgument,
    iommufd: Iommufd = False,
    vf_token: _Token = None,
) -> int:
    """Print the options (-device vfio-pci) for a q35 machine of QEMU."""
    host, inventory, chosen = _chosen(context, devices)
    token = _find_token(host, chosen, vf_token)
    _require_ready(host, inventory, chosen, token)
    _print_words(context, qemu.arguments(chosen, iommufd=iommufd, vf_token=token))
    return 0


def _find_token(host: Host, devices: list[Handed], given: str | None) -> str | None:
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
def libvirt_elements(context: typer.Context, devices: HandedArgument) -> int:
    """Print libvirt's hostdev elements."""
    text = libvirt.hostdevs(_ready(context, devices))
    if wants_json(context):
        output.emit({"xml": text})
    else:
        output.text(text)
    return 0


@app.command("cloud-hypervisor", epilog=examples("vfiotool vm cloud-hypervisor 0000:05:01.0"))
def ch_options(context: typer.Context, devices: HandedArgument) -> int:
    """Print cloud-hypervisor's options (--device)."""
    _print_words(context, cloud_hypervisor.arguments(_ready(context, devices)))
    return 0


def _chosen(context: typer.Context, names: list[str]) -> tuple[Host, Inventory, list[Handed]]:
    host = host_of(context)
    inventory = read_inventory(host)
    found: dict[str, Handed] = {}
    for name in names:
        kind, _, rest = name.partition(":")
        if kind in SOCKETS:
            device = handed_socket(kind, rest)
        elif kind == VDPA:
            device = handed_vdpa(host, rest)
        else:
            device = handed(inventory, resolve(host, name))
        found.setdefault(device.name, device)
    return host, inventory, list(found.values())


def _ready(context: typer.Context, names: list[str]) -> list[Handed]:
    """The devices; on the running host only if a VM could open each of them now."""
    host, inventory, chosen = _chosen(context, names)
    _require_ready(host, inventory, chosen)
    return chosen


def _require_ready(
    host: Host,
    inventory: Inventory,
    chosen: list[Handed],
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
