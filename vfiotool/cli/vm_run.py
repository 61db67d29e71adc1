"""`vm run`: start a small guest with the devices, say what it saw, and what became of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import wants_json
from vfiotool.cli.lab import end_on_sigterm
from vfiotool.cli.vm_devices import (
    HandedArgument,
    Iommufd,
    Token,
    chosen_devices,
    find_token,
    require_ready,
)
from vfiotool.devices.inventory import Inventory
from vfiotool.devices.platform import read_platform
from vfiotool.errors import Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.vm import preflight, qemu
from vfiotool.vm.afterwards import Afterwards, read_afterwards
from vfiotool.vm.finding import BLOCKER, WantedGuest, parse_memory
from vfiotool.vm.handed import Handed
from vfiotool.vm.machine import Q35, machine_of

if TYPE_CHECKING:
    from vfiotool.lab.trial import SeenFunction, Trial, TrialFiles, TrialGuest

KernelOption = Annotated[
    str,
    typer.Option(
        "--kernel",
        metavar="NAME",
        help="host: this machine's own; a name that `lab kernels` lists, or a bzImage.",
        autocompletion=candidates.kernels,
    ),
]
QemuOption = Annotated[
    str | None,
    typer.Option("--qemu", metavar="PROGRAM", help="Default: the installed one, else the lab's."),
]
CommandOption = Annotated[
    str | None,
    typer.Option(
        "--command", metavar="SHELL", help="A command for the guest's shell (busybox), at last."
    ),
]
MemoryOption = Annotated[str, typer.Option("--memory", metavar="SIZE", help="The guest's memory.")]
VcpusOption = Annotated[
    int, typer.Option("--vcpus", min=1, metavar="N", help="The guest's processors.")
]
TimesOption = Annotated[
    int, typer.Option("--times", min=1, max=100, metavar="N", help="Starts, one after another.")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1, metavar="SECONDS", help="For each start.")
]


def run(
    context: typer.Context,
    devices: HandedArgument,
    memory: MemoryOption = "256M",
    vcpus: VcpusOption = 1,
    iommufd: Iommufd = False,
    vf_token: Token = None,
    kernel: KernelOption = "host",
    program: QemuOption = None,
    command: CommandOption = None,
    times: TimesOption = 2,
    timeout: TimeoutOption = 300.0,
) -> int:
    """Start a small guest with the devices, for trying; then look at what became of them.

    The guest is a kernel and busybox, started with the options that `vm qemu` prints. It looks at
    each device, reads the first 4 KiB of its disks, the first register of what has no driver there,
    and writes nothing. It starts twice (--times), as devices that cannot be reset start once. Exit
    code 1 says that a start failed, that the guest did not see a device, or that the devices are
    not ready for another start afterwards.
    """
    from vfiotool.lab import trial

    end_on_sigterm()
    host, inventory, chosen = chosen_devices(context, devices)
    if not host.live:
        raise UsageError(
            "vm run starts a guest on this machine, not on another",
            hint="leave --root out; vm check and vm qemu work on it",
        )
    token = find_token(host, chosen, vf_token)
    require_ready(host, inventory, chosen, token)
    size = parse_memory(memory)
    wanted = WantedGuest(size, vcpus, "qemu", iommufd)
    words = qemu.arguments(chosen, iommufd=iommufd, vf_token=token, memory_bytes=size)
    guest = _guest(host, chosen, kernel, program, vcpus, command)
    shown = not wants_json(context)
    boots: list[Trial] = []
    with trial.TrialFiles(guest, words) as files:
        _say_what_starts(guest, files)
        while len(boots) < times and all(_saw_all(boot, chosen) for boot in boots):
            boots.append(files.boot(timeout))
            if shown:
                _print_boot(len(boots), boots[-1], chosen)
        line = files.command_line
    after = read_afterwards(host, chosen, token)
    worked = _saw_all(boots[-1], chosen)
    stands = [] if worked else _stands_against(host, inventory, chosen, wanted, token)
    good = worked and all(one.ready for one in after)
    if shown:
        _print_afterwards(after)
    else:
        payload = {"good": good, "command": line, "findings": stands}
        payload["boots"] = [_boot_json(boot, chosen) for boot in boots]
        payload["afterwards"] = [one.as_json() for one in after]
        output.emit(payload)
    return 0 if good else 1


def _guest(
    host: Host,
    devices: Sequence[Handed],
    kernel: str,
    program: str | None,
    vcpus: int,
    command: str | None,
) -> TrialGuest:
    """What the guest is made of. Raises Unsupported for a host that is not x86-64."""
    from vfiotool.lab import trial
    from vfiotool.lab.kernels import catalogue
    from vfiotool.lab.qemu import accelerator

    if machine_of(read_platform(host).architecture) != Q35:
        raise Unsupported(
            "vm run starts x86-64 guests only", hint="vfiotool vm qemu prints the options"
        )
    chosen = catalogue.prepare(kernel)
    over_vfio_user = any(device.model == "vfio-user" for device in devices)
    found = trial.find_qemu(program, vfio_user=over_vfio_user)
    aliases = (host.read(f"{SYS_PCI_DEVICES}/{one.name}/modalias") for one in devices)
    return trial.TrialGuest(
        qemu=found,
        accelerator=accelerator(found, chosen.image),
        kernel=chosen,
        busybox=trial.find_busybox(),
        vcpus=vcpus,
        aliases=tuple(alias for alias in aliases if alias),
        command=command or "",
    )


def _say_what_starts(guest: TrialGuest, files: TrialFiles) -> None:
    how = guest.accelerator
    output.say(
        f"vm run: Linux {guest.kernel.release} in QEMU {guest.qemu.version}, "
        f"{how.name.upper()} ({how.reason})"
    )
    output.say(f"vm run: {shlex.join(files.command_line)}")


def _seen(boot: Trial, devices: Sequence[Handed]) -> dict[str, SeenFunction]:
    """What the guest saw, by the device's name on the host."""
    found = {function.place: function for function in boot.functions}
    places = qemu.guest_places(devices)
    return {name: found[place] for name, place in places.items() if place in found}


def _saw_all(boot: Trial, devices: Sequence[Handed]) -> bool:
    """Whether the guest came to its end, saw every device, could read, and its command worked."""
    seen = _seen(boot, devices)
    return boot.code == 0 and all(
        device.name in seen and not seen[device.name].failed for device in devices
    )


def _print_boot(number: int, boot: Trial, devices: Sequence[Handed]) -> None:
    word, colour = ("booted", "bold green") if boot.ended else ("failed", "bold red")
    output.write((f"start {number}", "bold"), "  ", (word, colour), f"  {boot.seconds:.0f} s")
    seen = _seen(boot, devices)
    for device in devices:
        if device.name in seen:
            _print_function(device.name, seen[device.name])
        elif boot.ended:
            output.write(f"  {device.name}  ", ("not seen in the guest", "red"))
    for line in boot.output:
        output.write(f"    {line}")
    if boot.code:
        output.write((f"  the command ended with exit code {boot.code}", "red"))
    if boot.late:
        output.write(
            ("  it was ended for its time: see --timeout; emulated guests are slow", "red")
        )
    elif not boot.ended:
        said = boot.qemu_words or "nothing"
        output.write((f"  QEMU said: {said}", "red"))
    if not boot.ended and boot.console:
        output.write((f"  its console ended with: {boot.console}", "dim"))


def _print_function(name: str, seen: SeenFunction) -> None:
    driver = seen.driver or "no driver"
    output.write(
        (f"  {name}", "bold"), f"  {seen.vendor}:{seen.device}  {driver}, {seen.address} there"
    )
    for disk, size, digest in seen.disks:
        output.write(f"      {disk}  {size} bytes; its first 4 KiB read: sha256 {digest[:16]}…")
    for interface, address, state in seen.interfaces:
        output.write(f"      {interface}  {address}  {state}")
    if seen.register is not None:
        bar, width, value = seen.register
        output.write(f"      BAR {bar}, its first {width} bits read: {value}")
    for words in seen.failed:
        output.write((f"      read failed: {words}", "red"))


def _stands_against(
    host: Host,
    inventory: Inventory,
    devices: Sequence[Handed],
    wanted: WantedGuest,
    token: str | None,
) -> list[dict[str, object]]:
    """After a failed start: what `vm check` had to say of exactly this machine."""
    found = preflight.check(host, inventory, devices, wanted, token)
    for item in found:
        if item.severity == BLOCKER:
            output.warn(f"vm check: {item.device} {item.kind}: {item.detail}")
    return [item.as_json() for item in found]


def _print_afterwards(after: Sequence[Afterwards]) -> None:
    output.write(("afterwards", "bold"))
    for one in after:
        word, colour = ("ready", "bold green") if one.ready else ("not ready", "bold red")
        place = [] if one.group is None else [f"group {one.group}"]
        driver = [one.driver] if one.driver else []
        output.write(f"  {one.device}  ", (word, colour), "  ", ", ".join([*driver, *place]))
        for change in one.changes:
            output.write((f"      {change}", "yellow"))
        for item in one.findings:
            output.write((f"      {item.kind}", "red"), f"  {item.detail}")
            output.write((f"        {item.next}", "cyan"))


def _boot_json(boot: Trial, devices: Sequence[Handed]) -> dict[str, object]:
    seen = _seen(boot, devices)
    return {
        "booted": boot.ended,
        "kernel": boot.release,
        "timed_out": boot.late,
        "seconds": round(boot.seconds, 1),
        "qemu": {"exit_code": boot.qemu_code, "output": boot.qemu_words},
        "command": None if boot.code is None else {"exit_code": boot.code, "output": boot.output},
        "console": boot.console,
        "devices": [_device_json(device.name, seen.get(device.name)) for device in devices],
    }


def _device_json(name: str, seen: SeenFunction | None) -> dict[str, object]:
    if seen is None:
        return {"device": name, "seen": None}
    bar, width, value = seen.register or (None, None, None)
    return {
        "device": name,
        "seen": {
            "address": seen.address,
            "vendor": seen.vendor,
            "device": seen.device,
            "class": seen.class_code,
            "driver": seen.driver,
            "disks": [
                {"name": disk, "size": size, "sha256": digest} for disk, size, digest in seen.disks
            ],
            "interfaces": [
                {"name": interface, "mac": mac, "state": state}
                for interface, mac, state in seen.interfaces
            ],
            "register": None if bar is None else {"bar": bar, "width": width, "value": value},
            "failed": seen.failed,
        },
    }
