"""`vfiotool devices`: PCI functions, with all that is known of each in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import SELECTORS, area, examples, host_of, wants_json
from vfiotool.devices.pci import Address, list_addresses
from vfiotool.errors import NotFound
from vfiotool.host.host import Host

app = area()


@app.command(
    "devices",
    epilog=examples(
        "vfiotool devices",
        "vfiotool devices class:network driver:nvme",
        "vfiotool devices net:eth0 group:12",
        "vfiotool devices --json | jq '.devices[] | select(.driver == null) | .address'",
    ),
)
def devices(
    context: typer.Context,
    selectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SELECTOR…", help=f"Only these. {SELECTORS}", autocompletion=candidates.devices
        ),
    ] = None,
) -> int:
    """List PCI devices: group, verdict, driver, interfaces and disks, serial number, name.

    Verdicts: ready (a virtual machine can open it now), available (bind makes it ready), blocked
    (why DEVICE says what stands against it). With --json: all that is known of each device.
    """
    return run_devices(host_of(context), selectors or [], as_json=wants_json(context))


def run_devices(host: Host, selectors: Sequence[str], as_json: bool) -> int:
    """Print the functions that the selectors name, or all, and return the exit code.

    Raises as `selector.resolve_all`; a selector that names several functions lists them all.
    """
    chosen = _select(host, selectors) if selectors else list_addresses(host)
    if as_json:
        _print_json(host, chosen)
    else:
        print_devices(host, chosen)
    return 0


def _select(host: Host, selectors: Sequence[str]) -> list[str]:
    """The functions that the selectors name, each once, in the order of the selectors."""
    from vfiotool.devices.selector import resolve_all

    found = [name for text in selectors for name in resolve_all(host, text)]
    for name in found:
        if not Address.is_address(name):
            hint = f"vfiotool show {name}"
            raise NotFound(f"{name} is not a PCI function", hint=hint, device=name)
    return list(dict.fromkeys(found))


def _print_json(host: Host, chosen: Sequence[str]) -> None:
    from vfiotool.devices.as_json import FunctionWriter
    from vfiotool.devices.details import DetailReader
    from vfiotool.devices.names import read_names
    from vfiotool.usage.standing import Standings, StandingWriter

    reader, writer = DetailReader(host), FunctionWriter(read_names(host))
    verdicts = StandingWriter()
    functions = reader.functions(chosen)
    standings = Standings(host, {function.address: function for function in functions})
    rows = (
        writer.text(function, reader.read(function), verdicts.text(standings.of(function)))
        for function in functions
    )
    output.emit_rows("devices", rows)


def print_devices(host: Host, chosen: Sequence[str]) -> None:
    """One line a function: where and what it is, its verdict, who has it, what hangs on it."""
    from vfiotool.cli.look.roles import STYLES, VERDICTS, say_unseen
    from vfiotool.devices.details import DetailReader
    from vfiotool.devices.iommu import role_of
    from vfiotool.devices.names import read_names
    from vfiotool.usage.standing import Standings

    names, reader = read_names(host), DetailReader(host)
    functions = reader.functions(chosen)
    standings = Standings(host, {function.address: function for function in functions})
    rows: list[list[output.Part]] = []
    for function in functions:
        details = reader.read(function)
        known = names.lookup(function.vendor, function.device, class_code=function.class_code)
        parts = (known.vendor, known.device or known.class_name)
        style = "" if function.driver is None else STYLES[role_of(function.driver)]
        # A bridge is not passed through; what is behind it is.
        verdict = "-" if function.is_bridge else standings.of(function).verdict
        rows.append(
            [
                function.address,
                f"{function.vendor}:{function.device}",
                "-" if function.iommu_group is None else str(function.iommu_group),
                (verdict, VERDICTS.get(verdict, "")),
                (function.driver or "-", style),
                ",".join([*details.interfaces, *details.disks]) or "-",
                details.serial or "-",
                " ".join(part for part in parts if part),
            ]
        )
    header = ["ADDRESS", "ID", "GROUP", "VERDICT", "DRIVER", "IF/DISK", "SERIAL", "NAME"]
    # A column that says nothing of any device takes the place of what does.
    for column in (6, 5):
        if all(row[column] == "-" for row in rows):
            del header[column]
            for row in rows:
                del row[column]
    output.table(header, rows)
    say_unseen(standings, "devices")
