"""`device frame`: what a display device shows, as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.cli.output import emit, host, say, state
from vfiotool.errors import UsageError


def register_frame(group: Commands) -> None:
    """Add `frame` to the group of `device` commands."""
    group.command("frame")(frame)


def frame(
    context: Context,
    device: Annotated[str, Argument(metavar="DEVICE", help="The UUID of the mdev.")],
    output: Annotated[Path, Option("--output", metavar="FILE", help="A PNG file.")],
    pattern: Annotated[
        bool, Option("--pattern", help="Set the mode and draw a test picture first.")
    ] = False,
    mode: Annotated[
        str | None, Option("--mode", metavar="WxH", help="For --pattern on mbochs.")
    ] = None,
    backend: Annotated[str, Option("--backend", metavar="NAME")] = "auto",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Save the picture that a display device (mbochs, mdpy) shows."""
    from vfiotool.drivers import display
    from vfiotool.vfio import Device

    size = None
    if mode is not None:
        parts = mode.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UsageError(f"{mode[:40]!r} is no mode: write it as 1024x768")
        size = int(parts[0]), int(parts[1])
    with Device.open(device, backend=backend, host=host(context)) as opened:
        shown = display.open_display(opened)
        drawn = display.show_pattern(shown, size) if pattern else None
        plane, pixels = shown.frame()
        name = opened.name
    try:
        output.write_bytes(display.png(plane, pixels))
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    if as_json or state(context).json:
        emit(
            {
                "device": name,
                "file": str(output),
                "width": plane.width,
                "height": plane.height,
                "format": plane.format,
                "kind": plane.kind,
                "equals_pattern": None if drawn is None else pixels == drawn,
            }
        )
    else:
        say(f"{plane.width}x{plane.height} saved to {output}")
