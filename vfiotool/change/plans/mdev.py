"""Plans for mediated devices: pure functions of frozen values, no host is touched."""

from __future__ import annotations

from collections.abc import Iterable

from vfiotool.change.steps.base import Step
from vfiotool.change.steps.mdev import SetMdev
from vfiotool.change.steps.names import UUID
from vfiotool.devices.mdev import Mdev, MdevType
from vfiotool.errors import Foretold, NotFound, UsageError


def mdev_uuid(text: str) -> str:
    """`text` in the form that sysfs shows. Raises UsageError if it is no UUID."""
    if UUID.fullmatch(text.lower()) is None:
        raise UsageError(
            f"{text[:80]!r} is not a UUID",
            hint="write it as 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001, or leave --uuid out",
        )
    return text.lower()


def plan_mdev_create(
    types: Iterable[MdevType], mdevs: Iterable[Mdev], parent: str, kind: str, uuid: str
) -> tuple[Step, ...]:
    """Make an mdev; none if it is there already. Raises NotFound, UsageError, Foretold."""
    uuid = mdev_uuid(uuid)
    offered = {entry.type: entry for entry in types if entry.parent == parent}
    if not offered:
        raise NotFound(
            f"{parent[:80]!r} is no parent of mdevs on this host", hint="vfiotool mdev types"
        )
    if kind not in offered:
        raise NotFound(
            f"{parent} has no mdev type {kind[:80]!r}: it has {', '.join(sorted(offered))}",
            hint="vfiotool mdev types",
        )
    for mdev in mdevs:
        if mdev.uuid != uuid:
            continue
        if (mdev.parent, mdev.type) == (parent, kind):
            return ()
        raise UsageError(
            f"{uuid} exists already, as {mdev.parent}/{mdev.type}",
            hint="choose another UUID, or leave --uuid out",
            device=uuid,
        )
    if offered[kind].available_instances == 0:
        raise Foretold(
            f"{parent} has no instance of {kind} left",
            reason="no-instance-left",
            evidence=f"mdev_supported_types/{kind}/available_instances of {parent}",
            hint="vfiotool mdev list shows what uses it up; vfiotool mdev remove UUID frees one",
        )
    return (SetMdev(uuid, parent, kind, exists=True),)


def plan_mdev_remove(mdevs: Iterable[Mdev], uuid: str) -> tuple[Step, ...]:
    """Remove an mdev. Raises NotFound, UsageError."""
    uuid = mdev_uuid(uuid)
    for mdev in mdevs:
        if mdev.uuid == uuid and mdev.parent is not None and mdev.type is not None:
            return (SetMdev(uuid, mdev.parent, mdev.type, exists=False),)
    raise NotFound(f"there is no mdev {uuid}", hint="vfiotool mdev list", device=uuid)
