"""`vfiotool groups`: the one listing that must start fast, so it imports next to nothing.

It needs neither typer, rich, dataclasses nor the C library. The JSON is put together from parts
that are the same for many functions; `tests/test_inspect.py` holds it against `json.dumps` of the
values that `iommu.py` reads.
"""

from __future__ import annotations

import os
import sys

from vfiotool.cli.halves import in_halves
from vfiotool.cli.style import coloured, escape_line, paint
from vfiotool.devices.identity import GroupScan, list_groups, parse_windows
from vfiotool.errors import NotFound, Unsupported
from vfiotool.host.host import Host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vfiotool.devices.identity import Facts

# What a role means for the operator; the words for `host` name what has to happen.
_ROLES = {
    "vfio": "ready for user space",
    "unbound": "no driver",
    "bridge": "not in the way",
    "host": "in use by the host",
    "mdev": "mediated device",
}


def run_groups(host: Host, ids: Sequence[int], as_json: bool) -> int:
    """Print the groups named, or all, and return the exit code.

    Raises Unsupported where the host has no groups at all, NotFound for an unknown id.
    """
    known = list_groups(host)
    if not known:
        raise no_groups(host)
    missing = sorted(set(ids) - set(known))
    if missing:
        text = ", ".join(str(group) for group in missing)
        raise NotFound(
            f"no IOMMU group {text}: the ids go from {known[0]} to {known[-1]}",
            hint="vfiotool groups lists them",
        )
    chosen = list(ids) or known
    if as_json:
        print_json(host, chosen)
    else:
        print_text(host, chosen)
    return 0


def open_lean(root: str | None) -> Host:
    """The host of `--root`, as `render.open_host`; a plain directory without its imports."""
    if root is None:
        return Host.local()
    if os.path.isdir(os.path.join(root, "sys")):
        return Host.at(root)
    from vfiotool.cli.output import open_host

    return open_host(root)


def no_groups(host: Host) -> Unsupported:
    """Why there is nothing to pass through here, and the way out."""
    from vfiotool.devices.firmware import OPTION_THAT_ENABLES, iommu_tables

    offered = iommu_tables(host)
    if offered:
        reason = f"the firmware offers an IOMMU ({', '.join(offered)}), the kernel does not use it"
        option = OPTION_THAT_ENABLES.get(offered[0]) or "no iommu=off or amd_iommu=off"
        way = f"boot with {option} on the kernel's command line"
    else:
        reason = "the firmware offers the kernel no IOMMU"
        way = (
            "switch on VT-d, AMD-Vi (IOMMU) or SMMU in the firmware's set-up, and boot an Intel "
            "machine with intel_iommu=on"
        )
    return Unsupported(
        f"no IOMMU groups: {reason}",
        hint=f"{way}; or see everything work without an IOMMU: vfiotool lab demo",
    )


def print_json(host: Host, groups: Sequence[int]) -> None:
    """The contract's `groups` object, one group a line."""
    write = sys.stdout.write
    write('{"format_version": "1.0", "groups": [')
    separator = "\n"
    for text in in_halves(host, groups, lambda part: ",\n".join(_json_lines(host, part))):
        if text:
            write(separator + text)
            separator = ",\n"
    write("\n]}\n")


def _json_lines(host: Host, groups: Iterable[int]) -> Iterable[str]:
    quote = _quoter()
    scan = GroupScan(host)
    types: dict[bytes | None, str] = {}
    windows: dict[bytes | None, str] = {}
    parts: dict[Facts, str] = {}
    for group in groups:
        members = scan.members(group)
        if members is None:
            continue
        devices = []
        viable = "true"
        for name, facts in members:
            part = parts.get(facts)
            if part is None:
                part = parts[facts] = _facts_json(facts, quote)
            if facts[4] == "host":
                viable = "false"
            devices.append(f'{{"address": {quote(name)}, {part}')
        domain = scan.attribute(group, "type")
        kind = types.get(domain)
        if kind is None:
            kind = types[domain] = _text_json(domain, quote)
        reserved = scan.attribute(group, "reserved_regions")
        window = windows.get(reserved)
        if window is None:
            window = windows[reserved] = _windows_json(reserved, quote)
        yield (
            f'{{"id": {group}, "type": {kind}, "viable": {viable}, '
            f'"reserved_regions": {window}, "devices": [{", ".join(devices)}]}}'
        )


def _facts_json(facts: Facts, quote: Callable[[str], str]) -> str:
    vendor, device, code, driver, role = ("null" if fact is None else quote(fact) for fact in facts)
    return (
        f'"vendor": {vendor}, "device": {device}, "class": {code}, '
        f'"driver": {driver}, "role": {role}}}'
    )


def _text_json(data: bytes | None, quote: Callable[[str], str]) -> str:
    return "null" if data is None else quote(data.decode("utf-8", "backslashreplace"))


def _windows_json(data: bytes | None, quote: Callable[[str], str]) -> str:
    windows = parse_windows((data or b"").decode("utf-8", "backslashreplace"))
    return (
        "["
        + ", ".join(
            f'{{"start": {start}, "end": {end}, "type": {quote(kind)}}}'
            for start, end, kind in windows
        )
        + "]"
    )


def _quoter() -> Callable[[str], str]:
    """JSON's quoting of a string. The C function alone: the json package takes 2 ms to import."""
    try:
        from _json import encode_basestring_ascii

        return encode_basestring_ascii
    except ImportError:
        from json import dumps

        return dumps


def print_text(host: Host, groups: Iterable[int]) -> None:
    """One paragraph a group: its domain type and verdict, then its members with their roles."""
    from vfiotool.devices.names import read_names

    names = read_names(host)
    scan = GroupScan(host)
    colour = coloured()
    for group in groups:
        members = scan.members(group)
        if members is None:
            continue
        viable = all(facts[4] != "host" for _, facts in members)
        domain = scan.attribute(group, "type")
        kind = "" if domain is None else f"  {domain.decode('utf-8', 'backslashreplace')}"
        state = ("viable", "green") if viable else ("not viable", "yellow")
        title = paint(f"group {group}", "bold", colour)
        lines = [f"{title}{escape_line(kind)}  {paint(*state, colour)}"]
        width = max((len(name) for name, _ in members), default=0)
        for name, (vendor, device, code, driver, role) in members:
            known = names.lookup(vendor, device, class_code=code)
            identity = "" if vendor is None else f"{vendor}:{device}"
            title = known.device or known.class_name or ""
            what = _ROLES[role] if driver is None else f"{driver} ({_ROLES[role]})"
            lines.append(
                escape_line(f"  {name:<{width}}  {identity:<9}  {what:<34}  {title}".rstrip())
            )
        sys.stdout.write("\n".join(lines) + "\n")
