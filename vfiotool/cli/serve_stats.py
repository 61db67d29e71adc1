"""`--stats` of `serve vhost-user-blk` and `serve exports`: what each disk does, again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import output
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.virtio.server import Server
    from vfiotool.virtio.stats import ExportRates

StatsOption = Annotated[
    float | None,
    typer.Option("--stats", metavar="S", help="Print what each disk does, every S seconds."),
]
_SHORTEST_S, _LONGEST_S = 0.1, 86_400.0


def check_stats(seconds: float | None) -> None:
    """Raise UsageError for what is no time to print after."""
    if seconds is not None and not _SHORTEST_S <= seconds <= _LONGEST_S:
        raise UsageError(f"--stats {seconds:g}: not from {_SHORTEST_S:g} to {_LONGEST_S:g} seconds")


def print_stats(server: Server, seconds: float | None) -> None:
    """Print a line for each disk every so many seconds, while the server runs. The machines that it
    serves do not wait for a reader, and outlive one that goes."""
    if seconds is None:
        return
    from vfiotool.virtio.stats import Stats

    stats = Stats(server)

    gone = False

    def show() -> None:
        nonlocal gone
        try:
            for one in stats.take():
                if gone or not output.offer(as_line(one)):
                    break
        except OSError as error:
            gone = True
            server.report(f"--stats: standard output cannot be written: {error.strerror}")

    server.every(seconds, show)


def as_line(one: ExportRates) -> str:
    """`vm1: 1200 reads/s (4.7 MiB/s), 300 writes/s (1.2 MiB/s)`, and what else there was."""
    from vfiotool.cli.serving import size

    found = [
        f"{one.reads:.0f} reads/s ({size(one.bytes_read)}/s)",
        f"{one.writes:.0f} writes/s ({size(one.bytes_written)}/s)",
    ]
    if one.flushes:
        found.append(f"{one.flushes} flushes")
    if one.failed:
        found.append(f"{one.failed} failed")
    if one.waits:
        found.append(f"waited {one.waits} times for its limits")
    return f"{one.name}: {', '.join(found)}"
