"""`groups`, `devices`, `show`, `why`: what an operator asks before passing a device through."""

from __future__ import annotations

from typing import Annotated

from vfiotool.cli import output as render
from vfiotool.cli.declare import Argument, Commands, Context
from vfiotool.cli.look.devices import run_devices
from vfiotool.cli.look.groups import run_groups
from vfiotool.host.host import Host

_Device = Annotated[
    str,
    Argument(
        metavar="DEVICE", help="An address, id:…, serial:…, slot:…, path:…, vf:…, net:… or block:…"
    ),
]


def register(app: Commands) -> None:
    """Add this area's commands."""
    app.command(help="List IOMMU groups: domain, verdict, members with their roles.")(groups)
    app.command(help="List PCI functions with all that the host tells of them.")(devices)
    app.command(help="Show everything about one device.")(show)
    app.command(help="Can it be passed through; why not; what to type next.")(why)


def groups(
    context: Context,
    ids: Annotated[list[int] | None, Argument(metavar="ID", help="Only these.")] = None,
) -> int:
    return run_groups(render.host(context), ids or [], as_json=render.state(context).json)


def devices(
    context: Context,
    selectors: Annotated[
        list[str] | None, Argument(metavar="SELECTOR", help="Only what these name.")
    ] = None,
) -> int:
    return run_devices(render.host(context), selectors or [], as_json=render.state(context).json)


def show(context: Context, device: _Device) -> int:
    from vfiotool.devices.show import read_shown, shown_as_json
    from vfiotool.usage.standing import Standings

    host = render.host(context)
    name = _resolve(host, device)
    shown = read_shown(host, name)
    if render.state(context).json:
        render.emit({**shown_as_json(shown), **Standings(host).named(name).as_json()})
    else:
        from vfiotool.cli.look.show import print_shown

        print_shown(shown)
    return 0


def why(context: Context, device: _Device) -> int:
    from vfiotool.usage.case import read_case
    from vfiotool.usage.verdict import explain

    host = render.host(context)
    verdict = explain(read_case(host, _resolve(host, device), reasons=True))
    if render.state(context).json:
        render.emit(verdict.as_json())
    else:
        from vfiotool.cli.look.show import print_verdict

        print_verdict(verdict)
    return 0 if verdict.passable else 1


def _resolve(host: Host, text: str) -> str:
    from vfiotool.devices.selector import resolve

    return resolve(host, text)
