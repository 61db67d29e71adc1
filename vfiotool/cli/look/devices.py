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
        "vfiotool devices net:eth0 id:10de:2684",
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
    """List PCI devices: address, id, IOMMU group, driver, name."""
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
    from vfiotool.usage.standing import Standings

    reader, writer, standings = (
        DetailReader(host),
        FunctionWriter(read_names(host)),
        Standings(host),
    )
    rows = (
        writer.text(function, details, standings.of(function).as_json())
        for function, details in reader.read_all(chosen)
    )
    output.emit_rows("devices", rows)


def print_devices(host: Host, chosen: Sequence[str]) -> None:
    """One line a function: where it is, what it is, who has it."""
    from vfiotool.cli.look.roles import STYLES
    from vfiotool.devices.iommu import role_of
    from vfiotool.devices.names import read_names
    from vfiotool.devices.pci import read_functions

    names = read_names(host)
    rows: list[list[output.Part]] = []
    for function in read_functions(host, chosen, links=False):
        known = names.lookup(function.vendor, function.device, class_code=function.class_code)
        parts = (known.vendor, known.device or known.class_name)
        style = "" if function.driver is None else STYLES[role_of(function.driver)]
        rows.append(
            [
                function.address,
                f"{function.vendor or '????'}:{function.device or '????'}",
                "-" if function.iommu_group is None else str(function.iommu_group),
                (function.driver or "-", style),
                " ".join(part for part in parts if part),
            ]
        )
    output.table(("ADDRESS", "ID", "GROUP", "DRIVER", "NAME"), rows)
