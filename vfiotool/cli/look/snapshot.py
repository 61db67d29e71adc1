"""`vfiotool snapshot FILE` and `vfiotool snapshot diff A B`."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import area, examples, host_of, wants_json
from vfiotool.cli.look.groups import no_groups
from vfiotool.errors import UsageError, VfiotoolError
from vfiotool.host.host import Host

app = area()


@app.command(
    "snapshot",
    epilog=examples(
        "vfiotool snapshot host.gz",
        "vfiotool snapshot --anonymize host.txt",
        "vfiotool snapshot - | ssh other 'cat > host.gz'",
        "vfiotool --root host.gz groups",
        "vfiotool snapshot diff before.gz after.gz",
    ),
)
def snapshot(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Where to write, - for standard output; or the word diff, then two snapshots.",
            autocompletion=candidates.files,
        ),
    ],
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A B",
            help="With diff: two snapshots, or roots.",
            autocompletion=candidates.files,
        ),
    ] = None,
    anonymize: Annotated[
        bool,
        typer.Option(
            "--anonymize", help="Replace serial numbers, MACs, host names, UUIDs, IP addresses."
        ),
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="With diff: every file that differs, counters too.")
    ] = False,
    machine: Annotated[
        str | None, typer.Option(metavar="NAME", help="The machine's name, for the header.")
    ] = None,
    date: Annotated[
        bool,
        typer.Option(help="Note the time of capture; without it, captures are reproducible."),
    ] = True,
) -> int:
    """Save this host in one file that --root opens anywhere; or compare two.

    FILE ending in .txt is plain, diffable text; .xz and everything else is packed.
    """
    if file == "diff":
        if others is None or len(others) != 2:
            raise UsageError(
                "snapshot diff takes two snapshots", hint="vfiotool snapshot diff BEFORE AFTER"
            )
        return _diff(context, *others, raw=raw)
    if others:
        raise UsageError("snapshot takes one file", hint="vfiotool snapshot FILE")
    if file == "-" and wants_json(context):
        raise UsageError("--json and the snapshot cannot both go to standard output")
    header = {} if machine is None else {"machine": machine}
    if date:
        now = datetime.datetime.now(datetime.UTC)
        header["taken"] = now.isoformat(timespec="seconds")
    return _capture(context, file, header, anonymize=anonymize)


def _capture(context: typer.Context, file: str, header: dict[str, str], *, anonymize: bool) -> int:
    from vfiotool.snapshot.capture import capture, save

    found = capture(host_of(context), probes(), header=header)
    if anonymize:
        from vfiotool.snapshot.anonymize import anonymized

        found = anonymized(found)
    functions = sum(name.endswith("/config") for name in found.files)
    if file == "-":
        import gzip

        from vfiotool.snapshot.text import format_snapshot

        with output.opened("-") as stream:
            stream.write(gzip.compress(format_snapshot(found).encode(), mtime=0))
        return 0
    save(found, file)
    payload: dict[str, object] = {
        "file": file,
        "size_bytes": os.path.getsize(file),
        "files": len(found.files),
        "links": len(found.links),
        "functions": functions,
        "anonymized": anonymize,
    }
    if wants_json(context):
        output.emit(payload)
        return 0
    output.say(
        f"{file}: {functions} PCI functions, {len(found.files)} files, {len(found.links)} links, "
        f"{payload['size_bytes']} bytes"
    )
    output.say(f"  open it anywhere: vfiotool --root {file} groups")
    return 0


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
    """`doctor`, `show`, `why`, `vm check` of everything; serial numbers that selectors compare."""
    from vfiotool.devices.inventory import read_inventory
    from vfiotool.devices.serial import serials_of
    from vfiotool.devices.show import read_shown
    from vfiotool.devices.sriov import read_eswitch_mode
    from vfiotool.doctor.examine import examine
    from vfiotool.usage.case import CaseReader
    from vfiotool.vm.facts import read_machine

    inventory = read_inventory(host)
    examine(host, inventory)
    read_machine(host)
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


def _diff(context: typer.Context, before: str, after: str, *, raw: bool) -> int:
    from vfiotool.snapshot.devices import differences
    from vfiotool.snapshot.diff import compare, load_any

    old, new = load_any(before), load_any(after)
    found = differences(old, new)
    changes = compare(old, new, volatile=raw)
    if wants_json(context):
        told = [difference.as_json() for difference in found]
        output.emit({"differences": told, "changes": [change.as_json() for change in changes]})
        return 1 if found or changes else 0
    for difference in found:
        output.write(difference.line())
    if raw:
        for change in changes:
            for line in change.lines():
                output.write(line)
    elif changes:
        output.write(f"{len(changes)} files differ besides what changes by itself: --raw shows all")
    return 1 if found or changes else 0
