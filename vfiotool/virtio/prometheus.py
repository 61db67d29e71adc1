"""Figures in Prometheus' text exposition format (0.0.4): families of samples, and servers'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Family:
    """One metric: its samples differ in their labels. Counters' names end in `_total`."""

    name: str
    help: str
    samples: list[tuple[Mapping[str, str], float]] = field(default_factory=list)

    def add(self, value: float | None, **labels: object) -> None:
        """A sample; None, which is not known or does not apply, is left out."""
        if value is not None:
            self.samples.append(({name: str(label) for name, label in labels.items()}, value))


def format_families(families: Iterable[Family]) -> str:
    """All that have samples, as a scrape or a textfile collector reads them."""
    lines = []
    for family in families:
        if not family.samples:
            continue
        kind = "counter" if family.name.endswith("_total") else "gauge"
        lines += [f"# HELP {family.name} {_escaped(family.help)}", f"# TYPE {family.name} {kind}"]
        for labels, value in family.samples:
            inside = ",".join(f'{name}="{_quoted(text)}"' for name, text in labels.items())
            lines.append(
                f"{family.name}{{{inside}}} {value}" if inside else f"{family.name} {value}"
            )
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    """A label's value. Unprintables come as `?`: a device's name may hold what a terminal obeys,
    and the format has no escapes for them."""
    plain = "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
    return _escaped(plain).replace('"', '\\"')


def server_families(servers: Iterable[Mapping[str, Any]]) -> list[Family]:
    """What the statuses of servers say (see `status_of`), each with its `control_path`."""
    made: dict[str, Family] = {}

    def put(name: str, help: str, value: float | None, **labels: object) -> None:
        made.setdefault(name, Family(f"vfiotool_serve_{name}", help)).add(value, **labels)

    for server in servers:
        # Two servers may have exports of one name; a sample that comes twice costs the scrape.
        name = Path(server["control_path"]).stem
        for export in server["exports"]:
            _export(put, export, {"server": name, "export": export["name"]})
        for number, worker in enumerate(server["workers"]):
            labels = {"pid": server["pid"], "worker": number}
            put("worker_queues", "Queues that a worker serves.", worker["queues"], **labels)
            for what in ("requests", "batches", "signals", "kicks", "sleeps"):
                text = f"Of one worker: {what}."
                put(f"worker_{what}_total", text, worker[what], **labels)
    return list(made.values())


def _export(put: Any, export: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    figures = export["figures"] or {}
    queues = [queue for client in export["connections"] for queue in client["queues"]]
    put("connections", "Front ends that are connected.", len(export["connections"]), **labels)
    put("queues", "Virtqueues that run.", len(queues), **labels)
    broken = sum(1 for queue in queues if queue["broken"])
    put("broken_queues", "Virtqueues that serve no more.", broken, **labels)
    put("size_bytes", "The disk's size.", export["size"], **labels)
    put("iops_limit", "Requests a second at most.", export["iops_limit"], **labels)
    put("bandwidth_limit_bytes", "Bytes a second at most.", export["bandwidth_limit"], **labels)
    put("limit_waits_total", "Waits for limits.", export["waits"], **labels)
    for kind in ("reads", "writes", "flushes", "discards"):
        put("requests_total", "Requests done.", figures.get(kind), **labels, kind=kind)
    for kind in ("read", "written"):
        put("bytes_total", "Bytes moved.", figures.get(f"bytes_{kind}"), **labels, kind=kind)
    put("failed_total", "Requests answered with an error.", figures.get("failed"), **labels)
