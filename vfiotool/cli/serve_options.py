"""The options by which every command of `serve` names a disk and its threads."""

from __future__ import annotations

import resource
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.virtio.block import DiskSettings

FileOption = Annotated[
    str | None, typer.Option("--blk-file", metavar="PATH", help="A raw image or block device.")
]
RamOption = Annotated[
    str | None, typer.Option("--ram", metavar="SIZE", help="A disk in memory, as 512M or 4G.")
]
NvmeOption = Annotated[
    str | None,
    typer.Option(
        "--nvme",
        metavar="ADDRESS[/NSID]",
        help="A namespace of an NVMe disk on a VFIO driver; 1 if none is said.",
    ),
]
ReadOnlyOption = Annotated[bool, typer.Option("--read-only", help="Refuse writes.")]
OffsetOption = Annotated[
    str, typer.Option("--offset", metavar="BYTES", help="Where the disk begins there.")
]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="BYTES", help="Serve so much of it.")
]
SerialOption = Annotated[str, typer.Option("--serial", metavar="TEXT", help="At most 20 bytes.")]
BlockSizeOption = Annotated[int, typer.Option("--block-size", metavar="BYTES", help="512 to 4096.")]
PhysicalOption = Annotated[
    int,
    typer.Option(
        "--physical-block-size",
        metavar="BYTES",
        help="What writes should come in multiples of, up to 65536; default: the block size.",
        show_default=False,
    ),
]
QueuesOption = Annotated[int, typer.Option("--queues", metavar="N", help="Virtqueues.")]
DirectOption = Annotated[
    bool, typer.Option("--direct", help="Read and write the file past the page cache.")
]
LockOption = Annotated[
    str,
    typer.Option(
        "--lock",
        metavar="WHEN",
        help="Lock the file always, or only while a machine is running, so that it can move"
        " to another server.",
    ),
]
ThreadsOption = Annotated[int, typer.Option("--threads", metavar="N", help="Worker threads.")]
PollOption = Annotated[
    int,
    typer.Option(
        "--poll-us",
        metavar="US",
        help="How long a worker looks at idle rings before it sleeps, at most; 0: not at all.",
    ),
]
# Longer than it takes to wake another processor of a virtual machine (up to some 40 us, seen).
POLL_US = 50
_MOST_THREADS, _LONGEST_POLL_US = 64, 1_000_000


def disk_of(
    blk_file: str | None,
    ram: str | None,
    *,
    read_only: bool,
    offset: str,
    size: str | None,
    serial: str,
    block_size: int,
    physical_block_size: int = 0,
    queues: int,
    direct: bool,
    lock: str = "always",
    nvme: str | None = None,
) -> DiskSettings:
    """The disk that the options name. Raises UsageError naming the option at fault."""
    from vfiotool.virtio.block import DiskSettings
    from vfiotool.virtio.exports import parse_size

    if sum(given is not None for given in (blk_file, ram, nvme)) != 1:
        raise UsageError("give one of --blk-file, --ram and --nvme")
    if ram is not None and (size is not None or offset != "0"):
        raise UsageError("--offset and --size are of --blk-file and --nvme, not of --ram")
    wanted = ram if ram is not None else size
    return DiskSettings(
        path=blk_file,
        nvme=nvme,
        size=None if wanted is None else parse_size(wanted, "--ram" if ram else "--size"),
        offset=parse_size(offset, "--offset"),
        read_only=read_only,
        serial=serial,
        block_size=block_size,
        physical_block_size=physical_block_size,
        queues=queues,
        direct=direct,
        lock=lock,
    )


def check_threads(threads: int, poll_us: int) -> None:
    """Raise UsageError for what no server can have."""
    if not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"--threads {threads}: not from 1 to {_MOST_THREADS}")
    if not 0 <= poll_us <= _LONGEST_POLL_US:
        raise UsageError(f"--poll-us {poll_us}: not from 0 to {_LONGEST_POLL_US}")


def take_descriptors() -> None:
    """Have as many files open as this process may: each machine brings some, and the limit that
    programs begin with is low for the sake of those that use select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
