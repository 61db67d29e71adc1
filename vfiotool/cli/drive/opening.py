"""What the commands that drive a device share: how it is opened, regions and numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import host_of, uuid_of, wants_json
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.vfio import Device

# The PCI regions by the names that people use for them; lspci's "Region n" is BAR n.
REGION_NAMES = {**{f"bar{n}": n for n in range(6)}, "rom": 6, "config": 7, "vga": 8}

BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="auto, iommufd, type1; noiommu only when asked for; vfio-user of itself.",
        autocompletion=candidates.words("auto", "iommufd", "type1", "noiommu", "vfio-user"),
    ),
]
TraceOption = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Record every access there, as JSON lines; - for standard output, and text goes to "
        "standard error.",
        autocompletion=candidates.files,
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option("--vf-token", metavar="UUID", help="For a VF whose PF is driven from user space."),
]
RegionArgument = Annotated[
    str,
    typer.Argument(
        metavar="REGION",
        help="A number, or bar0 … bar5, rom, config, vga.",
        autocompletion=candidates.words(*REGION_NAMES),
    ),
]
OffsetArgument = Annotated[
    str, typer.Argument(metavar="OFFSET", help="In bytes: decimal, or hexadecimal with 0x.")
]
WidthOption = Annotated[int, typer.Option("--width", metavar="1|2|4|8", help="Bytes an access.")]


def driver_and_device(words: list[str]) -> tuple[str | None, str]:
    """What `[NAME] DEVICE` says: the driver's name as modules spell it, or None, and the device.
    Raises UsageError for more than two words."""
    if len(words) > 2:
        raise UsageError(f"{' '.join(words)[:80]!r}: at most a driver's name and a device")
    return (words[0].replace("-", "_") if len(words) == 2 else None), words[-1]


@contextmanager
def opened(
    context: typer.Context,
    name: str,
    backend: str,
    trace: str | None = None,
    vf_token: str | None = None,
) -> Iterator[Device]:
    """The device, opened for the time of the block, with its trace if one is wanted."""
    from vfiotool.devices.selector import resolve
    from vfiotool.vfio import SERVED, Device, Trace, backend_named

    host = host_of(context)
    if trace == "-" and wants_json(context):
        raise UsageError("--json and --trace - cannot both go to standard output")
    with ExitStack() as stack:
        record = None
        if trace is not None:
            try:
                file = sys.stdout if trace == "-" else open(trace, "w")  # noqa: SIM115
            except OSError as error:
                raise output.cannot("write", trace, error) from error
            if trace == "-":
                output.step_aside()
            else:
                stack.enter_context(file)
            record = Trace(file)
        # What a process serves is named by its socket, and is no device of the host's.
        served = name.startswith(SERVED)
        yield stack.enter_context(
            Device.open(
                name if served else resolve(host, name),
                backend=backend_named(backend),
                host=host_of(context),
                trace=record,
                vf_token=None if vf_token is None else uuid_of("--vf-token", vf_token),
            )
        )


def region_number(text: str) -> int:
    """A region by number or by name. Raises UsageError."""
    if text.lower() in REGION_NAMES:
        return REGION_NAMES[text.lower()]
    if not text.isdecimal() and not text.lower().startswith("0x"):
        names = ", ".join(REGION_NAMES)
        raise UsageError(f"{text[:80]!r} is not a region", hint=f"one of {names}, or a number")
    return number(text, "a region")


def number(text: str, what: str) -> int:
    """A number in decimal, or with 0x in hexadecimal. Raises UsageError."""
    try:
        value = int(text, 0)
    except ValueError:
        raise UsageError(
            f"{text[:80]!r} is not {what}: give a number, 0x for hexadecimal"
        ) from None
    if value < 0:
        raise UsageError(f"{text[:80]!r} is not {what}: it is negative")
    return value


@contextmanager
def seekable(path: str) -> Iterator[BinaryIO]:
    """A file that is read twice; what comes on standard input for `-` is kept meanwhile."""
    if path != "-":
        try:
            source = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise output.cannot("read", path, error) from error
        with source:
            yield source
        return
    from shutil import copyfileobj
    from tempfile import TemporaryFile

    with TemporaryFile() as kept:
        copyfileobj(sys.stdin.buffer, kept)
        kept.seek(0)
        yield kept
