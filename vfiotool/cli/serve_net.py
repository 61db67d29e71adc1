"""`serve vhost-user-net`: a network among virtual machines, with a tap interface as its uplink."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from typing import Annotated

import typer

from vfiotool.cli import output
from vfiotool.cli.serve_options import take_descriptors
from vfiotool.errors import UsageError


def vhost_user_net(
    socket_path: Annotated[
        list[str],
        typer.Option("--socket-path", metavar="PATH", help="A port; one for each machine."),
    ],
    tap: Annotated[
        str | None,
        typer.Option("--tap", metavar="NAME", help="A tap interface of this host, as the uplink."),
    ] = None,
    rate_limit: Annotated[
        str | None,
        typer.Option(
            "--rate-limit", metavar="BYTES", help="What each machine may send a second, as 100M."
        ),
    ] = None,
) -> int:
    """Serve a switch with a port for each machine until SIGTERM; offloads pass through.

    A machine without checksum or segmentation offload gets complete frames. Frames for a machine
    that gives no buffers are dropped, and cost nobody else anything.
    """
    from vfiotool.virtio.exports import parse_size

    if len(set(socket_path)) != len(socket_path):
        raise UsageError("a --socket-path is given twice")
    rate = None if rate_limit is None else parse_size(rate_limit, "--rate-limit")
    asyncio.run(_serve(socket_path, tap, rate))
    return 0


async def _serve(paths: list[str], tap: str | None, rate: int | None) -> None:
    from vfiotool.virtio.host import Served
    from vfiotool.virtio.net import NetCard, Switch, local_mac
    from vfiotool.virtio.tap import TapPort

    take_descriptors()
    loop = asyncio.get_running_loop()
    until, switch = asyncio.Event(), Switch(loop.time)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, until.set)
    async with AsyncExitStack() as stack:
        if tap is not None:
            stack.callback(TapPort(tap, switch, output.log).close)
        for path in paths:
            card = NetCard(switch, local_mac(path), rate=rate)
            await stack.enter_async_context(Served(card, path, output.log))
        await until.wait()
