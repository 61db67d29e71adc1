"""`vdpa parents|list|add|remove|bind`: vDPA devices, over generic netlink and their bus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from vfiotool.change.journal import Journal
from vfiotool.change.plans.vdpa import (
    plan_vdpa_add,
    plan_vdpa_bind,
    plan_vdpa_remove,
    read_vdpa_facts,
)
from vfiotool.change.steps.base import Step
from vfiotool.cli import output as render
from vfiotool.cli.change.changing import (
    DEADLINE_S,
    Allow,
    Changed,
    DryRun,
    Timeout,
    Told,
    carry_out,
    print_line,
)
from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.devices.vdpa import VdpaDevice, VdpaParent, VdpaSettings, read_devices, read_parents
from vfiotool.errors import UsageError
from vfiotool.host.host import Host

_Name = Annotated[str, Argument(metavar="NAME", help="As vdpa list names it.")]


def register(app: Commands) -> None:
    """Add this area's commands."""
    vdpa = Commands(help="vDPA devices.")
    vdpa.command("parents", help="List what vDPA devices can be made on.")(parents)
    vdpa.command("list", help="List the vDPA devices.")(devices)
    vdpa.command("add", help="Make a vDPA device.")(add)
    vdpa.command("remove", help="Remove a vDPA device.")(remove)
    vdpa.command("bind", help="Give a vDPA device to a virtual machine, or to this host.")(bind)
    app.add_typer(vdpa, name="vdpa")


def parent_as_json(parent: VdpaParent) -> dict[str, object]:
    return {
        "name": parent.name,
        "bus": parent.bus,
        "device": parent.device,
        "classes": list(parent.classes),
        "max_vqs": parent.max_vqs,
        "features": list(parent.features),
    }


def device_as_json(device: VdpaDevice) -> dict[str, object]:
    negotiated = device.negotiated_features
    return {
        "name": device.name,
        "parent": device.parent,
        "type": device.type,
        "vendor": device.vendor,
        "max_vqs": device.max_vqs,
        "min_vq_size": device.min_vq_size,
        "max_vq_size": device.max_vq_size,
        "driver": device.driver,
        "driver_override": device.driver_override,
        "node": device.node,
        "interfaces": list(device.interfaces),
        "features": list(device.features),
        "negotiated_features": None if negotiated is None else list(negotiated),
        "config": device.config,
    }


def parents(context: Context) -> int:
    host = render.host(context)
    found = read_parents(host)
    if render.state(context).json:
        render.emit({"parents": [parent_as_json(parent) for parent in found]})
        return 0
    for parent in found:
        print_line(f"{parent.name}  {', '.join(parent.classes)}  at most {parent.max_vqs} queues")
    if not found:
        render.say(
            "vfiotool: no vDPA parents"
            if host.live
            else "vfiotool: only a running host tells its vDPA parents (netlink)"
        )
    return 0


def devices(context: Context) -> int:
    found = read_devices(render.host(context))
    if render.state(context).json:
        render.emit({"vdpas": [device_as_json(device) for device in found]})
        return 0
    for device in found:
        parts = [
            device.name,
            device.type or "?",
            f"on {device.parent or '?'}",
            device.driver or "no driver",
            _place(device),
        ]
        print_line("  ".join(parts))
    return 0


def add(
    context: Context,
    name: Annotated[str, Argument(metavar="NAME", help="A new name, such as vdpa0.")],
    parent: Annotated[str, Argument(metavar="PARENT", help="As vdpa parents names it.")],
    driver: Annotated[
        str | None, Option(help="vhost_vdpa or virtio_vdpa; the kernel's choice if left out.")
    ] = None,
    mac: Annotated[str | None, Option(help="MAC address of a network device.")] = None,
    mtu: Annotated[int | None, Option(help="MTU of a network device.")] = None,
    max_vqp: Annotated[
        int | None, Option("--max-vqp", help="Queue pairs of a network device, at most.")
    ] = None,
    features: Annotated[
        str | None, Option(metavar="MASK", help="Virtio feature bits to offer, as 0x….")
    ] = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    settings = VdpaSettings(mac, mtu, max_vqp, _mask(features))

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_vdpa_add(read_vdpa_facts(host), name, parent, driver, settings)

    title = f"vdpa add {name} {parent}"
    tell = _teller(context, name)
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout)


def remove(
    context: Context,
    name: _Name,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_vdpa_remove(read_vdpa_facts(host), name)

    title = f"vdpa remove {name}"
    tell = _teller(context, name)
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout, allow=allow)


def bind(
    context: Context,
    name: _Name,
    driver: Annotated[str, Argument(metavar="DRIVER", help="vhost_vdpa or virtio_vdpa.")],
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_vdpa_bind(read_vdpa_facts(host), name, driver)

    title = f"vdpa bind {name} {driver}"
    tell = _teller(context, name)
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout, allow=allow)


def _mask(text: str | None) -> int | None:
    try:
        return None if text is None else int(text, 0)
    except ValueError as error:
        raise UsageError(f"--features {text!r} is not a number", hint="as 0x300000020") from error


def _teller(context: Context, name: str) -> Callable[[Changed], Told]:
    """Tells of the device of that name after a change; that it is removed where it is not there."""

    def tell(_: Changed) -> Told:
        found = [device for device in read_devices(render.host(context)) if device.name == name]
        lines = [
            f"{device.name}: {device.driver or 'no driver'} ({_place(device)})" for device in found
        ]
        keys = {"vdpas": [device_as_json(device) for device in found]}
        return keys, lines or [f"{name}: removed"]

    return tell


def _place(device: VdpaDevice) -> str:
    return device.node or ", ".join(device.interfaces) or "no node"
