"""A server that follows an exports file, answers on a control socket and can be replaced."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any

from vfiotool.errors import KernelError, UsageError, VfiotoolError, described, from_oserror
from vfiotool.native.limits import WEIGHT
from vfiotool.virtio import control, handover
from vfiotool.virtio.exports import (
    ExportSettings,
    ExportsFile,
    GroupSettings,
    parse_exports,
    parse_rate,
    parse_weight,
)
from vfiotool.virtio.server import Server, open_export
from vfiotool.virtio.status import status_of

_LARGEST_FILE = 1 << 20


def read_exports(file: str) -> ExportsFile:
    """Read an exports file. Raises UsageError with every fault, NotPermitted or KernelError."""
    try:
        # Non-blocking, so that a FIFO is not waited for.
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(opened, "rb") as source:
            data = source.read(_LARGEST_FILE + 1) or b""
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError):
            raise UsageError(f"{file!r}: {error}") from error
        raise from_oserror(f"read {file}", error) from error
    if len(data) > _LARGEST_FILE:
        raise UsageError(f"{file}: more than {_LARGEST_FILE} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 at byte {error.start}") from error
    return parse_exports(text, file)


class Daemon:
    """What `serve exports` runs. `control_path` None is a server that nobody can ask."""

    def __init__(self, server: Server, file: str, control_path: str | None) -> None:
        self._server = server
        self._file = file
        self._path = control_path
        self._present: dict[str, ExportSettings] = {}
        self._control: control.Control | None = None

    def start(self) -> None:
        """Serve what the file says. Raises what opening an export does; nothing stays then."""
        wanted = read_exports(self._file)
        self._server.limit_groups(wanted.groups)
        for export in wanted.exports:
            self._add(export)
        self._listen(None)

    def take_over(self) -> None:
        """Serve what the process at the control socket serves, in its place, and then what the file
        says. Raises KernelError or UsageError if that process does not let go; it goes on then."""
        read_exports(self._file)
        if self._path is None:
            raise UsageError("no control socket to take over from", hint="name it: --control-path")
        channel = control.connect(self._path)
        try:
            channel.sendall(b'{"ask": "take-over"}\n')
            taken = handover.take(self._server, channel)
            taken.start(self._server)
        except OSError as error:
            channel.close()
            if isinstance(error, VfiotoolError):
                raise
            raise KernelError(f"{self._path}: {error}") from error
        except VfiotoolError:
            channel.close()
            raise
        self._present = {settings.name: settings for settings, _, _ in taken.exports}
        self._listen(taken.control)
        self.follow()

    def close(self) -> None:
        if self._control is not None:
            self._control.close(unlink=not self._server.handed_over)

    def follow(self) -> None:
        """Make what is served what the file says; a file with a fault changes nothing. An export
        that cannot be served as the file has it now is served as it was."""
        if self._server.handed_over:
            # The process that has it all follows the file.
            return
        try:
            read = read_exports(self._file)
        except VfiotoolError as error:
            self._server.report(f"{self._file} is not followed: {error.message}")
            return
        wanted = {export.name: export for export in read.exports}
        self._server.limit_groups(read.groups)
        before = {}
        for name, old in list(self._present.items()):
            if name not in wanted or not wanted[name].is_disk_of(old):
                before[name] = self._present.pop(name)
                self._server.remove(name)
        failed = []
        for name, export in wanted.items():
            if name in self._present:
                self._server.limit(name, export.rate, export.weight, export.group)
                self._present[name] = export
            elif not self._try(export, "is not served as the file says"):
                failed.append(name)
        for name in failed:
            if name in before:
                self._try(before[name], "is not served as it was either")

    def _try(self, export: ExportSettings, otherwise: str) -> bool:
        try:
            self._add(export)
        except Exception as error:
            # Also a fault of ours: the others are served on.
            text = error.message if isinstance(error, VfiotoolError) else described(error)
            self._server.report(f"{export.name} {otherwise}: {text}")
            return False
        return True

    def _add(self, export: ExportSettings) -> None:
        self._server.add(open_export(export, lasting=True))
        self._server.limit(export.name, export.rate, export.weight, export.group)
        self._present[export.name] = export

    # The control socket

    def _listen(self, listener: socket.socket | None) -> None:
        if self._path is None:
            return
        requests = {
            "status": lambda _: status_of(self._server),
            "limit": self._limit,
            "resize": self._resize,
        }
        self._control = control.Control(
            self._server, requests, self._hand_over, path=self._path, listener=listener
        )

    def _limit(self, asked: dict[str, Any]) -> dict[str, Any]:
        limits = (asked.get("iops_limit"), asked.get("bandwidth_limit"), asked.get("burst"))
        rate = parse_rate(*limits)
        if asked.get("group") is not None and asked.get("export") is None:
            name = asked["group"]
            if name not in self._server.groups.rates:
                raise UsageError(f"no export is in a group {str(name)[:64]!r}")
            self._server.limit_groups(
                [
                    GroupSettings(other, rate if other == name else known)
                    for other, known in self._server.groups.rates.items()
                ]
            )
            return {"done": True}
        export = self._server.exports[self._named(asked)]
        weight = parse_weight(asked.get("weight", WEIGHT))
        self._server.limit(export.name, rate, weight, export.group)
        return {"done": True}

    def _resize(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"changed": self._server.resize(self._named(asked))}

    def _named(self, asked: dict[str, Any]) -> str:
        name = asked.get("export")
        if not isinstance(name, str) or name not in self._server.exports:
            raise UsageError(f"no export is called {str(name)[:64]!r}")
        return name

    def _hand_over(self, channel: socket.socket) -> None:
        assert self._control is not None
        with suppress(OSError):
            if handover.hand_over(self._server, channel, self._control.listener):
                self._server.handed_over = True
                self._server.stop()
