"""`serve vhost-user-blk|exports`: this process is the device of virtual machines.

The conventions are those of QEMU's docs/interop/vhost-user.rst ("Backend program conventions"): one
of `--socket-path` and `--fd`, `--print-capabilities`, SIGTERM ends it with exit 0, no daemon.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import output, serve_class, serve_model, serve_net
from vfiotool.cli.context import area, examples
from vfiotool.errors import UsageError, VfiotoolError, from_oserror

if TYPE_CHECKING:
    from vfiotool.virtio.exports import ExportSettings, ExportsFile
    from vfiotool.virtio.server import Server

SocketOption = Annotated[
    str | None, typer.Option("--socket-path", metavar="PATH", help="Listen there.")
]
FdOption = Annotated[
    int | None, typer.Option("--fd", metavar="N", help="A connected socket to serve.")
]
FileOption = Annotated[
    str | None, typer.Option("--blk-file", metavar="PATH", help="A raw image or block device.")
]
RamOption = Annotated[
    str | None, typer.Option("--ram", metavar="SIZE", help="A disk in memory, as 512M or 4G.")
]
ReadOnlyOption = Annotated[bool, typer.Option("--read-only", help="Refuse writes.")]
OffsetOption = Annotated[
    str, typer.Option("--offset", metavar="BYTES", help="Where the disk begins in the file.")
]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="BYTES", help="Of the file, serve so much.")
]
SerialOption = Annotated[str, typer.Option("--serial", metavar="TEXT", help="At most 20 bytes.")]
BlockSizeOption = Annotated[int, typer.Option("--block-size", metavar="BYTES", help="512 to 4096.")]
QueuesOption = Annotated[int, typer.Option("--queues", metavar="N", help="Virtqueues.")]
DirectOption = Annotated[
    bool, typer.Option("--direct", help="Read and write the file past the page cache.")
]
CapabilitiesOption = Annotated[
    bool, typer.Option("--print-capabilities", help="Print what this back end can do.")
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
IopsOption = Annotated[
    int | None, typer.Option("--iops-limit", metavar="N", help="Requests a second, at most.")
]
BandwidthOption = Annotated[
    str | None, typer.Option("--bandwidth-limit", metavar="BYTES", help="Bytes a second, at most.")
]
BurstOption = Annotated[
    float | None,
    typer.Option("--burst", metavar="S", help="Seconds of the limits to save up; default: 0.05."),
]
_MOST_THREADS, _LONGEST_POLL_US, _LARGEST_FILE = 64, 1_000_000, 1 << 20

app = area("Serve virtio disks to VMs over vhost-user, with this process as the device.")
app.command(
    "vfio-user",
    epilog=examples(
        "vfiotool serve vfio-user edu --socket-path /run/edu.sock",
        "vfiotool serve vfio-user ./card.py:Card --socket-path /run/card.sock --fault slow",
    ),
)(serve_model.vfio_user)


@app.command(
    "vhost-user-blk",
    epilog=examples(
        "vfiotool serve vhost-user-blk --socket-path /run/vm1.sock --blk-file /srv/vm1.raw",
        "vfiotool serve vhost-user-blk --socket-path /run/scratch.sock --ram 4G --queues 4",
    ),
)
def vhost_user_blk(
    socket_path: SocketOption = None,
    fd: FdOption = None,
    blk_file: FileOption = None,
    ram: RamOption = None,
    read_only: ReadOnlyOption = False,
    offset: OffsetOption = "0",
    size: SizeOption = None,
    serial: SerialOption = "",
    block_size: BlockSizeOption = 512,
    queues: QueuesOption = 1,
    direct: DirectOption = False,
    threads: ThreadsOption = 1,
    poll_us: PollOption = 0,
    iops_limit: IopsOption = None,
    bandwidth_limit: BandwidthOption = None,
    burst: BurstOption = None,
    print_capabilities: CapabilitiesOption = False,
) -> int:
    """Serve one disk over vhost-user until SIGTERM; the image is raw, its format never probed."""
    if print_capabilities:
        features = ["read-only", "blk-file"]
        output.text(json.dumps({"type": "block", "features": features}) + "\n")
        return 0
    from vfiotool.virtio.block import DiskSettings
    from vfiotool.virtio.exports import ExportSettings, parse_rate, parse_size

    if (socket_path is None) == (fd is None):
        raise UsageError("give one of --socket-path and --fd")
    if (blk_file is None) == (ram is None):
        raise UsageError("give one of --blk-file and --ram")
    if ram is not None and (size is not None or offset != "0"):
        raise UsageError("--offset and --size are of --blk-file, not of --ram")
    wanted = ram if ram is not None else size
    disk = DiskSettings(
        path=blk_file,
        size=None if wanted is None else parse_size(wanted, "--ram" if ram else "--size"),
        offset=parse_size(offset, "--offset"),
        read_only=read_only,
        serial=serial,
        block_size=block_size,
        queues=queues,
        direct=direct,
    )
    rate = parse_rate(iops_limit, bandwidth_limit, burst, dashes=True)
    settings = ExportSettings("disk", socket_path or "", disk, rate)
    with _server(threads, poll_us) as server:
        if fd is not None:
            _adopt(server, settings, fd)
        else:
            _add(server, settings)
        _serve(server)
    return 0


@app.command("exports", epilog=examples("vfiotool serve exports /etc/vfiotool/exports.toml"))
def exports(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The exports file, in TOML.")],
    threads: ThreadsOption = 1,
    poll_us: PollOption = 0,
) -> int:
    """Serve every disk of a file until SIGTERM; SIGHUP reads the file again.

    Exports that did not change go on undisturbed.
    """
    wanted = _read(file)
    present = {export.name: export for export in wanted.exports}
    with _server(threads, poll_us) as server:
        server.limit_groups(wanted.groups)
        for export in present.values():
            _add(server, export)
        signal.signal(signal.SIGHUP, lambda *_: server.soon(lambda: _follow(server, present, file)))
        _serve(server)
    return 0


app.command(
    "vhost-user",
    epilog=examples(
        "vfiotool serve vhost-user ./dice.py:Dice --socket-path /run/dice.sock",
        "vfiotool serve vhost-user mymodule:Sensor --socket-path /run/sensor.sock",
    ),
)(serve_class.vhost_user)
app.command(
    "vhost-user-net",
    epilog=examples(
        "vfiotool serve vhost-user-net --socket-path /run/vm1.net --socket-path /run/vm2.net",
        "vfiotool serve vhost-user-net --socket-path /run/vm1.net --tap tap0 --rate-limit 100M",
    ),
)(serve_net.vhost_user_net)


def _read(file: str) -> ExportsFile:
    from vfiotool.virtio.exports import parse_exports

    try:
        # Non-blocking, so that a FIFO is not waited for.
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(opened, "rb") as source:
            text = source.read(_LARGEST_FILE).decode("utf-8", "replace")
    except OSError as error:
        raise from_oserror(f"read {file}", error) from error
    return parse_exports(text, file)


def _follow(server: Server, present: dict[str, ExportSettings], file: str) -> None:
    """Make what is served what the file says; a file with a fault changes nothing."""
    try:
        read = _read(file)
    except VfiotoolError as error:
        output.warn(f"{file} is not followed: {error.message}")
        return
    wanted = {export.name: export for export in read.exports}
    server.limit_groups(read.groups)
    for name, old in list(present.items()):
        if name not in wanted or not wanted[name].is_disk_of(old):
            server.remove(name)
            del present[name]
    for name, export in wanted.items():
        if name in present:
            server.limit(name, export.rate, export.weight, export.group)
            present[name] = export
            continue
        try:
            _add(server, export)
        except VfiotoolError as error:
            output.warn(f"{name} is not served: {error.message}")
        else:
            present[name] = export


def _server(threads: int, poll_us: int) -> Server:
    from vfiotool.virtio.server import Server

    if not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"--threads {threads}: not from 1 to {_MOST_THREADS}")
    if not 0 <= poll_us <= _LONGEST_POLL_US:
        raise UsageError(f"--poll-us {poll_us}: not from 0 to {_LONGEST_POLL_US}")
    return Server(threads=threads, poll_us=poll_us, report=output.warn)


def _add(server: Server, export: ExportSettings) -> None:
    from vfiotool.virtio.server import open_export

    server.add(open_export(export))
    server.limit(export.name, export.rate, export.weight, export.group)


def _adopt(server: Server, settings: ExportSettings, fd: int) -> None:
    from vfiotool.virtio.block import BlockDisk

    try:
        connection = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"--fd {fd}: not a connected socket: {error.strerror}") from error
    try:
        opened = BlockDisk(settings.disk)
    except BaseException:
        connection.close()
        raise
    server.adopt(settings.name, opened, connection)
    server.limit(settings.name, settings.rate, settings.weight, settings.group)


def _serve(server: Server) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
