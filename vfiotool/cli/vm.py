"""`vm check`, and what each hypervisor's configuration needs: hand devices to a VM."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import Annotated

import typer

from vfiotool.change.steps.vf_network import read_settings
from vfiotool.cli import candidates, output
from vfiotool.cli.context import SELECTORS, area, examples, host_of, uuid_of, wants_json
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.devices.platform import read_platform
from vfiotool.devices.selector import resolve
from vfiotool.devices.vdpa import read_devices
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.saved import ETC_FOLDER, DesiredState
from vfiotool.vm import (
    cloud_hypervisor,
    incus,
    kubevirt,
    libvirt,
    preflight,
    proxmox,
    qemu,
    yaml_text,
)
from vfiotool.vm.finding import (
    BLOCKER,
    HYPERVISORS,
    WARNING,
    PreflightFinding,
    WantedGuest,
    parse_memory,
)
from vfiotool.vm.handed import SOCKETS, VDPA, Handed, handed, handed_socket, handed_vdpa
from vfiotool.vm.machine import machine_of
from vfiotool.vm.releases import oldest, require_release
from vfiotool.vm.script import start_script

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
    "qemu",
    epilog=examples(
        "vfiotool vm qemu 0000:05:01.0",
        "qemu-system-x86_64 -machine q35 $(vfiotool vm qemu 05:01.0)",
        "vfiotool vm qemu 01:00.0 01:00.1 --memory 8G --script > start-vm1",
        "vfiotool vm qemu vdpa:vdpa0 vhost-user-blk:/run/vm1.sock --memory 2G",
    ),
)
def qemu_options(
    context: typer.Context,
    devices: HandedArgument,
    iommufd: Iommufd = False,
    vf_token: _Token = None,
    memory: Memory = None,
    vcpus: Vcpus = 2,
    release: Release = None,
    script: Script = False,
) -> int:
    """Print the options (-device vfio-pci) for a q35 machine of QEMU."""
    host, inventory, chosen = _chosen(context, devices)
    token = _find_token(host, chosen, vf_token)
    features = qemu.features_of(chosen, iommufd=iommufd, vf_token=token)
    require_release(qemu.PROGRAM, release, features)
    if not script:
        _require_ready(host, inventory, chosen, token)
    size = None if memory is None else parse_memory(memory)
    if script and size is None:
        memory, size = "1G", parse_memory("1G")
    words = qemu.arguments(chosen, iommufd=iommufd, vf_token=token, memory_bytes=size)
    if script:
        guest = machine_of(read_platform(host).architecture)
        output.text(start_script("qemu", chosen, words, memory=memory, vcpus=vcpus, guest=guest))
        return 0
    _print_words(context, words, oldest(qemu.PROGRAM, features), qemu.PROGRAM)
    return 0


@app.command(
    "libvirt",
    epilog=examples(
        "vfiotool vm libvirt 0000:05:01.0 > hostdev.xml",
        "virsh attach-device vm1 hostdev.xml --config",
    ),
)
def libvirt_elements(
    context: typer.Context,
    devices: HandedArgument,
    iommufd: Iommufd = False,
    release: Release = None,
) -> int:
    """Print libvirt's hostdev elements; of network VFs interfaces with MAC and VLAN.

    Elements that need the domain's memory shared (vDPA, vhost-user) come with a comment that says
    so.
    """
    host, inventory, chosen = _chosen(context, devices)
    features = libvirt.features_of(chosen, iommufd=iommufd)
    require_release(libvirt.PROGRAM, release, features)
    _require_ready(host, inventory, chosen)
    text = libvirt.hostdevs(chosen, iommufd=iommufd)
    needs = oldest(libvirt.PROGRAM, features)
    shared = libvirt.needs_shared_memory(chosen)
    if wants_json(context):
        memory = libvirt.SHARED_MEMORY if shared else None
        output.emit({"xml": text, "domain": memory, "needs": needs})
        return 0
    if shared:
        output.say(f"vfiotool: note: the domain itself needs\n{libvirt.SHARED_MEMORY.rstrip()}")
    output.text(text)
    _say_needs(libvirt.PROGRAM, needs)
    return 0


@app.command(
    "cloud-hypervisor",
    epilog=examples(
        "vfiotool vm cloud-hypervisor 0000:05:01.0",
        "cloud-hypervisor --kernel vmlinux $(vfiotool vm cloud-hypervisor 05:01.0)",
    ),
)
def ch_options(
    context: typer.Context,
    devices: HandedArgument,
    memory: Memory = None,
    vcpus: Vcpus = 2,
    release: Release = None,
    script: Script = False,
) -> int:
    """Print cloud-hypervisor's options (--device)."""
    program = cloud_hypervisor.PROGRAM
    host, inventory, chosen = _chosen(context, devices)
    features = cloud_hypervisor.features_of(chosen)
    require_release(program, release, features)
    if not script:
        _require_ready(host, inventory, chosen)
    size = None if memory is None else parse_memory(memory)
    if script and size is None:
        memory, size = "1G", parse_memory("1G")
    words = cloud_hypervisor.arguments(chosen, memory_bytes=size)
    if script:
        output.text(start_script(program, chosen, words, memory=memory, vcpus=vcpus))
        return 0
    _print_words(context, words, oldest(program, features), program)
    return 0


@app.command("kubevirt", epilog=examples("vfiotool vm kubevirt 0000:05:01.0 > devices.yaml"))
def kubevirt_resources(context: typer.Context, devices: HandedArgument) -> int:
    """Print KubeVirt's resources (permittedHostDevices, hostDevices) as YAML.

    Network VFs go to the SR-IOV device plug-in and network operator, whose resources are printed.
    """
    documents = kubevirt.resources(_ready(context, devices))
    if wants_json(context):
        output.emit({"resources": documents})
    else:
        output.text(yaml_text.documents(documents))
    return 0


@app.command(
    "proxmox",
    epilog=examples("vfiotool vm proxmox 0000:05:01.0 >> /etc/pve/qemu-server/100.conf"),
)
def proxmox_lines(context: typer.Context, devices: HandedArgument) -> int:
    """Print the lines of a Proxmox VE configuration (hostpci0)."""
    lines = proxmox.lines(_ready(context, devices))
    if wants_json(context):
        output.emit({"lines": lines})
    else:
        output.text("\n".join(lines))
    return 0


@app.command(
    "incus",
    epilog=examples("vfiotool vm incus 0000:05:01.0 > devices.yaml"),
)
def incus_devices(context: typer.Context, devices: HandedArgument) -> int:
    """Print the devices of an Incus virtual machine as YAML."""
    found = incus.devices_of(_ready(context, devices))
    if wants_json(context):
        output.emit(found)
    else:
        output.text(yaml_text.document(found))
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
            device = handed_vdpa(host, rest, _virtio_of(host, rest))
        else:
            device = _with_network(host, handed(inventory, resolve(host, name)))
        found.setdefault(device.name, device)
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
    return replace(device, network=own[0] if own else VfSettings(0 if index is None else index))


def _virtio_of(host: Host, name: str) -> str | None:
    """What a vDPA device is, where netlink can be asked."""
    try:
        known = {device.name: device.type for device in read_devices(host)}
    except VfiotoolError:
        return None
    return known.get(name)


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


def _say_needs(program: str, release: str) -> None:
    if output.is_terminal():
        output.say(f"vfiotool: note: {program} {release} or newer")


def _print_words(context: typer.Context, words: list[str], needs: str, program: str) -> None:
    """The words of a command line, and the oldest release that takes them."""
    if wants_json(context):
        output.emit({"arguments": words, "needs": needs})
        return
    _say_needs(program, needs)
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
