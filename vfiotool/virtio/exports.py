"""The exports file: what one server process serves, in TOML, followed without disturbing anybody.

version = 1
[[export]]
name = "vm1"                     # the serial, unless `serial` is given
blk_file = "/srv/vm1.raw"        # or ram = "1G", or nvme = "0000:01:00.0/1"
socket_path = "/run/vm1.sock"    # or vduse = "vm1", with attach = "virtio" or "vhost"
queues = 4
iops_limit = 20000               # also: bandwidth_limit = "200M", burst (seconds), weight
group = "tenant-a"               # shares that group's limit
[[group]]
name = "tenant-a"
bandwidth_limit = "1G"
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vfiotool.errors import UsageError
from vfiotool.host.toml import load_toml
from vfiotool.native.limits import UNLIMITED, WEIGHT, Rate
from vfiotool.virtio.block import DiskSettings, check

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZE = re.compile(r"(\d{1,15})\s*([kKmMgGtT]?)(?:i?[bB])?")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_KINDS: dict[str, type] = {
    "name": str,
    "blk_file": str,
    "nvme": str,
    "socket_path": str,
    "vduse": str,
    "attach": str,
    "serial": str,
    "read_only": bool,
    "block_size": int,
    "physical_block_size": int,
    "queues": int,
    "weight": int,
    "group": str,
    "direct": bool,
    "lock": str,
}
ATTACH = ("virtio", "vhost", "none")
_SIZES = ("ram", "offset", "size")
_LIMITS = ("iops_limit", "bandwidth_limit", "burst")
_MOST_A_SECOND, _LARGEST_WEIGHT, _LONGEST_BURST_S = 1 << 40, 10_000, 60


@dataclass(frozen=True)
class ExportSettings:
    """One export as the file has it. `rate` is its own; `group` names a GroupSettings. With `vduse`
    it is that VDUSE device, and `attach` where it is put: virtio, vhost or none."""

    name: str
    socket_path: str
    disk: DiskSettings
    rate: Rate = UNLIMITED
    weight: int = WEIGHT
    group: str | None = None
    vduse: str | None = None
    attach: str = "none"

    def is_disk_of(self, other: ExportSettings) -> bool:
        """Whether the two differ in limits alone, which change without disturbing anybody."""
        same = replace(self, rate=other.rate, weight=other.weight, group=other.group)
        return same == other


@dataclass(frozen=True)
class GroupSettings:
    """A limit that several exports have in common."""

    name: str
    rate: Rate


@dataclass(frozen=True)
class ExportsFile:
    """Everything that an exports file says."""

    exports: tuple[ExportSettings, ...]
    groups: tuple[GroupSettings, ...] = ()


def parse_size(text: str | int, what: str) -> int:
    """A number of bytes: 4096, "512k", "1G". Raises UsageError naming `what`."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    found = _SIZE.fullmatch(str(text).strip())
    if found is None:
        raise UsageError(f"{what} {str(text)[:40]!r}: not a size; write it as 4096, 512k or 1G")
    return int(found[1]) * _UNITS[found[2].lower()]


def parse_rate(
    iops: object = None, bandwidth: object = None, burst: object = None, *, dashes: bool = False
) -> Rate:
    """Limits as they are written; None where one is not given. Raises UsageError, naming it."""
    names = ["--" + name.replace("_", "-") for name in _LIMITS] if dashes else list(_LIMITS)
    found = {}
    for name, value in zip(names[:2], (iops, bandwidth), strict=True):
        if value is None:
            found[name] = 0
            continue
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            raise UsageError(f"{name} = {value!r}: not a number")
        found[name] = parse_size(value, name)
        if not 0 < found[name] <= _MOST_A_SECOND:
            raise UsageError(f"{name} = {value!r}: not from 1 to {_MOST_A_SECOND} a second")
    requests, size = found.values()
    if burst is None:
        return Rate(requests, size)
    if not isinstance(burst, (int, float)) or isinstance(burst, bool):
        raise UsageError(f"{names[2]} = {burst!r}: not a number of seconds")
    if not 0.001 <= burst <= _LONGEST_BURST_S:
        raise UsageError(f"{names[2]} = {burst!r}: not from 0.001 to {_LONGEST_BURST_S} seconds")
    if not requests and not size:
        raise UsageError(f"{names[2]} is given, and no limit that it belongs to")
    return Rate(requests, size, round(burst * 1_000_000_000))


def parse_weight(value: object) -> int:
    """A weight as it is written. Raises UsageError."""
    if type(value) is not int or not 1 <= value <= _LARGEST_WEIGHT:
        raise UsageError(f"weight {str(value)[:40]}: not from 1 to {_LARGEST_WEIGHT}")
    return value


_Parsed = TypeVar("_Parsed", ExportSettings, GroupSettings)


def _parse_tables(
    tables: object, what: str, parse: Callable[[dict[str, Any]], _Parsed], faults: list[str]
) -> list[_Parsed]:
    """The tables of one kind; what is wrong with each is added to `faults`."""
    if not isinstance(tables, list):
        faults.append(f"{what} is not a list of tables: write [[{what}]]")
        return []
    found = []
    for number, table in enumerate(tables, start=1):
        label = f"{what} {number}"
        if not isinstance(table, dict):
            faults.append(f"{label}: not a table")
            continue
        if isinstance(table.get("name"), str):
            label += f" ({table['name'][:64]!r})"
        try:
            found.append(parse(table))
        except UsageError as error:
            faults.append(f"{label}: {error.message}")
    return found


def _twice(values: list[str], what: str) -> list[str]:
    again = sorted({value for value in values if values.count(value) > 1})
    return [f"{what} {value!r} is defined twice" for value in again]


def parse_exports(text: str, name: str) -> ExportsFile:
    """What a file says. Raises UsageError with every fault, each with its export or group."""
    try:
        content = load_toml(text)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    faults: list[str] = []
    if type(content.get("version")) is not int or content["version"] != 1:
        faults.append(f"version = {content.get('version')!r}: only version 1 is known")
    unknown = sorted(content.keys() - {"version", "export", "group"})
    faults += [f"unknown key {key!r}" for key in unknown]
    if not content.get("export"):
        faults.append("no [[export]] is defined")
    exports = _parse_tables(content.get("export", []), "export", _parse_export, faults)
    groups = _parse_tables(content.get("group", []), "group", _parse_group, faults)
    faults += _twice([export.name for export in exports], "name")
    faults += _twice(
        [export.socket_path for export in exports if export.socket_path], "socket_path"
    )
    faults += _twice([export.vduse for export in exports if export.vduse], "vduse")
    faults += _twice([group.name for group in groups], "group")
    # Where no group has a limit the names are labels; where one has, another name is a slip.
    known = {group.name for group in groups}
    for export in exports:
        if known and export.group is not None and export.group not in known:
            faults.append(f"export {export.name!r}: group {export.group!r} is not defined")
    if faults:
        raise UsageError("\n".join(f"{name}: {fault}" for fault in faults))
    return ExportsFile(tuple(exports), tuple(groups))


def _parse_name(table: dict[str, Any]) -> str:
    name = table.get("name")
    if name is None:
        raise UsageError("name is missing")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"name {str(name)[:64]!r}: letters, digits and ._- only, 64 at most")
    return name


def _parse_group(table: dict[str, Any]) -> GroupSettings:
    if unknown := sorted(table.keys() - {"name", *_LIMITS}):
        raise UsageError(f"unknown key {unknown[0]!r}; known: {', '.join(['name', *_LIMITS])}")
    rate = parse_rate(*(table.get(key) for key in _LIMITS))
    if not rate.requests and not rate.bytes:
        raise UsageError("neither iops_limit nor bandwidth_limit is given")
    return GroupSettings(_parse_name(table), rate)


def _check_way(table: dict[str, Any]) -> None:
    """By what drivers reach it: a socket, or VDUSE."""
    if "vduse" in table:
        if "socket_path" in table:
            raise UsageError("give one of socket_path and vduse")
        if not _NAME.fullmatch(table["vduse"]):
            raise UsageError(
                f"vduse {table['vduse'][:64]!r}: letters, digits and ._- only, 64 at most"
            )
        if table.get("attach", "none") not in ATTACH:
            raise UsageError(f"attach {table['attach'][:20]!r}: not one of {', '.join(ATTACH)}")
        return
    if "attach" in table:
        raise UsageError("attach is of vduse, not of socket_path")
    if "socket_path" not in table:
        raise UsageError("socket_path is missing")
    if not table["socket_path"].startswith("/"):
        raise UsageError(f"socket_path {table['socket_path']!r}: not an absolute path")


def _parse_export(table: dict[str, Any]) -> ExportSettings:
    if unknown := sorted(table.keys() - _KINDS.keys() - {*_SIZES, *_LIMITS}):
        known = ", ".join(sorted([*_KINDS, *_SIZES, *_LIMITS]))
        raise UsageError(f"unknown key {unknown[0]!r}; known: {known}")
    for key, kind in _KINDS.items():
        if key in table and type(table[key]) is not kind:
            raise UsageError(f"{key} = {table[key]!r}: not of type {kind.__name__}")
    name = _parse_name(table)
    _check_way(table)
    if sum(key in table for key in ("ram", "blk_file", "nvme")) != 1:
        raise UsageError("give one of blk_file, ram and nvme")
    if "ram" in table and ("offset" in table or "size" in table):
        raise UsageError("offset and size are of blk_file and nvme, not of ram")
    sizes = {key: parse_size(table[key], key) for key in _SIZES if key in table}
    disk = DiskSettings(
        path=table.get("blk_file"),
        nvme=table.get("nvme"),
        size=sizes.get("ram", sizes.get("size")),
        offset=sizes.get("offset", 0),
        read_only=table.get("read_only", False),
        serial=table.get("serial", name[:20]),
        block_size=table.get("block_size", 512),
        physical_block_size=table.get("physical_block_size", 0),
        queues=table.get("queues", 1),
        direct=table.get("direct", False),
        lock=table.get("lock", "always"),
    )
    check(disk)
    if "group" in table and not _NAME.fullmatch(table["group"]):
        raise UsageError(f"group {table['group'][:64]!r}: letters, digits and ._- only, 64 at most")
    for key in ("socket_path", "blk_file", "nvme"):
        if "\0" in table.get(key, ""):
            raise UsageError(f"{key} {table[key][:64]!r}: a path has no zero bytes")
    weight = parse_weight(table.get("weight", WEIGHT))
    rate = parse_rate(*(table.get(key) for key in _LIMITS))
    return ExportSettings(
        name,
        table.get("socket_path", ""),
        disk,
        rate,
        weight,
        table.get("group"),
        table.get("vduse"),
        table.get("attach", "none"),
    )
