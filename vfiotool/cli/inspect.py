"""`groups`, `devices`, `show`, `why`: what an operator asks before passing a device through."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from vfiotool.cli import render
from vfiotool.cli.groups import run_groups
from vfiotool.errors import NotFound
from vfiotool.host import Host
from vfiotool.pci import Address

_Device = Annotated[
    str,
    typer.Argument(
        metavar="DEVICE", help="An address, id:…, serial:…, slot:…, path:…, vf:…, net:… or block:…"
    ),
]


def register(app: typer.Typer) -> None:
    """Add this area's commands."""
    app.command(help="List IOMMU groups: domain, verdict, members with their roles.")(groups)
    app.command(help="List PCI functions with all that the host tells of them.")(devices)
    app.command(help="Show everything about one device.")(show)
    app.command(help="Can it be passed through; why not; what to type next.")(why)


def groups(
    context: typer.Context,
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID", help="Only these.")] = None,
) -> int:
    return run_groups(render.host(context), ids or [], as_json=render.state(context).json)


def devices(
    context: typer.Context,
    selectors: Annotated[
        list[str] | None, typer.Argument(metavar="SELECTOR", help="Only what these name.")
    ] = None,
) -> int:
    host = render.host(context)
    chosen = None if not selectors else _select(host, selectors)
    if render.state(context).json:
        _print_json(host, chosen)
    else:
        from vfiotool.cli.inspect_text import print_devices

        print_devices(host, chosen)
    return 0


def show(context: typer.Context, device: _Device) -> int:
    from vfiotool.inventory_show import read_shown, shown_as_json

    host = render.host(context)
    shown = read_shown(host, _resolve(host, device))
    if render.state(context).json:
        render.emit(shown_as_json(shown))
    else:
        from vfiotool.cli.inspect_text import print_shown

        print_shown(shown)
    return 0


def why(context: typer.Context, device: _Device) -> int:
    from vfiotool.inventory import read_inventory
    from vfiotool.verdict import explain

    host = render.host(context)
    verdict = explain(host, read_inventory(host), _resolve(host, device))
    if render.state(context).json:
        render.emit(verdict.as_json())
    else:
        from vfiotool.cli.inspect_text import print_verdict

        print_verdict(verdict)
    return 0 if verdict.passable else 1


def _resolve(host: Host, text: str) -> str:
    from vfiotool.selector import resolve

    return resolve(host, text)


def _select(host: Host, selectors: list[str]) -> list[str]:
    """The PCI functions that the selectors name, each once, in the order of the selectors."""
    from vfiotool.selector import resolve_all

    found = [name for text in selectors for name in resolve_all(host, text)]
    for name in found:
        if not Address.is_address(name):
            raise NotFound(f"{name} is no PCI function", hint=f"vfiotool show {name}", device=name)
    return list(dict.fromkeys(found))


def _print_json(host: Host, chosen: list[str] | None) -> None:
    """The contract's `devices` object, one function a line: `jq` and `diff` both like that."""
    sys.stdout.write(f'{{"format_version": "{render.FORMAT_VERSION}", "devices": [')
    separator = "\n"
    for line in _json_lines(host, chosen):
        sys.stdout.write(separator + line)
        separator = ",\n"
    sys.stdout.write("\n]}\n")


def _json_lines(host: Host, chosen: list[str] | None) -> Iterator[str]:
    from json import JSONEncoder

    from vfiotool.inventory_details import DetailReader
    from vfiotool.inventory_json import function_as_json
    from vfiotool.names import read_names
    from vfiotool.pci import list_addresses, read_functions

    encode = JSONEncoder().encode
    names, reader = read_names(host), DetailReader(host)
    for function in read_functions(host, list_addresses(host) if chosen is None else chosen):
        yield encode(function_as_json(function, reader.read(function), names))
