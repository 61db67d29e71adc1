"""`vfiotool watch`: events of PCI, mediated and vDPA devices, as they happen."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import area, examples, host_of, wants_json
from vfiotool.host.monitor import Event, Monitor

app = area()
_SIGNS = {"add": "+", "remove": "-", "bind": ">", "unbind": "<", "lost": "!"}


@app.command(
    "watch",
    epilog=examples("vfiotool watch", "vfiotool watch 0000:05:01.0 --count 2 --timeout 30"),
)
def watch(
    context: typer.Context,
    devices: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DEVICE…", help="Only these devices' events.", autocompletion=candidates.devices
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="End after so many events.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="End after this time.")
    ] = None,
) -> int:
    """Print bind, unbind, add, remove, VF and mdev events, one a line; --json for NDJSON.

    With --count, running out of time first is exit code 1.
    """
    from vfiotool.devices.selector import resolve_all

    chosen, as_json = host_of(context), wants_json(context)
    with Monitor(chosen) as monitor:
        wanted = {name for text in devices or () for name in resolve_all(chosen, text)}
        output.say("watching")
        seen = 0
        for event in monitor.events(timeout):
            if wanted and event.kind != "lost" and not wanted & {event.device, event.pf}:
                continue
            if as_json:
                output.emit_line(event_as_json(event))
            else:
                output.write(_text(event))
            output.flush()
            seen += 1
            if seen == count:
                return 0
    return 1 if count is not None else 0


def as_line(event: Event, *, as_json: bool) -> str:
    """An event as one line of text or of NDJSON, without control characters."""
    return json.dumps(event_as_json(event)) if as_json else output.escape_line(_text(event))


def event_as_json(event: Event) -> dict[str, object]:
    """The published shape of an event (docs/schemas/watch.json)."""
    return {
        "format_version": output.FORMAT_VERSION,
        "time": round(event.time_s, 6),
        "event": event.kind,
        "bus": event.bus,
        "device": event.device,
        "id": event.pci_id,
        "driver": event.driver,
        "previous_driver": event.previous_driver,
        "pf": event.pf,
        "vf_index": event.vf_index,
        "parent": event.parent,
        "found_later": event.found_later,
    }


def _text(event: Event) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.time_s))
    sign = _SIGNS[event.kind.rpartition("-")[2]]
    words = [f"{clock}.{int(event.time_s * 1000) % 1000:03d}", sign, f"{event.kind:<11}"]
    if event.kind == "lost":
        return " ".join([*words, "the kernel dropped events; what follows was found by looking"])
    words.append(f"{event.device:<12}")
    if event.kind == "bind":
        words.append(f"to {event.driver}")
    elif event.kind == "unbind":
        words.append(f"from {event.previous_driver or 'its driver'}")
    if event.pf is not None:
        index = "?" if event.vf_index is None else event.vf_index
        words.append(f"VF {index} of {event.pf}")
    if event.parent is not None and event.bus != "pci":
        words.append(f"below {event.parent}")
    if event.pci_id is not None and event.kind in ("add", "vf-add"):
        words.append(event.pci_id)
    if event.found_later:
        words.append("(found later)")
    return " ".join(words)
