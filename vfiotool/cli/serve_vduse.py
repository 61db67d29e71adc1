"""`serve vduse-blk NAME`: a disk for this host's kernel, or for a VM over vhost-vdpa."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vfiotool.cli import output
from vfiotool.cli.serve_options import (
    POLL_US,
    BlockSizeOption,
    DirectOption,
    FileOption,
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
)
from vfiotool.errors import VfiotoolError

if TYPE_CHECKING:
    from vfiotool.virtio.vduse import VduseDevice

_BLOCK = 2


def vduse_blk(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The device, /dev/vduse/NAME.")],
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
    threads: ThreadsOption = 1,
    poll_us: PollOption = POLL_US,
    attach: Annotated[
        Literal["virtio", "vhost", "none"],
        typer.Option(
            "--attach", help="virtio: a disk of this host; vhost: for a VM; none: vdpa add does it."
        ),
    ] = "none",
) -> int:
    """Serve one disk over VDUSE until SIGTERM; the image is raw, its format never probed.

    What is there already is taken up again: after a crash the same command goes on with the
    requests that were begun. At SIGTERM a device that nobody uses is removed; one on the vDPA bus
    stays, and its requests wait. SIGHUP, or `vduse resize`, takes a file that grew.
    """
    from vfiotool.native.virtqueue import Worker
    from vfiotool.virtio.block import BlockDisk
    from vfiotool.virtio.vduse import VduseDevice
    from vfiotool.virtio.vduse_files import log_path, save_disk

    check_threads(threads, poll_us)
    settings = disk_of(
        blk_file,
        ram,
        read_only=read_only,
        offset=offset,
        size=size,
        serial=serial or name[:20],
        block_size=block_size,
        physical_block_size=physical_block_size,
        queues=queues,
        direct=direct,
        nvme=nvme,
    )
    with ExitStack() as stack:
        disk = stack.enter_context(closing(BlockDisk(settings)))
        workers = [Worker(poll_us) for _ in range(threads)]
        for worker in workers:
            stack.callback(worker.close)
        device = VduseDevice(name, disk, _BLOCK, workers, log=log_path(name), report=output.log)
        stack.callback(end, device)
        save_disk(name, settings)
        _end_by_signals(device)
        stack.enter_context(asked(device))
        _attach(device, attach)
        device.run()
    return 0


def _attach(device: VduseDevice, how: str) -> None:
    from vfiotool.virtio.vduse_service import attach

    if how != "none" and device.is_new:
        attach(device.name, how, output.log, device.stop)


def _end_by_signals(device: VduseDevice) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: device.stop())


@contextmanager
def asked(device: VduseDevice) -> Iterator[None]:
    """Have the device's control socket answered, and SIGHUP."""
    from vfiotool.virtio.control import Control
    from vfiotool.virtio.vduse_files import control_path

    def resize(_: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"changed": device.resize()}

    def hang_up() -> None:
        hung.recv(64)
        try:
            resize()
        except VfiotoolError as error:
            output.log(f"{device.name}: {error.message}")

    def poke(*_: object) -> None:
        with suppress(BlockingIOError):
            poker.send(b"!")

    hung, poker = socket.socketpair()
    with hung, poker:
        poker.setblocking(False)
        device.watch(hung, hang_up)
        control = Control(
            device,
            {"resize": resize},
            lambda client: client.close(),
            path=control_path(device.name),
        )
        before = signal.signal(signal.SIGHUP, poke)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)
            control.close()
            device.unwatch(hung)


def end(device: VduseDevice) -> None:
    """Give the device back; remove it, and what is kept of it, if it is on no bus."""
    from vfiotool.virtio.vduse_service import end as give_back

    give_back(device, output.log)
