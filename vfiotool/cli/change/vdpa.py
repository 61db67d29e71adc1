"""`vdpa …`: vDPA devices, over generic netlink and their bus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from vfiotool.change.journal import Journal
from vfiotool.change.plans.vdpa import (
    plan_vdpa_add,
    plan_vdpa_bind,
    plan_vdpa_remove,
    plan_vdpa_set,
)
from vfiotool.change.plans.vdpa_facts import read_vdpa_facts
from vfiotool.change.steps.base import Step
from vfiotool.cli import candidates, output
from vfiotool.cli.change.changing import (
    DEADLINE_S,
    Allow,
    Changed,
    DryRun,
    Report,
    Timeout,
    run_change,
)
from vfiotool.cli.context import area, examples, host_of, wants_json
from vfiotool.devices.vdpa import (
    VdpaDevice,
    VdpaParent,
    VdpaSettings,
    is_usable,
    read_counters,
    read_device_names,
    read_devices,
    read_parents,
)
from vfiotool.devices.vduse import read_vduse
from vfiotool.errors import UsageError
from vfiotool.host.host import Host

# How long udev and a driver that probes may take.
_NODE_S = 5.0
_DRIVERS = ("vhost_vdpa", "virtio_vdpa")
_Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="As vdpa list shows it.", autocompletion=candidates.vdpas),
]


app = area("List, create and remove vDPA devices.")


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


@app.command("parents", epilog=examples("vfiotool vdpa parents"))
def parents(context: typer.Context) -> int:
    """List the devices on which vDPA devices can be created."""
    host = host_of(context)
    found = read_parents(host)
    if wants_json(context):
        output.emit({"parents": [parent_as_json(parent) for parent in found]})
        return 0
    output.table(
        ("NAME", "CLASSES", "QUEUES"),
        [[item.name, ", ".join(item.classes), str(item.max_vqs)] for item in found],
    )
    if not found:
        output.say(
            "vfiotool: no vDPA parents"
            if host.live
            else "vfiotool: only a running host shows its vDPA parents (netlink)"
        )
    return 0


@app.command("list", epilog=examples("vfiotool vdpa list"))
def devices(context: typer.Context) -> int:
    """List the vDPA devices."""
    found = read_devices(host_of(context))
    if wants_json(context):
        output.emit({"vdpas": [device_as_json(device) for device in found]})
        return 0
    rows = [
        [item.name, item.type or "-", item.parent or "-", item.driver or "-", _place(item)]
        for item in found
    ]
    output.table(("NAME", "TYPE", "PARENT", "DRIVER", "NODE"), rows)
    if not rows:
        output.say("vfiotool: there are no vDPA devices")
    return 0


@app.command(
    "add",
    epilog=examples(
        "vfiotool vdpa add vdpa0 0000:01:00.2",
        "vfiotool vdpa add vdpa0 vdpasim_net --driver vhost_vdpa --mac 52:54:00:00:00:01",
    ),
)
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A new name, such as vdpa0.")],
    parent: Annotated[
        str,
        typer.Argument(
            metavar="PARENT",
            help="As vdpa parents shows it.",
            autocompletion=candidates.vdpa_parents,
        ),
    ],
    driver: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="vhost_vdpa or virtio_vdpa; default: the kernel's choice.",
            autocompletion=candidates.words(*_DRIVERS),
        ),
    ] = None,
    mac: Annotated[
        str | None, typer.Option(metavar="MAC", help="MAC address of a network device.")
    ] = None,
    mtu: Annotated[int | None, typer.Option(metavar="N", help="MTU of a network device.")] = None,
    max_vqp: Annotated[
        int | None,
        typer.Option("--max-vqp", metavar="N", help="Queue pairs of a network device, at most."),
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="MASK", help="Virtio feature bits to offer, as 0x….")
    ] = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Create a vDPA device on a parent."""
    settings = VdpaSettings(mac, mtu, max_vqp, _mask(features))

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_vdpa_add(read_vdpa_facts(host), name, parent, driver, settings)

    title = f"vdpa add {name} {parent}"
    report = _reporter(context, name)
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout)


@app.command("remove", epilog=examples("vfiotool vdpa remove vdpa0"))
def remove(
    context: typer.Context,
    name: _Name,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Remove a vDPA device."""

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_vdpa_remove(read_vdpa_facts(host), name)

    title = f"vdpa remove {name}"
    report = _reporter(context, name)
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout, allow=allow)


@app.command("bind", epilog=examples("vfiotool vdpa bind vdpa0 vhost_vdpa"))
def bind(
    context: typer.Context,
    name: _Name,
    driver: Annotated[
        str,
        typer.Argument(
            metavar="DRIVER",
            help="vhost_vdpa or virtio_vdpa.",
            autocompletion=candidates.words(*_DRIVERS),
        ),
    ],
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Give a vDPA device to virtual machines (vhost_vdpa) or to this host (virtio_vdpa)."""

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_vdpa_bind(read_vdpa_facts(host), name, driver)

    title = f"vdpa bind {name} {driver}"
    report = _reporter(context, name)
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout, allow=allow)


@app.command("set", epilog=examples("vfiotool vdpa set vdpa0 --mac 52:54:00:00:00:01"))
def set_(
    context: typer.Context,
    name: _Name,
    mac: Annotated[str, typer.Option(metavar="MAC", help="The MAC address that it is to have.")],
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Change a network device's MAC address (from Linux 6.12 on, where its parent can)."""

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_vdpa_set(read_vdpa_facts(host), name, mac)

    title = f"vdpa set {name} --mac {mac}"
    report = _reporter(context, name)
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout, allow=allow)


@app.command("stats", epilog=examples("vfiotool vdpa stats vdpa0"))
def stats(context: typer.Context, name: _Name) -> int:
    """Show what a device's vendor counts of each virtqueue."""
    host = host_of(context)
    counted = read_counters(host, read_vdpa_facts(host).device(name))
    if wants_json(context):
        queues = [{"queue": item.queue, "counters": dict(item.counters)} for item in counted]
        output.emit({"vdpa": name, "queues": queues})
        return 0
    rows = [[str(item.queue), key, str(value)] for item in counted for key, value in item.counters]
    output.table(("QUEUE", "COUNTER", "VALUE"), rows)
    return 0


def _mask(text: str | None) -> int | None:
    try:
        return None if text is None else int(text, 0)
    except ValueError as error:
        raise UsageError(f"--features {text!r} is not a number", hint="as 0x300000020") from error


def _reporter(context: typer.Context, name: str) -> Callable[[Changed], Report]:
    """Reports the device of that name after a change, or that it is removed."""

    def report(_: Changed) -> Report:
        _wait(host_of(context), name)
        found = [device for device in read_devices(host_of(context)) if device.name == name]
        lines = [
            f"{device.name}: {device.driver or 'no driver'} ({_place(device)})" for device in found
        ]
        keys = {"vdpas": [device_as_json(device) for device in found]}
        return keys, lines or [f"{name}: removed"]

    return report


def _wait(host: Host, name: str) -> None:
    """Wait until what the driver makes of a device is there: udev makes nodes, and a driver that
    probes asks the device first. Warns where it does not come."""
    ends = host.clock.monotonic() + _NODE_S
    while host.live and name in read_device_names(host) and not is_usable(host, name):
        if host.clock.monotonic() > ends:
            served = [
                item for item in read_vduse(host) if item.name == name and item.state == "mute"
            ]
            for item in served:
                output.warn(f"{name}: its server, pid {item.pid} ({item.command}), does not answer")
            if not served:
                output.warn(f"{name}: no node, disk or interface has appeared in {_NODE_S:.0f} s")
            return
        host.clock.sleep(0.02)


def _place(device: VdpaDevice) -> str:
    return device.node or ", ".join(device.interfaces) or "no node"
