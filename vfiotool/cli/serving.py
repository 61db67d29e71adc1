"""Asking running servers: `serve status`, `serve limit`, `serve resize`, and `metrics`."""

from __future__ import annotations

import os
from typing import Any

from vfiotool.cli import output
from vfiotool.errors import NotFound, UsageError, VfiotoolError
from vfiotool.virtio.control import ask, control_folder, control_path


def ask_server(file: str, path: str | None, request: dict[str, Any]) -> dict[str, Any]:
    """One request to the server of an exports file. Raises NotFound if none runs."""
    found = path or control_path(file)
    if found is None:
        raise UsageError("no control socket is known", hint="name it: --control-path")
    if not os.path.exists(found):
        raise NotFound(
            f"no server of {file} runs here: {found} is not there",
            hint=f"vfiotool serve exports {file}",
        )
    return ask(found, request)


def _sockets() -> list[str]:
    """The control sockets in the usual folder."""
    folder = control_folder()
    names = sorted(os.listdir(folder)) if folder and os.path.isdir(folder) else []
    return [f"{folder}/{name}" for name in names if name.endswith(".sock")]


def all_servers() -> list[dict[str, Any]]:
    """The status of every server whose control socket is in the usual folder; those that do not
    answer are left out with a warning."""
    found = []
    for path in _sockets():
        try:
            found.append({"control_path": path, **ask(path, {"ask": "status"})})
        except VfiotoolError as error:
            output.warn(error.message)
    return found


def show(file: str | None, path: str | None, *, as_json: bool) -> int:
    """Print the status of one server, or of all."""
    if file is None and path is None:
        servers = all_servers()
    else:
        known = path or control_path(file or "")
        servers = [{"control_path": known, **ask_server(file or "", path, {"ask": "status"})}]
    if as_json:
        output.emit({"servers": servers})
        return 0
    rows = [row for server in servers for row in _rows(server)]
    if not rows:
        output.say("vfiotool: no server " + ("answers" if _sockets() else "runs"))
    output.table(
        ("EXPORT", "STATE", "QUEUES", "READS", "WRITES", "READ", "WRITTEN", "FAILED", "LIMITS"),
        rows,
    )
    return 0


def _rows(server: dict[str, Any]) -> list[list[output.Part]]:
    rows: list[list[output.Part]] = []
    for export in server["exports"]:
        figures = export["figures"] or {}
        queues = [queue for client in export["connections"] for queue in client["queues"]]
        broken = [queue for queue in queues if queue["broken"]]
        state = "idle" if not export["connections"] else "running" if queues else "connected"
        # An older server does not say.
        if (held := export.get("held_off_s")) is not None:
            state = f"held off {held:.1f} s"
        rows.append(
            [
                export["name"],
                ("broken", "bold red") if broken else state,
                str(len(queues)),
                *(str(figures.get(name, 0)) for name in ("reads", "writes")),
                *(size(figures.get(name, 0)) for name in ("bytes_read", "bytes_written")),
                str(figures.get("failed", 0)),
                _limits(export),
            ]
        )
    return rows


def _limits(export: dict[str, Any]) -> str:
    found = []
    if export["iops_limit"]:
        found.append(f"{export['iops_limit']} IOPS")
    if export["bandwidth_limit"]:
        found.append(f"{size(export['bandwidth_limit'])}/s")
    if export["group"]:
        found.append(f"group {export['group']}")
    if found:
        found.append(f"waited {export['waits']} times")
    return ", ".join(found) or "none"


def size(count: float) -> str:
    """Bytes as people read them."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
