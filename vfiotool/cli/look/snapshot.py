"""`vfiotool snapshot FILE` and `vfiotool snapshot diff A B`."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

from vfiotool.cli import output as render
from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.cli.look.groups import no_groups
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.host.host import Host


def register(app: Commands) -> None:
    """Add the command to the application."""
    app.command("snapshot", short_help="Capture this host in a file, or compare two.")(snapshot)


def snapshot(
    context: Context,
    file: Annotated[str, Argument(metavar="FILE | diff", help="Where to write, or `diff`.")],
    others: Annotated[
        list[str] | None, Argument(metavar="[A B]", help="With diff: two snapshots or roots.")
    ] = None,
    anonymize: Annotated[
        bool,
        Option(
            "--anonymize", help="Replace serial numbers, MACs, host names, UUIDs, IP addresses."
        ),
    ] = False,
    machine: Annotated[
        str | None, Option(metavar="NAME", help="The machine's name, for the header.")
    ] = None,
    date: Annotated[
        bool, Option(help="Note the time of capture; without it, captures are reproducible.")
    ] = True,
) -> None:
    """Capture this host in one file that --root opens anywhere; or compare two captures.

    FILE ending in .txt is plain, diffable text; .xz and everything else is packed.
    """
    if file == "diff":
        if others is None or len(others) != 2:
            raise UsageError(
                "snapshot diff takes two snapshots", hint="vfiotool snapshot diff BEFORE AFTER"
            )
        _diff(context, *others)
        return
    if others:
        raise UsageError("snapshot takes one file", hint="vfiotool snapshot FILE")
    _capture(context, file, anonymize=anonymize, machine=machine, date=date)


def _capture(
    context: Context, file: str, *, anonymize: bool, machine: str | None, date: bool
) -> None:
    from vfiotool.snapshot.capture import capture, save

    header = {} if machine is None else {"machine": machine}
    if date:
        now = datetime.datetime.now(datetime.UTC)
        header["taken"] = now.isoformat(timespec="seconds")
    found = capture(render.host(context), probes(), header=header)
    if anonymize:
        from vfiotool.snapshot.anonymize import anonymized

        found = anonymized(found)
    save(found, file)
    functions = sum(name.endswith("/config") for name in found.files)
    payload: dict[str, object] = {
        "file": file,
        "size_bytes": os.path.getsize(file),
        "files": len(found.files),
        "links": len(found.links),
        "functions": functions,
        "anonymized": anonymize,
    }
    if render.state(context).json:
        render.emit(payload)
        return
    render.say(
        f"{file}: {functions} PCI functions, {len(found.files)} files, {len(found.links)} links, "
        f"{payload['size_bytes']} bytes"
    )
    render.say(f"  open it anywhere: vfiotool --root {file} groups")


def probes() -> list[Callable[[Host], object]]:
    """What the reading commands read a host with: each is run once while a snapshot is taken."""
    return [_ask_for_tables, _ask_of_everything]


def _ask_for_tables(host: Host) -> None:
    from vfiotool.devices.iommu import read_groups
    from vfiotool.devices.mdev import read_mdev_types
    from vfiotool.devices.names import read_names

    read_names(host)
    read_groups(host)
    read_mdev_types(host)
    with suppress(VfiotoolError):
        no_groups(host)


def _ask_of_everything(host: Host) -> None:
    """`doctor`, `show` and `why` of everything, and the serial numbers that selectors compare."""
    from vfiotool.devices.inventory import read_inventory
    from vfiotool.devices.serial import serials_of
    from vfiotool.devices.show import read_shown
    from vfiotool.devices.sriov import read_eswitch_mode
    from vfiotool.doctor.examine import examine
    from vfiotool.usage.case import CaseReader

    inventory = read_inventory(host)
    examine(host, inventory)
    cases = CaseReader(host, inventory.by_address, inventory.by_group)
    devices = [function.address for function in inventory.functions]
    for device in (*devices, *(mdev.uuid for mdev in inventory.mdevs)):
        # One that vanishes meanwhile is no reason to lose the rest.
        with suppress(VfiotoolError):
            read_shown(host, device)
            cases.read(device, reasons=True)
        serials_of(host, device)
    for function in inventory.functions:
        if function.sriov is not None:
            with suppress(VfiotoolError):
                read_eswitch_mode(host, function.address)


def _diff(context: Context, before: str, after: str) -> None:
    from vfiotool.snapshot.diff import compare, load_any

    changes = compare(load_any(before), load_any(after))
    if render.state(context).json:
        render.emit({"changes": [change.as_json() for change in changes]})
        return
    for change in changes:
        for line in change.lines():
            print(render.escape(line))
