"""`vm check`, and what each hypervisor's configuration needs: hand devices to a VM."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from vfiotool.cli import candidates, output, vm_run
from vfiotool.cli.context import area, examples, wants_json
from vfiotool.cli.vm_devices import (
    HandedArgument,
    Iommufd,
    Memory,
    Release,
    Script,
    Token,
    Vcpus,
    chosen_devices,
    find_token,
    ready_devices,
    require_ready,
)
from vfiotool.devices.platform import read_platform
from vfiotool.errors import UsageError
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
from vfiotool.vm.handed import Handed
from vfiotool.vm.machine import machine_of
from vfiotool.vm.releases import oldest, require_release
from vfiotool.vm.script import start_script

_READY = ("ready", "bold green")
_NOT_READY = ("not ready", "bold red")

app = area("Hand devices to a virtual machine: checks, and what its configuration needs.")


app.command(
    "run",
    epilog=examples(
        "vfiotool vm run 0000:05:01.0",
        "vfiotool vm run 01:00.0 --kernel 6.12 --command 'dmesg | tail'",
        "vfiotool lab run --machine full -- sh -c 'vfiotool bind 03:00.0; vfiotool vm run 03:00.0'",
    ),
)(vm_run.run)


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
    vf_token: Token = None,
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
    host, inventory, chosen = chosen_devices(context, devices)
    token = find_token(host, chosen, vf_token)
    told = preflight.examine(host, inventory, chosen, wanted, token)
    found, notes = told.findings, list(told.notes)
    ready = all(item.severity != BLOCKER for item in found)
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
        "vfiotool vm qemu 01:00.0 01:00.1 --memory 8G --script > start-vm1",
        "vfiotool vm qemu vdpa:vdpa0 vhost-user-blk:/run/vm1.sock --memory 2G",
    ),
)
def qemu_options(
    context: typer.Context,
    devices: HandedArgument,
    iommufd: Iommufd = False,
    vf_token: Token = None,
    memory: Memory = None,
    vcpus: Vcpus = 2,
    release: Release = None,
    script: Script = False,
) -> int:
    """Print the options (-device vfio-pci) for a q35 machine of QEMU.

    On a host that is not x86 for the machine of its own kind: virt, s390-ccw-virtio, pseries.
    """
    host, inventory, chosen = chosen_devices(context, devices)
    token = find_token(host, chosen, vf_token)
    features = qemu.features_of(chosen, iommufd=iommufd, vf_token=token)
    require_release(qemu.PROGRAM, release, features)
    if not script:
        require_ready(host, inventory, chosen, token)
    size = None if memory is None else parse_memory(memory)
    if script and size is None:
        memory, size = "1G", parse_memory("1G")
    guest = machine_of(read_platform(host).architecture)
    words = qemu.arguments(chosen, iommufd=iommufd, vf_token=token, memory_bytes=size, guest=guest)
    if script:
        text = start_script(
            "qemu",
            chosen,
            words,
            memory=memory,
            vcpus=vcpus,
            guest=guest,
            iommufd=iommufd,
            vf_token=token,
        )
        output.text(text)
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
    host, inventory, chosen = chosen_devices(context, devices)
    features = libvirt.features_of(chosen, iommufd=iommufd)
    require_release(libvirt.PROGRAM, release, features)
    require_ready(host, inventory, chosen)
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
    host, inventory, chosen = chosen_devices(context, devices)
    features = cloud_hypervisor.features_of(chosen)
    require_release(program, release, features)
    if not script:
        require_ready(host, inventory, chosen)
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
    chosen = ready_devices(context, devices)
    documents = kubevirt.resources(chosen)
    for run in kubevirt.runs_of(chosen):
        if not run.has_policy:
            output.warn(
                f"vfiotool: no SriovNetworkNodePolicy for VFs of {run.parent}: its interface is "
                "not known, by which the operator takes others than the first VFs"
            )
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
    lines = proxmox.lines(ready_devices(context, devices))
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
    found = incus.devices_of(ready_devices(context, devices))
    if wants_json(context):
        output.emit(found)
    else:
        output.text(yaml_text.document(found))
    return 0


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
        # For $(vfiotool vm qemu …): a substitution would pass backslashes on.
        output.text(" ".join(map(shlex.quote, words)))
        if any(shlex.quote(word) != word for word in words):
            # What a substitution gives is split, and keeps its quotes.
            output.say(
                "vfiotool: note: some options are quoted for a shell, which $(…) alone does not "
                f'read: eval "{program} … $(vfiotool vm …)"; or --json, or --script'
            )
