"""How a controller is told of a pair of I/O queues, and of its end: Base Specification 2.0, 5.4 to
5.7."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.queue_pair import Rings
from vfiotool.errors import VfiotoolError

# `Controller.admin`: a command, and how long it may take.
Admin = Callable[[bytes, float | None], object]


def create_pair(admin: Admin, rings: Rings, vector: int | None, priority: str) -> None:
    """Both queues of `rings`, or neither; signalled by MSI-X `vector`, or polled (None)."""
    command, number = nvme_spec.command, rings.id
    signals = 0 if vector is None else vector << 16 | 1 << 1
    dwords = (number | (rings.cq_entries - 1) << 16, signals | 1)
    admin(command(nvme_spec.CREATE_CQ, prp1=rings.completion.iova, dwords=dwords), None)
    try:
        flags = nvme_spec.PRIORITIES[priority] << 1 | 1
        dwords = (number | (rings.sq_entries - 1) << 16, number << 16 | flags)
        admin(command(nvme_spec.CREATE_SQ, prp1=rings.submission.iova, dwords=dwords), None)
    except VfiotoolError:
        with contextlib.suppress(VfiotoolError):
            admin(command(nvme_spec.DELETE_CQ, dwords=(number,)), None)
        raise


def delete_pair(admin: Admin, number: int, timeout_s: float | None) -> None:
    """Both queues `number`."""
    for opcode in (nvme_spec.DELETE_SQ, nvme_spec.DELETE_CQ):
        admin(nvme_spec.command(opcode, dwords=(number,)), timeout_s)
