"""The exports file: what one server process serves, in TOML, followed without disturbing anybody.

version = 1
[[export]]
name = "vm1"                     # the serial, unless `serial` is given
blk_file = "/srv/vm1.raw"        # or ram = "1G"
socket_path = "/run/vm1.sock"
queues = 4
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import Any

from vfiotool.errors import UsageError
from vfiotool.virtio.block import DiskSettings, check

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZE = re.compile(r"(\d{1,15})\s*([kKmMgGtT]?)(?:i?[bB])?")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_KINDS: dict[str, type] = {
    "name": str,
    "blk_file": str,
    "socket_path": str,
    "serial": str,
    "read_only": bool,
    "block_size": int,
    "queues": int,
}
_SIZES = ("ram", "offset", "size")


@dataclass(frozen=True)
class ExportSettings:
    """One export as the file has it."""

    name: str
    socket_path: str
    disk: DiskSettings


def parse_size(text: str | int, what: str) -> int:
    """A number of bytes: 4096, "512k", "1G". Raises UsageError naming `what`."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    found = _SIZE.fullmatch(str(text).strip())
    if found is None:
        raise UsageError(f"{what} {str(text)[:40]!r}: not a size; write it as 4096, 512k or 1G")
    return int(found[1]) * _UNITS[found[2].lower()]


def parse_exports(text: str, name: str) -> tuple[ExportSettings, ...]:
    """The exports of a file. Raises UsageError with every fault, each with its export."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: {error}") from error
    faults: list[str] = []
    if content.get("version") != 1:
        faults.append(f"version = {content.get('version')!r}: only version 1 is known")
    faults += [f"unknown key {key!r}" for key in sorted(content.keys() - {"version", "export"})]
    tables = content.get("export", [])
    if not isinstance(tables, list) or not tables:
        faults.append("no [[export]] is defined")
        tables = []
    found: list[ExportSettings] = []
    for number, table in enumerate(tables, start=1):
        label = f"export {number}"
        if not isinstance(table, dict):
            faults.append(f"{label}: not a table")
            continue
        if isinstance(table.get("name"), str):
            label += f" ({table['name'][:64]!r})"
        try:
            found.append(_parse_export(table))
        except UsageError as error:
            faults.append(f"{label}: {error.message}")
    for what in ("name", "socket_path"):
        values = [getattr(export, what) for export in found]
        for value in sorted({value for value in values if values.count(value) > 1}):
            faults.append(f"{what} {value!r} is defined twice")
    if faults:
        raise UsageError("\n".join(f"{name}: {fault}" for fault in faults))
    return tuple(found)


def _parse_export(table: dict[str, Any]) -> ExportSettings:
    if unknown := sorted(table.keys() - _KINDS.keys() - set(_SIZES)):
        known = ", ".join(sorted([*_KINDS, *_SIZES]))
        raise UsageError(f"unknown key {unknown[0]!r}; known: {known}")
    for key, kind in _KINDS.items():
        if key in table and type(table[key]) is not kind:
            raise UsageError(f"{key} = {table[key]!r}: not of type {kind.__name__}")
    for key in ("name", "socket_path"):
        if key not in table:
            raise UsageError(f"{key} is missing")
    if not _NAME.fullmatch(table["name"]):
        raise UsageError(f"name {table['name'][:64]!r}: letters, digits and ._- only, 64 at most")
    if not table["socket_path"].startswith("/"):
        raise UsageError(f"socket_path {table['socket_path']!r}: not an absolute path")
    if ("ram" in table) == ("blk_file" in table):
        raise UsageError("give one of blk_file and ram")
    if "ram" in table and ("offset" in table or "size" in table):
        raise UsageError("offset and size are of blk_file, not of ram")
    sizes = {key: parse_size(table[key], key) for key in _SIZES if key in table}
    disk = DiskSettings(
        path=table.get("blk_file"),
        size=sizes.get("ram", sizes.get("size")),
        offset=sizes.get("offset", 0),
        read_only=table.get("read_only", False),
        serial=table.get("serial", table["name"][:20]),
        block_size=table.get("block_size", 512),
        queues=table.get("queues", 1),
    )
    check(disk)
    return ExportSettings(table["name"], table["socket_path"], disk)
