"""`mdev types|list|create|remove`: mediated devices."""

from __future__ import annotations

import uuid as uuids
from typing import Annotated

import typer

from vfiotool.change.journal import Journal
from vfiotool.change.plans.mdev import plan_mdev_create, plan_mdev_remove
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
from vfiotool.devices.mdev import read_mdev_types, read_mdevs, read_reason_for_none
from vfiotool.devices.pci import Address
from vfiotool.host.host import Host

app = area("List, create and remove mediated devices (vGPUs and their like).")


@app.command("types", epilog=examples("vfiotool mdev types"))
def mdev_types(context: typer.Context) -> int:
    """List the types of mediated devices that the parents on this host offer."""
    host = host_of(context)
    types = read_mdev_types(host)
    reason = None if types else read_reason_for_none(host)
    keys = ("parent", "type", "name", "device_api", "available_instances", "description")
    if wants_json(context):
        rows_of = [{key: getattr(kind, key) for key in keys} for kind in types]
        output.emit({"types": rows_of, "reason": reason})
        return 0
    rows: list[list[output.Part]] = [
        [
            kind.parent,
            (kind.type, "bold"),
            "?" if kind.available_instances is None else str(kind.available_instances),
            kind.name or "-",
            "; ".join((kind.description or "-").split("\n")),
        ]
        for kind in types
    ]
    output.table(("PARENT", "TYPE", "LEFT", "NAME", "DESCRIPTION"), rows)
    if not rows:
        output.say(f"vfiotool: no device of this host offers mediated devices: {reason}")
    return 0


@app.command("list", epilog=examples("vfiotool mdev list"))
def mdev_list(context: typer.Context) -> int:
    """List the mediated devices of this host."""
    mdevs = read_mdevs(host_of(context))
    keys = ("uuid", "parent", "type", "iommu_group")
    if wants_json(context):
        output.emit({"mdevs": [{key: getattr(mdev, key) for key in keys} for mdev in mdevs]})
        return 0
    rows: list[list[output.Part]] = [
        [
            mdev.uuid,
            mdev.parent or "-",
            mdev.type or "-",
            "-" if mdev.iommu_group is None else str(mdev.iommu_group),
        ]
        for mdev in mdevs
    ]
    output.table(("UUID", "PARENT", "TYPE", "GROUP"), rows)
    if not rows:
        output.say("vfiotool: there are no mediated devices")
    return 0


@app.command(
    "create",
    epilog=examples(
        "vfiotool mdev create 0000:06:00.0 nvidia-35",
        "vfiotool mdev create mtty mtty-2 --uuid 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
    ),
)
def mdev_create(
    context: typer.Context,
    parent: Annotated[
        str,
        typer.Argument(
            metavar="PARENT", help="As mdev types shows it.", autocompletion=candidates.parents
        ),
    ],
    kind: Annotated[
        str,
        typer.Argument(
            metavar="TYPE", help="As mdev types shows it.", autocompletion=candidates.types
        ),
    ],
    uuid: Annotated[
        str | None, typer.Option(metavar="UUID", help="Its UUID; default: a random one.")
    ] = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Create a mediated device."""
    host = host_of(context)
    wanted = uuid or str(uuids.uuid4())
    if Address.is_address(parent):
        parent = str(Address.parse(parent))

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_mdev_create(read_mdev_types(host), read_mdevs(host), parent, kind, wanted)

    def report(done: Changed) -> Report:
        name = wanted.lower()
        found = next((mdev for mdev in read_mdevs(host) if mdev.uuid == name), None)
        group = None if found is None else found.iommu_group
        entry = {"uuid": name, "parent": parent, "type": kind, "iommu_group": group}
        already = "" if done.steps else "already "
        return {"mdevs": [entry]}, [f"{name}: {already}{parent}/{kind} (group {group})"]

    title = f"mdev create {parent} {kind} {wanted}"
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout)


@app.command("remove", epilog=examples("vfiotool mdev remove 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"))
def mdev_remove(
    context: typer.Context,
    uuid: Annotated[
        str,
        typer.Argument(
            metavar="UUID", help="As mdev list shows it.", autocompletion=candidates.mdevs
        ),
    ],
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Remove a mediated device."""

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_mdev_remove(read_mdevs(host), uuid)

    def report(_: Changed) -> Report:
        return {}, [f"{uuid.lower()}: removed"]

    title = f"mdev remove {uuid}"
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout, allow=allow)
