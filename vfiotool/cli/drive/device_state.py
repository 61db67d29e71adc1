"""`device state show|save|restore`: a device's state through VFIO migration, as a file.

The file: a line of JSON, then pieces (4 bytes of length, little-endian, and the data) up to a
piece of length 0, then SHA-256 of all before it. It is checked whole before a device is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import DeviceArgument, area, examples, wants_json
from vfiotool.cli.drive.opening import BackendOption, opened, seekable
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.vfio import Device

MAGIC = "vfiotool-device-state"
_LENGTH = struct.Struct("<I")
_HEADER_LIMIT = 4096
_PIECE_LIMIT = 1 << 24

app = area("Save and restore a device's state (VFIO migration).")


def _identity(device: Device) -> dict[str, object]:
    """What a state's source and target must have in common, as far as anybody can tell."""
    ids = device.config.read32(0) if device.info.is_pci else 0
    return {"vendor": f"{ids & 0xFFFF:04x}", "device": f"{ids >> 16:04x}"}


@app.command("show", epilog=examples("vfiotool device state show 0000:05:01.0"))
def show(
    context: typer.Context,
    device: DeviceArgument,
    backend: BackendOption = "auto",
) -> None:
    """Show whether a device can migrate, and how."""
    from vfiotool.vfio import STATE_NAMES, Migration, probe

    with opened(context, device, backend) as opened_device:
        support = probe(opened_device)
        found: dict[str, Any] = {
            "device": opened_device.name,
            "can_migrate": support is not None,
            "reason": None
            if support
            else f"its driver {opened_device.target.driver} saves no state",
            "state": STATE_NAMES[Migration(opened_device).state] if support else None,
            "pre_copy": support.pre_copy if support else None,
            "p2p": support.p2p if support else None,
            "dirty_log": support.dirty_log if support else None,
            "size_bytes": support.size_bytes if support else None,
        }
    if wants_json(context):
        output.emit(found)
        return
    if support is None:
        output.write(f"{found['device']} cannot migrate: {found['reason']}")
        return
    features = [name for name in ("pre_copy", "p2p", "dirty_log") if found[name]]
    output.write(f"{found['device']} can migrate: stop_copy {' '.join(features)}")
    size = found["size_bytes"]
    output.write(f"  state {found['state']}" + ("" if size is None else f", about {size} bytes"))


@app.command("save", epilog=examples("vfiotool device state save 0000:05:01.0 --output vf.state"))
def save(
    context: typer.Context,
    device: DeviceArgument,
    target: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where to; - for standard output.",
            autocompletion=candidates.files,
        ),
    ],
    pre_copy: Annotated[
        bool, typer.Option(help="Read what can be read while the device runs.")
    ] = True,
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Let the device go on afterwards.")
    ] = False,
    backend: BackendOption = "auto",
) -> None:
    """Save a device's state to a file; the device is left stopped."""
    from vfiotool.vfio import Migration

    if target == "-" and wants_json(context):
        raise UsageError("--json and the state cannot both go to standard output")
    with opened(context, device, backend) as opened_device, _whole(target) as file:
        migration = Migration(opened_device)
        writer = _Writer(file, {"format": MAGIC, "version": 1, **_identity(opened_device)})
        report = migration.save(writer.piece, pre_copy=pre_copy, keep_running=keep_running)
        writer.end()
        name = opened_device.name
    told = {
        "device": name,
        "file": target,
        "running_bytes": report.running_bytes,
        "stopped_bytes": report.stopped_bytes,
        "stopped_s": report.stopped_s,
        "state": "running" if keep_running else "stop",
    }
    if wants_json(context):
        output.emit(told)
    else:
        total = report.running_bytes + report.stopped_bytes
        output.say(f"{total} bytes saved, {report.running_bytes} of them while {name} ran")


@app.command(
    "restore", epilog=examples("vfiotool device state restore 0000:05:01.0 --input vf.state")
)
def restore(
    context: typer.Context,
    device: DeviceArgument,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            help="What state save wrote; - for standard input.",
            autocompletion=candidates.files,
        ),
    ],
    stopped: Annotated[bool, typer.Option("--stopped", help="Do not start it.")] = False,
    backend: BackendOption = "auto",
) -> None:
    """Give a device the state that was saved from one of its kind."""
    from vfiotool.vfio import Migration

    with seekable(source) as file:
        header = check_file(file, source)
        with opened(context, device, backend) as opened_device:
            mine = _identity(opened_device)
            if any(header.get(key) != value for key, value in mine.items()):
                raise UsageError(
                    f"{source} holds the state of a {header.get('vendor')}:{header.get('device')}; "
                    f"{opened_device.name} is a {mine['vendor']}:{mine['device']}"
                )
            _read_header(file, source)
            total = Migration(opened_device).restore(_pieces(file, source), start=not stopped)
            name = opened_device.name
    if wants_json(context):
        output.emit({"device": name, "bytes": total, "state": "stop" if stopped else "running"})
    else:
        output.say(f"{total} bytes restored to {name}")


@contextmanager
def _whole(path: str) -> Iterator[BinaryIO]:
    """A file that gets its name only once it is whole; standard output for `-`."""
    if path == "-":
        with output.opened("-") as stream:
            yield stream
        return
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        with partial.open("xb") as file:
            yield file
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise output.cannot("write", path, error) from error
        raise


class _Writer:
    def __init__(self, file: BinaryIO, header: dict[str, object]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._put(json.dumps(header).encode() + b"\n")

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def piece(self, data: bytes) -> None:
        self._put(_LENGTH.pack(len(data)))
        self._put(data)

    def end(self) -> None:
        self._put(_LENGTH.pack(0))
        self._file.write(self._digest.digest())
        self._file.flush()
        # A pipe or a terminal has nothing to write back.
        with suppress(OSError):
            os.fsync(self._file.fileno())


def _read_header(file: BinaryIO, name: str) -> dict[str, Any]:
    file.seek(0)
    line = file.readline(_HEADER_LIMIT)
    try:
        header: Any = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != MAGIC or header.get("version") != 1:
        raise UsageError(f"{name} is not a device state of vfiotool's")
    return header


def _pieces(file: BinaryIO, name: str) -> Iterator[bytes]:
    while True:
        raw = file.read(_LENGTH.size)
        length = _LENGTH.unpack(raw)[0] if len(raw) == _LENGTH.size else _PIECE_LIMIT + 1
        if not length:
            return
        data = file.read(length) if length <= _PIECE_LIMIT else b""
        if len(data) != length:
            raise UsageError(f"{name} is cut short or damaged")
        yield data


def check_file(file: BinaryIO, name: str) -> dict[str, Any]:
    """The header of a saved state, once all of it is known to be sound. Raises UsageError."""
    header = _read_header(file, name)
    digest = hashlib.sha256()
    end = file.tell()
    for data in _pieces(file, name):
        end += _LENGTH.size + len(data)
    end += _LENGTH.size
    told = file.read()
    file.seek(0)
    while end:
        part = file.read(min(end, 1 << 20))
        digest.update(part)
        end -= len(part)
    if told != digest.digest():
        raise UsageError(f"{name} is damaged: its checksum does not fit")
    return header
