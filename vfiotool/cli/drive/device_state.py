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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.cli.output import emit, host, say, state
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.vfio import Device

MAGIC = "vfiotool-device-state"
_LENGTH = struct.Struct("<I")
_HEADER_LIMIT = 4096
_PIECE_LIMIT = 1 << 24

DeviceArgument = Annotated[str, Argument(metavar="DEVICE", help="PCI address or mdev UUID.")]
BackendOption = Annotated[str, Option("--backend", metavar="NAME", help="auto, iommufd, …")]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON object.")]


def register_state(group: Commands) -> None:
    """Add `state` to the group of `device` commands."""
    commands = Commands(help="Save and restore a device's state.")
    commands.command("show")(show)
    commands.command("save")(save)
    commands.command("restore")(restore)
    group.add_typer(commands, name="state")


def _open(context: Context, name: str, backend: str) -> Device:
    from vfiotool.vfio import Device

    return Device.open(name, backend=backend, host=host(context))


def _identity(device: Device) -> dict[str, object]:
    """What a state's source and target must have in common, as far as anybody can tell."""
    ids = device.config.read32(0) if device.info.is_pci else 0
    return {"vendor": f"{ids & 0xFFFF:04x}", "device": f"{ids >> 16:04x}"}


def show(
    context: Context,
    device: DeviceArgument,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Tell whether a device can migrate, and how."""
    from vfiotool.vfio.migration import STATE_NAMES, Migration, probe

    with _open(context, device, backend) as opened:
        support = probe(opened)
        found: dict[str, Any] = {
            "device": opened.name,
            "can_migrate": support is not None,
            "reason": None if support else f"its driver {opened.target.driver} saves no state",
            "state": STATE_NAMES[Migration(opened).state] if support else None,
            "pre_copy": support.pre_copy if support else None,
            "p2p": support.p2p if support else None,
            "dirty_log": support.dirty_log if support else None,
            "size_bytes": support.size_bytes if support else None,
        }
    if as_json or state(context).json:
        emit(found)
        return
    if support is None:
        print(f"{found['device']} cannot migrate: {found['reason']}")
        return
    features = [name for name in ("pre_copy", "p2p", "dirty_log") if found[name]]
    print(f"{found['device']} can migrate: stop_copy {' '.join(features)}")
    size = found["size_bytes"]
    print(f"  state {found['state']}" + ("" if size is None else f", about {size} bytes"))


def save(
    context: Context,
    device: DeviceArgument,
    output: Annotated[Path, Option("--output", metavar="FILE")],
    pre_copy: Annotated[bool, Option(help="Read what can be read while the device runs.")] = True,
    keep_running: Annotated[
        bool, Option("--keep-running", help="Let the device go on afterwards.")
    ] = False,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Save a device's state to a file; the device is left stopped."""
    from vfiotool.vfio.migration import Migration

    with _open(context, device, backend) as opened:
        migration = Migration(opened)
        # Under its name only once it is whole.
        partial = output.with_name(output.name + ".partial")
        try:
            with partial.open("xb") as file:
                writer = _Writer(file, {"format": MAGIC, "version": 1, **_identity(opened)})
                report = migration.save(writer.piece, pre_copy=pre_copy, keep_running=keep_running)
                writer.end()
            partial.replace(output)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                reason = f"{output} cannot be written: {error.strerror}"
                raise UsageError(reason) from error
            raise
        name = opened.name
    told = {
        "device": name,
        "file": str(output),
        "running_bytes": report.running_bytes,
        "stopped_bytes": report.stopped_bytes,
        "stopped_s": report.stopped_s,
        "state": "running" if keep_running else "stop",
    }
    if as_json or state(context).json:
        emit(told)
    else:
        total = report.running_bytes + report.stopped_bytes
        say(f"{total} bytes saved, {report.running_bytes} of them while {name} ran")


def restore(
    context: Context,
    device: DeviceArgument,
    source: Annotated[Path, Option("--input", metavar="FILE")],
    stopped: Annotated[bool, Option("--stopped", help="Do not start it.")] = False,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Give a device the state that was saved from one of its kind."""
    from vfiotool.vfio.migration import Migration

    try:
        file = source.open("rb")
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from error
    with file:
        header = check_file(file, str(source))
        with _open(context, device, backend) as opened:
            mine = _identity(opened)
            if any(header.get(key) != value for key, value in mine.items()):
                raise UsageError(
                    f"{source} holds the state of a {header.get('vendor')}:{header.get('device')}; "
                    f"{opened.name} is a {mine['vendor']}:{mine['device']}"
                )
            _read_header(file, str(source))
            total = Migration(opened).restore(_pieces(file, str(source)), start=not stopped)
            name = opened.name
    if as_json or state(context).json:
        emit({"device": name, "bytes": total, "state": "stop" if stopped else "running"})
    else:
        say(f"{total} bytes restored to {name}")


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
        os.fsync(self._file.fileno())


def _read_header(file: BinaryIO, name: str) -> dict[str, Any]:
    file.seek(0)
    line = file.readline(_HEADER_LIMIT)
    try:
        header: Any = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != MAGIC or header.get("version") != 1:
        raise UsageError(f"{name} is no device state of vfiotool's")
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
