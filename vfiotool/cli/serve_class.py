"""`serve vhost-user MODULE:CLASS`: a virtio device that is a class in Python."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import output
from vfiotool.cli.serve_options import take_descriptors

if TYPE_CHECKING:
    from vfiotool.virtio.device import VirtioDevice


def vhost_user(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CLASS", help="A VirtioDevice's class, or FILE.py:CLASS for its file."
        ),
    ],
    socket_path: Annotated[
        str, typer.Option("--socket-path", metavar="PATH", help="Listen there.")
    ],
) -> int:
    """Serve a virtio device written in Python until SIGTERM; any device type (--help: examples).

    QEMU takes it as vhost-user-test-device-pci,virtio-id=N, or by a device of its own for the type.
    """
    from vfiotool.cli.user_class import load_class, make
    from vfiotool.virtio.device import VirtioDevice

    found = load_class(name, VirtioDevice)
    device = make(found, name)
    asyncio.run(_serve(device, socket_path))
    return 0


async def _serve(device: VirtioDevice, path: str) -> None:
    from vfiotool.virtio.host import serve

    take_descriptors()
    until = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, until.set)
    await serve(device, path, until, output.log)
