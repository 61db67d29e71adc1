"""What the `nvme` commands share: the controller, and options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfiotool.cli import output
from vfiotool.cli.context import wants_json
from vfiotool.cli.drive.opening import opened
from vfiotool.errors import Refused

if TYPE_CHECKING:
    from vfiotool.drivers.nvme import Controller

NamespaceOption = Annotated[int, typer.Option("--nsid", metavar="N", help="The namespace.")]
LbaOption = Annotated[int, typer.Option("--lba", metavar="N", help="The first block.")]
BlocksOption = Annotated[int, typer.Option("--blocks", metavar="N", help="How many.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Let it destroy the data that is there.")
]


@contextmanager
def controlled(
    context: typer.Context, device: str, backend: str, *, shadow_doorbells: bool = False
) -> Iterator[Controller]:
    """The controller, brought up for the time of the block."""
    from vfiotool.drivers.nvme import Controller

    with (
        opened(context, device, backend) as opened_device,
        Controller(opened_device, shadow_doorbells=shadow_doorbells) as controller,
    ):
        yield controller


def refuse_loss(what: str, device: str, overwrite: bool) -> None:
    """Raises Refused for what destroys data, unless it is wanted."""
    if not overwrite:
        raise Refused(
            f"{what} destroys data on {device}",
            hint="add --overwrite if nothing there is needed",
            device=device,
        )


def show_done(context: typer.Context, name: str, text: str, **told: int | str | bool) -> None:
    """What was done, in words or as JSON with `told`."""
    if wants_json(context):
        output.emit({"device": name, "done": text, **told})
    else:
        output.say(f"{name}: {text}")


def show_fields(context: typer.Context, name: str, fields: dict[str, Any]) -> None:
    """Fields under nvme-cli's names: one object, or a line each."""
    if wants_json(context):
        output.emit({"device": name, **fields})
        return
    width = max(map(len, fields), default=0)
    for key, value in fields.items():
        output.write(f"{key:<{width}} : {value}")
