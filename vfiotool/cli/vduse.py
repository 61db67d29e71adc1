"""`vduse list|resize|rescue`: VDUSE devices of this host, and those whose server died."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import area, examples, host_of, remember_done, wants_json
from vfiotool.cli.serve_options import (
    BlockSizeOption,
    FileOption,
    OffsetOption,
    PhysicalOption,
    QueuesOption,
    ReadOnlyOption,
    SerialOption,
    SizeOption,
    disk_of,
)
from vfiotool.devices.vduse import VduseNode, read_vduse
from vfiotool.errors import NotFound, Refused, Stuck, UsageError, VfiotoolError
from vfiotool.host.host import Host

if TYPE_CHECKING:
    from vfiotool.virtio.block import DiskSettings
    from vfiotool.virtio.vduse import VduseDevice

_BLOCK = 2
_LOOK_S = 0.2
_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="As vduse list shows it.", autocompletion=candidates.vduses
    ),
]

app = area("List, resize and rescue VDUSE devices (serve vduse-blk serves one).")


@app.command("list", epilog=examples("vfiotool vduse list"))
def devices(context: typer.Context) -> int:
    """List the VDUSE devices, who serves each, and what waits for a server that is gone."""
    found = read_vduse(host_of(context))
    if wants_json(context):
        output.emit({"vduses": [as_json(device) for device in found]})
        return 0
    rows = [
        [
            device.name,
            device.state,
            "-" if device.pid is None else f"{device.pid} ({device.command})",
            device.driver or ("no driver" if device.on_bus else "not attached"),
            device.node or ", ".join(device.disks) or "-",
            "-" if device.in_flight is None else str(device.in_flight),
        ]
        for device in found
    ]
    output.table(("NAME", "STATE", "SERVER", "DRIVER", "NODE", "IN FLIGHT"), rows)
    for device in found:
        if device.waits:
            output.say(_words(device))
    if not rows:
        output.say("vfiotool: there are no VDUSE devices")
    return 0


def as_json(device: VduseNode) -> dict[str, object]:
    """The published shape (docs/schemas/vduse-list.json)."""
    return {
        "name": device.name,
        "state": device.state,
        "pid": device.pid,
        "command": device.command,
        "attached": device.on_bus,
        "driver": device.driver,
        "node": device.node,
        "disks": list(device.disks),
        "in_flight": device.in_flight,
    }


def _words(device: VduseNode) -> str:
    if device.state == "mute":
        return "; ".join(_mute(device))
    return f"{device.name}: its server is gone; to finish: vfiotool vduse rescue {device.name}"


def _mute(device: VduseNode) -> tuple[str, str]:
    """What is said of a server that does not answer, and what to do about it."""
    return (
        f"{device.name}: its server, pid {device.pid} ({device.command}), holds it and does not"
        " answer",
        f"end that process, then: vfiotool vduse rescue {device.name}",
    )


@app.command("resize", epilog=examples("vfiotool vduse resize disk0"))
def resize(context: typer.Context, name: _Name) -> int:
    """Take a device's image as large as it is now, and tell its driver."""
    from vfiotool.virtio.control import ask
    from vfiotool.virtio.vduse_files import control_path

    _found(host_of(context), name)
    path = control_path(name)
    try:
        changed = bool(ask(path, {"ask": "resize"}).get("changed"))
    except FileNotFoundError:
        raise NotFound(f"{name} is not served by vfiotool: {path} is not there") from None
    except VfiotoolError as error:
        if error.errno_name != "ENOENT":
            raise
        raise NotFound(f"{name} is not served by vfiotool: {path} is not there") from error
    outcome = "resized" if changed else "unchanged"
    remember_done(context, f"{name} is {outcome}")
    if wants_json(context):
        output.emit({"vduse": name, "outcome": outcome})
    else:
        output.write(outcome)
    return 0


@app.command(
    "rescue",
    epilog=examples(
        "vfiotool vduse rescue disk0",
        "vfiotool vduse rescue disk0 --blk-file /srv/disk0.raw --timeout 300",
    ),
)
def rescue(
    context: typer.Context,
    name: _Name,
    blk_file: FileOption = None,
    read_only: ReadOnlyOption = False,
    offset: OffsetOption = "0",
    size: SizeOption = None,
    serial: SerialOption = "",
    block_size: BlockSizeOption = 512,
    physical_block_size: PhysicalOption = 0,
    queues: QueuesOption = 1,
    timeout: Annotated[
        float,
        typer.Option(min=1, metavar="SECONDS", help="How long to wait for its users to end."),
    ] = 60.0,
) -> int:
    """Take up a device whose server died, finish its requests, and only then remove it.

    The disk is the one that it was served with, unless --blk-file names it. While somebody uses
    the device it is served; once nothing is in flight and nobody uses it, it is detached and
    removed. Nothing is removed if that does not come in time. To go on serving it instead, use
    serve vduse-blk.
    """
    host = host_of(context)
    if not host.live:
        raise UsageError(f"{host.name} is not the running host", hint="leave out --root")
    _check(_found(host, name))
    settings = _settings(name, blk_file)
    if blk_file is not None:
        settings = disk_of(
            blk_file,
            None,
            read_only=read_only,
            offset=offset,
            size=size,
            serial=serial or name[:20],
            block_size=block_size,
            physical_block_size=physical_block_size,
            queues=queues,
            direct=False,
        )
    assert settings is not None
    _serve_and_remove(host, name, settings, timeout)
    remember_done(context, f"{name} is removed")
    if wants_json(context):
        output.emit({"vduse": name, "outcome": "removed"})
    else:
        output.write(f"{name}: removed")
    return 0


def _found(host: Host, name: str) -> VduseNode:
    for device in read_vduse(host):
        if device.name == name:
            return device
    raise NotFound(f"there is no VDUSE device {name[:80]!r}", hint="vfiotool vduse list")


def _check(device: VduseNode) -> None:
    if device.state == "mute":
        text, hint = _mute(device)
        raise Refused(text, hint=hint, device=device.name)
    if device.pid is not None:
        raise Refused(
            f"{device.name} is served by pid {device.pid} ({device.command}): nothing to rescue",
            hint=f"vfiotool vdpa remove {device.name}, then end that process",
            device=device.name,
        )


def _settings(name: str, blk_file: str | None) -> DiskSettings | None:
    from vfiotool.virtio.vduse_files import saved_disk

    if blk_file is not None:
        return None
    settings = saved_disk(name)
    if settings is None:
        raise UsageError(f"which disk {name} was is not known", hint="name it: --blk-file PATH")
    if settings.path is None and settings.nvme is None:
        raise Refused(
            f"{name} was a disk in memory, which ended with its server: what it held is lost",
            hint=f"to answer what waits from an empty disk: vfiotool serve vduse-blk {name} --ram"
            f" {settings.size}",
            device=name,
        )
    return settings


def _serve_and_remove(host: Host, name: str, settings: DiskSettings, timeout_s: float) -> None:
    from vfiotool.cli.serve_vduse import end
    from vfiotool.native.virtqueue import Worker
    from vfiotool.virtio.block import BlockDisk
    from vfiotool.virtio.vduse import VduseDevice
    from vfiotool.virtio.vduse_files import log_path

    with ExitStack() as stack:
        disk = BlockDisk(settings)
        stack.callback(disk.close)
        worker = Worker(0)
        stack.callback(worker.close)
        device = VduseDevice(
            name, disk, _BLOCK, [worker], log=log_path(name), report=output.warn, must_exist=True
        )
        stack.callback(end, device)
        remover = _Remover(host, device, timeout_s)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: remover.give_up())
        remover.start()
        device.run()
        remover.join()
    if remover.failure is not None:
        raise remover.failure


class _Remover(threading.Thread):
    """Takes the device off the vDPA bus when nothing is in flight and nobody uses it.

    The removal is another process's: the kernel asks this one meanwhile, and who uses the device
    is the guard's to say.
    """

    def __init__(self, host: Host, device: VduseDevice, timeout_s: float) -> None:
        super().__init__(name="remover", daemon=True)
        self._host, self._device = host, device
        self._ends = time.monotonic() + timeout_s
        self._woken = threading.Event()
        self.failure: VfiotoolError | None = None

    def give_up(self) -> None:
        """Remove nothing; from a signal handler too."""
        self._ends = 0
        self._woken.set()

    def run(self) -> None:
        try:
            self._remove()
        except VfiotoolError as error:
            self.failure = error
        finally:
            self._device.stop()

    def _remove(self) -> None:
        name, why = self._device.name, "requests are in flight"
        while True:
            found = _found(self._host, name)
            if not found.on_bus:
                return
            if not found.in_flight:
                done = subprocess.run(
                    [sys.executable, "-I", "-m", "vfiotool", "vdpa", "remove", name],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode == 0:
                    return
                why = done.stderr.strip().removeprefix("vfiotool: ") or "vdpa remove failed"
                if done.returncode != Refused.exit_code:
                    raise Stuck(f"{name} was not detached: {why}", device=name)
            else:
                why = f"{found.in_flight} requests are in flight"
            if time.monotonic() > self._ends:
                raise Refused(
                    f"{name} is still in use, and was left as it is: {why}",
                    hint=f"serve it until its users have ended: vfiotool serve vduse-blk {name}",
                    device=name,
                )
            self._woken.wait(_LOOK_S)
