"""`groups`, `devices`, `show`, `why`: what an operator asks before passing a device through."""

from __future__ import annotations

from typing import Annotated

import typer

from vfiotool.cli import render
from vfiotool.cli.groups import run_groups
from vfiotool.errors import NotFound
from vfiotool.host import Host
from vfiotool.inventory_json import function_as_json
from vfiotool.iommu import group_as_json, read_group
from vfiotool.names import Names, read_names
from vfiotool.pci import Address, PciFunction, list_addresses, read_function, read_functions

_Device = Annotated[str, typer.Argument(metavar="DEVICE", help="An address such as 0000:05:01.0.")]


def register(app: typer.Typer) -> None:
    """Add this area's commands."""
    app.command(help="List IOMMU groups: domain, verdict, members with their roles.")(groups)
    app.command(help="List PCI functions with all that the host tells of them.")(devices)
    app.command(help="Show everything about one device.")(show)


def groups(
    context: typer.Context,
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID", help="Only these.")] = None,
) -> int:
    return run_groups(render.host(context), ids or [], as_json=render.state(context).json)


def devices(
    context: typer.Context,
    selectors: Annotated[
        list[str] | None, typer.Argument(metavar="SELECTOR", help="Only these.")
    ] = None,
) -> int:
    host = render.host(context)
    wanted = [resolve(host, text) for text in selectors or []]
    functions = read_functions(host, wanted or list_addresses(host))
    for address in set(wanted) - {function.address for function in functions}:
        raise not_found(address)
    names = read_names(host)
    if render.state(context).json:
        render.emit({"devices": [function_as_json(function, names) for function in functions]})
    else:
        _print_devices(functions, names)
    return 0


def show(context: typer.Context, device: _Device) -> int:
    host = render.host(context)
    address = resolve(host, device)
    function = read_function(host, address)
    if function is None:
        raise not_found(address)
    names = read_names(host)
    number = function.iommu_group
    group = None if number is None else read_group(host, number)
    payload: dict[str, object] = {
        **function_as_json(function, names),
        "group": None if group is None else group_as_json(group),
    }
    if render.state(context).json:
        render.emit(payload)
    return 0


def resolve(host: Host, text: str) -> str:
    """The canonical address of the one device that a selector names."""
    return str(Address.parse(text))


def not_found(address: str) -> NotFound:
    return NotFound(
        f"no PCI function {address}", hint="vfiotool devices lists them", device=address
    )


def _print_devices(functions: tuple[PciFunction, ...], names: Names) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("ADDRESS", "ID", "GROUP", "DRIVER", "NAME"):
        table.add_column(title, overflow="fold" if title == "NAME" else "ellipsis", no_wrap=True)
    for function in functions:
        known = names.lookup(function.vendor, function.device, class_code=function.class_code)
        table.add_row(
            function.address,
            f"{function.vendor}:{function.device}",
            "-" if function.iommu_group is None else str(function.iommu_group),
            render.escape(function.driver or "-"),
            render.escape(known.device or known.class_name or ""),
        )
    render.console().print(table)
