"""`device frame`: what a display device shows, as a PNG file."""

from __future__ import annotations

from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import DeviceArgument, examples, wants_json
from vfiotool.cli.drive.opening import BackendOption, opened
from vfiotool.errors import UsageError


def add_to(app: typer.Typer) -> None:
    """Add `frame` to the commands of `device`."""
    app.command(
        "frame",
        epilog=examples(
            "vfiotool device frame 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 --output screen.png"
        ),
    )(frame)


def frame(
    context: typer.Context,
    device: DeviceArgument,
    file: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FILE",
            help="A PNG file; - for standard output.",
            autocompletion=candidates.files,
        ),
    ],
    pattern: Annotated[
        bool, typer.Option("--pattern", help="Set the mode and draw a test picture first.")
    ] = False,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="WxH", help="For --pattern on mbochs.")
    ] = None,
    backend: BackendOption = "auto",
) -> None:
    """Save the picture that a display device (mbochs, mdpy) shows."""
    from vfiotool.drivers import display

    if file == "-" and wants_json(context):
        raise UsageError("--json and the picture cannot both go to standard output")
    size = None
    if mode is not None:
        parts = mode.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UsageError(f"{mode[:40]!r} is not a mode: write it as 1024x768")
        size = int(parts[0]), int(parts[1])
    with opened(context, device, backend) as opened_device:
        shown = display.open_display(opened_device)
        drawn = display.show_pattern(shown, size) if pattern else None
        plane, pixels = shown.frame()
        name = opened_device.name
    with output.opened(file) as sink:
        sink.write(display.png(plane, pixels))
    if wants_json(context):
        output.emit(
            {
                "device": name,
                "file": file,
                "width": plane.width,
                "height": plane.height,
                "format": plane.format,
                "kind": plane.kind,
                "equals_pattern": None if drawn is None else pixels == drawn,
            }
        )
    else:
        output.say(f"{plane.width}x{plane.height} saved to {file}")
