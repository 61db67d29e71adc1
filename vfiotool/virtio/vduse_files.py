"""What is kept of a VDUSE device beside the kernel's part, until a reboot: the log of requests in
flight, the server's control socket, and which disk it is, so that it can be taken up again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, fields

from vfiotool.errors import NotPermitted, UsageError, from_oserror
from vfiotool.virtio.block import DiskSettings
from vfiotool.virtio.folders import runtime_folder


def _file(name: str, kind: str) -> str:
    folder = runtime_folder()
    if folder is None:
        raise NotPermitted(
            "there is no runtime folder for the log of requests in flight",
            hint="set XDG_RUNTIME_DIR, or run it as a service with RuntimeDirectory=",
        )
    if not name or "/" in name or name in (".", ".."):
        raise UsageError(f"{name!r} cannot be a VDUSE device's name")
    return f"{folder}/vduse/{name}.{kind}"


def log_path(name: str) -> str:
    """Where a device's in-flight log lies; its folder is made. Raises NotPermitted without one."""
    path = _file(name, "log")
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise from_oserror(f"make {folder}", error) from error
    return path


def control_path(name: str) -> str:
    """The control socket of a device's server."""
    return _file(name, "sock")


def save_disk(name: str, settings: DiskSettings) -> None:
    """Keep which disk a device is, for who takes it up after its server died."""
    path = _file(name, "json")
    kept = asdict(settings)
    if settings.path is not None:
        kept["path"] = os.path.abspath(settings.path)
    try:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(kept, file)
        os.replace(f"{path}.new", path)
    except OSError as error:
        raise from_oserror(f"write {path}", error) from error


def saved_disk(name: str) -> DiskSettings | None:
    """What `save_disk` kept, None if there is nothing that can be used."""
    try:
        with open(_file(name, "json"), encoding="utf-8") as file:
            kept = json.load(file)
    except (OSError, ValueError):
        return None
    names = {field.name for field in fields(DiskSettings)}
    if not isinstance(kept, dict) or set(kept) != names:
        return None
    return DiskSettings(**kept)


def forget(name: str) -> None:
    """Remove what is kept of a device that is no more."""
    for kind in ("json", "log", "sock"):
        with suppress(OSError):
            os.unlink(_file(name, kind))
