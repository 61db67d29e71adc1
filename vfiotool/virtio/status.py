"""What a server is doing, as plain values: for `serve status`, `--stats` and `metrics`."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from vfiotool.native.limits import Rate
from vfiotool.native.virtqueue import ServedQueue
from vfiotool.virtio.backend import Frontend
from vfiotool.virtio.block import BlockDisk
from vfiotool.virtio.server import Export, Server


def status_of(server: Server) -> dict[str, Any]:
    """Exports with their limits, connections, queues and counters; workers; groups."""
    return {
        "pid": os.getpid(),
        "exports": [_export(server, export) for export in server.exports.values()],
        "groups": [
            {"name": name, **_rate(rate)} for name, rate in sorted(server.groups.rates.items())
        ],
        "workers": [
            {"queues": worker.queues, **asdict(worker.figures())} for worker in server.workers
        ],
    }


def _rate(rate: Rate) -> dict[str, Any]:
    return {
        "iops_limit": rate.requests or None,
        "bandwidth_limit": rate.bytes or None,
        "burst": rate.burst_ns / 1e9,
    }


def _export(server: Server, export: Export) -> dict[str, Any]:
    device = export.device
    disk = device if isinstance(device, BlockDisk) else None
    return {
        "name": export.name,
        "socket_path": export.path,
        "blk_file": disk.settings.path if disk else None,
        "vduse": export.service.name if export.service else None,
        "nvme": disk.settings.nvme if disk else None,
        "size": disk.size if disk else None,
        "read_only": disk.settings.read_only if disk else None,
        **_rate(export.rate),
        "weight": export.weight,
        "group": export.group,
        "waits": disk.share.waits if disk else None,
        "held_off_s": server.held_off_s(export),
        "connections": [_connection(server, found.frontend) for found in export.connections],
        "figures": asdict(disk.figures()) if disk else None,
    }


def _connection(server: Server, frontend: Frontend) -> dict[str, Any]:
    queues = []
    for index, vring in enumerate(frontend.vrings):
        if vring.queue is None:
            continue
        served = vring.queue if isinstance(vring.queue, ServedQueue) else None
        queues.append(
            {
                "index": index,
                "worker": server.workers.index(served.worker) if served else None,
                "requests": served.served if served else None,
                "broken": vring.queue.broken(),
            }
        )
    broken = frontend.memory is not None and frontend.memory.is_broken
    return {"running": frontend.is_running, "memory_broken": broken, "queues": queues}
