"""`serve vhost-user-blk|exports`: this process is the device of virtual machines.

The conventions are those of QEMU's docs/interop/vhost-user.rst ("Backend program conventions"): one
of `--socket-path` and `--fd`, `--print-capabilities`, SIGTERM ends it with exit 0, no daemon.
"""

from __future__ import annotations

import json
import signal
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import output, serve_class, serve_model, serve_net, serve_vduse
from vfiotool.cli.context import area, examples, wants_json
from vfiotool.cli.serve_options import (
    POLL_US,
    BlockSizeOption,
    DirectOption,
    FileOption,
    LockOption,
    NvmeOption,
    OffsetOption,
    PhysicalOption,
    PollOption,
    QueuesOption,
    RamOption,
    ReadOnlyOption,
    SerialOption,
    SizeOption,
    ThreadsOption,
    check_threads,
    disk_of,
    take_descriptors,
)
from vfiotool.cli.serve_stats import StatsOption, check_stats, print_stats
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.virtio.exports import ExportSettings
    from vfiotool.virtio.server import Server

SocketOption = Annotated[
    str | None, typer.Option("--socket-path", metavar="PATH", help="Listen there.")
]
FdOption = Annotated[
    int | None,
    typer.Option("--fd", metavar="N", help="A socket to serve: connected, or listening."),
]
CapabilitiesOption = Annotated[
    bool, typer.Option("--print-capabilities", help="Print what this back end can do.")
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
ControlOption = Annotated[
    str | None,
    typer.Option("--control-path", metavar="PATH", help="The server's control socket."),
]

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
        "vfiotool serve vhost-user-blk --socket-path /run/vm1.sock --nvme 01:00.0/1",
    ),
)
def vhost_user_blk(
    socket_path: SocketOption = None,
    fd: FdOption = None,
    blk_file: FileOption = None,
    ram: RamOption = None,
    nvme: NvmeOption = None,
    read_only: ReadOnlyOption = False,
    offset: OffsetOption = "0",
    size: SizeOption = None,
    serial: SerialOption = "",
    block_size: BlockSizeOption = 512,
    physical_block_size: PhysicalOption = 0,
    queues: QueuesOption = 1,
    direct: DirectOption = False,
    lock: LockOption = "always",
    threads: ThreadsOption = 1,
    poll_us: PollOption = POLL_US,
    iops_limit: IopsOption = None,
    bandwidth_limit: BandwidthOption = None,
    burst: BurstOption = None,
    stats: StatsOption = None,
    print_capabilities: CapabilitiesOption = False,
) -> int:
    """Serve one disk over vhost-user until SIGTERM; the image is raw, its format never probed."""
    if print_capabilities:
        features = ["read-only", "blk-file"]
        output.text(json.dumps({"type": "block", "features": features}) + "\n")
        return 0
    from vfiotool.virtio.exports import ExportSettings, parse_rate

    if (socket_path is None) == (fd is None):
        raise UsageError("give one of --socket-path and --fd")
    check_stats(stats)
    disk = disk_of(
        blk_file,
        ram,
        read_only=read_only,
        offset=offset,
        size=size,
        serial=serial,
        block_size=block_size,
        physical_block_size=physical_block_size,
        queues=queues,
        direct=direct,
        lock=lock,
        nvme=nvme,
    )
    rate = parse_rate(iops_limit, bandwidth_limit, burst, dashes=True)
    settings = ExportSettings("disk", socket_path or "", disk, rate)
    with _server(threads, poll_us) as server:
        if fd is not None:
            _adopt(server, settings, fd)
        else:
            _add(server, settings)
        print_stats(server, stats)
        _serve(server)
    return 0


@app.command(
    "exports",
    epilog=examples(
        "vfiotool serve exports /etc/vfiotool/exports.toml",
        "vfiotool serve exports /etc/vfiotool/exports.toml --take-over",
    ),
)
def exports(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The exports file, in TOML.")],
    threads: ThreadsOption = 1,
    poll_us: PollOption = POLL_US,
    stats: StatsOption = None,
    control_path: ControlOption = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Replace the running server of FILE; its VMs see a short delay."
        ),
    ] = False,
) -> int:
    """Serve every disk of a file until SIGTERM; SIGHUP reads the file again.

    Exports that did not change go on undisturbed.
    """
    from vfiotool.virtio.control import control_path as usual_path
    from vfiotool.virtio.daemon import Daemon

    check_stats(stats)
    with _server(threads, poll_us) as server:
        daemon = Daemon(server, file, control_path or usual_path(file))
        signal.signal(signal.SIGHUP, lambda *_: server.soon(daemon.follow))
        try:
            if take_over:
                daemon.take_over()
            else:
                daemon.start()
            print_stats(server, stats)
            _serve(server)
        finally:
            daemon.close()
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


app.command(
    "vduse-blk",
    epilog=examples(
        "vfiotool serve vduse-blk disk0 --blk-file /srv/disk0.raw",
        "vfiotool serve vduse-blk vm1 --blk-file /srv/vm1.raw --attach vhost",
    ),
)(serve_vduse.vduse_blk)


@app.command(
    "status",
    epilog=examples("vfiotool serve status", "vfiotool serve status /etc/vfiotool/exports.toml"),
)
def status(
    context: typer.Context,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="An exports file; default: all servers.")
    ] = None,
    control_path: ControlOption = None,
) -> int:
    """Show what running servers serve: exports, clients, limits and counters."""
    from vfiotool.cli import serving

    return serving.show(file, control_path, as_json=wants_json(context))


@app.command(
    "limit",
    epilog=examples(
        "vfiotool serve limit /etc/vfiotool/exports.toml vm1 --iops-limit 5000 --weight 200",
        "vfiotool serve limit /etc/vfiotool/exports.toml --group tenant-a --bandwidth-limit 1G",
    ),
)
def limit(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The server's exports file.")],
    export: Annotated[
        str | None, typer.Argument(metavar="EXPORT", help="The export to limit.")
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="NAME", help="Limit a group instead.")
    ] = None,
    iops_limit: IopsOption = None,
    bandwidth_limit: BandwidthOption = None,
    burst: BurstOption = None,
    weight: Annotated[
        int, typer.Option("--weight", metavar="N", help="Against others: 1 to 10000.")
    ] = 100,
    control_path: ControlOption = None,
) -> int:
    """Change a running export's limits, until its file is read again; none given: no limit."""
    from vfiotool.cli import serving

    if (export is None) == (group is None):
        raise UsageError("give one of EXPORT and --group")
    asked: dict[str, object] = {"iops_limit": iops_limit, "bandwidth_limit": bandwidth_limit}
    asked |= {"burst": burst, "weight": weight, "export": export, "group": group}
    serving.ask_server(file, control_path, {"ask": "limit", **asked})
    return 0


@app.command("resize", epilog=examples("vfiotool serve resize /etc/vfiotool/exports.toml vm1"))
def resize(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The server's exports file.")],
    export: Annotated[str, typer.Argument(metavar="EXPORT", help="The export to look at.")],
    control_path: ControlOption = None,
) -> int:
    """Take an export's image as large as it is now, and tell its VM."""
    from vfiotool.cli import serving

    answer = serving.ask_server(file, control_path, {"ask": "resize", "export": export})
    output.write("resized" if answer.get("changed") else "unchanged")
    return 0


def _server(threads: int, poll_us: int) -> Server:
    from vfiotool.virtio.server import Server

    check_threads(threads, poll_us)
    take_descriptors()
    return Server(threads=threads, poll_us=poll_us, report=output.log)


def _add(server: Server, export: ExportSettings) -> None:
    from vfiotool.virtio.server import open_export

    server.add(open_export(export))
    server.limit(export.name, export.rate, export.weight, export.group)


def _adopt(server: Server, settings: ExportSettings, fd: int) -> None:
    from vfiotool.virtio.block import BlockDisk
    from vfiotool.virtio.server import Export

    try:
        given = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"--fd {fd}: not a socket: {error.strerror}") from error
    try:
        opened = BlockDisk(settings.disk)
    except BaseException:
        given.close()
        raise
    if given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        given.setblocking(False)
        server.add(Export(settings.name, opened, given))
    else:
        server.adopt(settings.name, opened, given)
    server.limit(settings.name, settings.rate, settings.weight, settings.group)


def _serve(server: Server) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
