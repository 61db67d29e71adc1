"""`nvme compare`, `copy`, `dsm`, `write-zeroes`, `verify`, `flush`, `report-zones`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import DeviceArgument, area, examples, wants_json
from vfiotool.cli.drive.nvme_opening import (
    BlocksOption,
    LbaOption,
    NamespaceOption,
    OverwriteOption,
    controlled,
    refuse_loss,
    show_done,
)
from vfiotool.cli.drive.opening import BackendOption, seekable
from vfiotool.errors import UsageError

app = area()


@app.command(
    "compare", epilog=examples("vfiotool nvme compare 05:01.0 --input blocks.bin --lba 2048")
)
def compare(
    context: typer.Context,
    device: DeviceArgument,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            "--data",
            "-d",
            metavar="FILE",
            help="What the blocks should hold; - for standard input.",
            autocompletion=candidates.files,
        ),
    ],
    lba: LbaOption = 0,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """Have the controller compare blocks with a file; the first that differ are named."""
    from vfiotool.drivers.nvme import blocks as nvme_blocks

    with seekable(source) as file, controlled(context, device, backend) as controller:
        disk = controller.namespace(nsid)
        disk.refuse_metadata()
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        count, rest = divmod(length, disk.block_bytes)
        if rest or not count or lba < 0 or lba + count > disk.blocks:
            raise UsageError(
                f"{source} has {length} bytes: not whole blocks of {disk.block_bytes}, or beyond "
                f"the {disk.blocks} blocks of the namespace"
            )
        queue, at = controller.create_queue(), lba
        step = controller.max_transfer // disk.block_bytes * disk.block_bytes
        while data := file.read(min(step, 65536 * disk.block_bytes)):
            nvme_blocks.compare(queue, disk, at, data)
            at += len(data) // disk.block_bytes
        show_done(context, controller.device.name, f"{count} blocks are the same", nsid=nsid)


def _numbers(text: str, option: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdecimal() for word in words):
        raise UsageError(f"{option} is numbers with commas between them, not {text[:40]!r}")
    return [int(word) for word in words]


@app.command(
    "copy",
    epilog=examples(
        "vfiotool nvme copy 05:01.0 --sdlba 4096 --slbs 0,512 --blocks 8,8 --overwrite"
    ),
)
def copy(
    context: typer.Context,
    device: DeviceArgument,
    to: Annotated[int, typer.Option("--sdlba", metavar="N", help="The first block to write.")],
    starts: Annotated[
        str, typer.Option("--slbs", "-s", metavar="N,…", help="First block of each range.")
    ],
    counts: Annotated[
        str, typer.Option("--blocks", "-b", metavar="N,…", help="How many, of each range.")
    ] = "1",
    nsid: NamespaceOption = 1,
    overwrite: OverwriteOption = False,
    backend: BackendOption = "auto",
) -> None:
    """Copy ranges of blocks one after the other to others, within the controller, and flush. What
    the others held is lost."""
    from vfiotool.drivers.nvme import blocks as nvme_blocks

    first, many = _numbers(starts, "--slbs"), _numbers(counts, "--blocks")
    if len(first) != len(many):
        raise UsageError(f"--slbs names {len(first)} ranges, --blocks {len(many)}")
    refuse_loss("copying onto blocks", device, overwrite)
    with controlled(context, device, backend) as controller:
        disk, queue = controller.namespace(nsid), controller.create_queue()
        nvme_blocks.copy(queue, disk, to, list(zip(first, many, strict=True)))
        queue.flush(disk)
        text = f"{sum(many)} blocks copied to {to} and on"
        show_done(context, controller.device.name, text, nsid=nsid)


@app.command(
    "dsm", epilog=examples("vfiotool nvme dsm 0000:05:01.0 --lba 0 --blocks 2048 --overwrite")
)
def dsm(
    context: typer.Context,
    device: DeviceArgument,
    lba: LbaOption = 0,
    blocks: BlocksOption = 1,
    nsid: NamespaceOption = 1,
    overwrite: OverwriteOption = False,
    backend: BackendOption = "auto",
) -> None:
    """Deallocate (trim) blocks. What they held is lost."""
    from vfiotool.drivers.nvme import blocks as nvme_blocks

    refuse_loss("trimming blocks", device, overwrite)
    with controlled(context, device, backend) as controller:
        disk = controller.namespace(nsid)
        nvme_blocks.trim(controller.create_queue(), disk, [(lba, blocks)])
        show_done(context, controller.device.name, f"{blocks} blocks deallocated", nsid=nsid)


@app.command(
    "write-zeroes",
    epilog=examples("vfiotool nvme write-zeroes 0000:05:01.0 --lba 0 --blocks 8 --overwrite"),
)
def write_zeroes(
    context: typer.Context,
    device: DeviceArgument,
    lba: LbaOption = 0,
    blocks: BlocksOption = 1,
    nsid: NamespaceOption = 1,
    overwrite: OverwriteOption = False,
    backend: BackendOption = "auto",
) -> None:
    """Write zeroes to blocks, without transfer. What they held is lost."""
    from vfiotool.drivers.nvme import blocks as nvme_blocks

    refuse_loss("writing zeroes", device, overwrite)
    with controlled(context, device, backend) as controller:
        disk = controller.namespace(nsid)
        nvme_blocks.write_zeroes(controller.create_queue(), disk, lba, blocks)
        show_done(context, controller.device.name, f"{blocks} blocks zeroed", nsid=nsid)


@app.command("verify", epilog=examples("vfiotool nvme verify 0000:05:01.0 --lba 0 --blocks 8"))
def verify(
    context: typer.Context,
    device: DeviceArgument,
    lba: LbaOption = 0,
    blocks: BlocksOption = 1,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """Have the controller check that blocks can be read."""
    from vfiotool.drivers.nvme import blocks as nvme_blocks

    with controlled(context, device, backend) as controller:
        disk = controller.namespace(nsid)
        nvme_blocks.verify(controller.create_queue(), disk, lba, blocks)
        show_done(context, controller.device.name, f"{blocks} blocks verified", nsid=nsid)


@app.command("flush", epilog=examples("vfiotool nvme flush 0000:05:01.0"))
def flush(
    context: typer.Context,
    device: DeviceArgument,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """Have what was written reach stable media."""
    with controlled(context, device, backend) as controller:
        controller.create_queue().flush(controller.namespace(nsid))
        show_done(context, controller.device.name, f"namespace {nsid} flushed", nsid=nsid)


@app.command("report-zones", epilog=examples("vfiotool nvme report-zones 0000:05:01.0 --nsid 1"))
def report_zones(
    context: typer.Context,
    device: DeviceArgument,
    lba: LbaOption = 0,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="At most so many.")] = 63,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """List the zones of a zoned namespace (nvme-cli: zns report-zones)."""
    from vfiotool.drivers.nvme import blocks as nvme_blocks

    if not 1 <= limit <= 4096:
        raise UsageError("--limit is from 1 to 4096")
    with controlled(context, device, backend) as controller:
        disk = controller.namespace(nsid)
        zones = nvme_blocks.report_zones(controller.create_queue(), disk, lba, limit)
        name = controller.device.name
    if wants_json(context):
        listed = [
            {"slba": z.start, "cap": z.capacity, "wp": z.write_pointer, "state": z.state}
            for z in zones
        ]
        output.emit({"device": name, "nsid": nsid, "zone_list": listed})
        return
    rows = [[str(z.start), str(z.capacity), str(z.write_pointer), z.state] for z in zones]
    output.table(("START", "CAPACITY", "POINTER", "STATE"), rows)
