"""`device trace`: a recorded trace shown, or compared with another."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import examples, wants_json
from vfiotool.cli.drive.opening import REGION_NAMES

# Of a trace's numbers those that people count.
_COUNTED = ("width", "vector", "count", "length")


def add_to(app: typer.Typer) -> None:
    """Add `trace` to the commands of `device`."""
    app.command(
        "trace",
        epilog=examples(
            "vfiotool device read 05:01.0 bar0 0 --trace t.jsonl; vfiotool device trace t.jsonl",
            "vfiotool device trace t.jsonl --compare other.jsonl",
        ),
    )(trace_command)


def trace_command(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Made with --trace; - for standard input.",
            autocompletion=candidates.files,
        ),
    ],
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="FILE",
            help="Show where FILE differs.",
            autocompletion=candidates.files,
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on showing what is appended.")
    ] = False,
) -> int:
    """Show a recorded trace, live with -f; compare two. 1 if they differ."""
    from vfiotool.vfio import differences, load

    if compare is None:
        with _lines(file, follow) as lines:
            _show(load(lines), as_json=wants_json(context), live=follow)
        return 0
    with _lines(file, False) as lines:
        events = list(load(lines))
    with _lines(compare, False) as lines:
        found = differences(events, load(lines))
    if wants_json(context):
        output.emit({"events": len(events), "differences": found})
    else:
        for line in found or [f"{len(events)} events, no difference"]:
            output.write(line)
    return 1 if found else 0


def _show(events: Iterator[dict[str, Any]], *, as_json: bool, live: bool) -> None:
    """All events; as JSON one object, or while it is followed one a line."""
    if as_json and not live:
        listed = list(events)
        output.emit({"events": len(listed), "differences": [], "trace": listed})
        return
    for event in events:
        if as_json:
            output.emit_line(event)
        else:
            output.write(_shown(event))
        if live:
            output.flush()


@contextmanager
def _lines(file: str, follow: bool) -> Iterator[Iterator[str]]:
    """The lines of a file; with `follow` those too that are still to come, until Ctrl-C."""
    if file == "-":
        yield iter(sys.stdin)
        return
    try:
        source = open(file, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    except OSError as error:
        raise output.cannot("read", file, error) from error
    with source:
        yield _following(source) if follow else iter(source)


def _following(source: TextIO) -> Iterator[str]:
    held = ""
    while True:
        held += source.readline()
        if held.endswith("\n"):
            yield held
            held = ""
        else:
            output.flush()
            time.sleep(0.1)


def _shown(event: dict[str, object]) -> str:
    """An event on one line: time, what, where, and the rest by name; what is counted in decimal,
    what is made of bits or addresses in hexadecimal."""
    from vfiotool.devices.pci import Address
    from vfiotool.vfio import IRQ_NAMES as NAMES

    is_pci = Address.is_address(str(event.get("device")))
    places = {"region": {n: name for name, n in REGION_NAMES.items()}, "index": NAMES}
    parts = []
    for key, value in event.items():
        if key in ("t", "device", "event") or (key == "offset" and "region" in event):
            continue
        if key in places and isinstance(value, int):
            name = places[key].get(value) if is_pci else None
            offset = event.get("offset")
            inside = f"+{offset:#x}" if isinstance(offset, int) else ""
            parts.append((name or f"{key} {value}") + inside)
        elif key in _COUNTED or isinstance(value, bool) or not isinstance(value, int):
            parts.append(f"{key}={value}")
        else:
            parts.append(f"{key}={value:#x}")
    when = event.get("t")
    stamp = f"{when:12.6f}" if isinstance(when, int | float) else " " * 12
    return f"{stamp}  {event.get('event')!s:<9} {'  '.join(parts)}".rstrip()
