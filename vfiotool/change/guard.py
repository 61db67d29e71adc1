"""The guard: what a step would take from whoever uses it now, and who allowed that.

It is asked for the whole plan before anything is written, and by the writer again before each
step and each write (`writer.py`), whoever wants the change.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from vfiotool.change.steps.base import Step, Taken
from vfiotool.devices.pci import read_functions
from vfiotool.errors import Refused, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_BLOCK, SYS_PCI_DEVICES, SYS_VDPA_DEVICES
from vfiotool.usage.blocker import KINDS
from vfiotool.usage.sight import Sight
from vfiotool.usage.survey import Blocker, look

_CHILDREN = ("mdev-children", "vdpa-children")
# The kinds of use that have a disk claimed (blkdev_get, O_EXCL).
_OF_DISKS = ("mounted", "swap", "storage-member")


@dataclass(frozen=True)
class Allowance:
    """One `--allow KIND:WHAT`: disrupting this use, of this kind, is permitted."""

    kind: str
    what: str

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """Raises UsageError if it is not KIND:WHAT."""
        kind, _, what = text.partition(":")
        if not kind or not what:
            raise UsageError(
                f"--allow {text[:80]!r} is not KIND:WHAT",
                hint="a refusal names what it wants: --allow mounted:/mnt/x",
            )
        return cls(kind, what)


@dataclass(frozen=True, slots=True)
class Look:
    """What steps take, as one look at the host saw it.

    `uses`: every use that they would cut off as things stand, each once; `disks`: the whole disks
    of what they take (`nvme0n1`): who claims one keeps its partitions too.
    """

    uses: tuple[Blocker, ...] = ()
    disks: tuple[str, ...] = ()

    @property
    def has_a_disk_in_use(self) -> bool:
        """Whether one of the uses is of a disk, so that the disk's claim is somebody's already."""
        return any(use.kind in _OF_DISKS for use in self.uses)


def look_at(host: Host, steps: Iterable[Step]) -> Look:
    """Look at what these steps take, each thing once.

    What an earlier step of theirs takes away itself (VFs, an mdev) is no use that a later one
    would find.
    """
    steps = tuple(steps)
    taken = dict.fromkeys(item for step in steps for item in step.takes(host))
    if not taken:
        return Look()
    # All at once: what tells a VF's index is then read once for each card.
    names = [item.device for item in taken]
    functions = {item.address: item for item in read_functions(host, names, links=False)}
    sight = Sight(host)
    found: dict[Blocker, None] = {}
    for item in taken:
        usage = look(sight, item.device, functions.get(item.device))
        found.update(dict.fromkeys(each for each in usage.blockers if _counts(item, each)))
    remade = {step.remakes_vfs_of for step in steps}
    removed = {step.removes for step in steps}
    uses = tuple(
        blocker
        for blocker in found
        if not (blocker.kind == "vfs-enabled" and blocker.device in remade)
        and not (blocker.kind in _CHILDREN and blocker.subject in removed)
    )
    return Look(uses, _disks_of(sight, taken))


def _disks_of(sight: Sight, taken: Iterable[Taken]) -> tuple[str, ...]:
    paths = [
        sight.realpath(f"{base}/{item.device}")
        for item in taken
        for base in (SYS_PCI_DEVICES, SYS_VDPA_DEVICES)
    ]
    names = dict.fromkeys(name for path in paths if path for name in sight.attached.blocks(path))
    return tuple(name for name in names if not sight.exists(f"{SYS_BLOCK}/{name}/partition"))


def find_blockers(host: Host, steps: Iterable[Step]) -> tuple[Blocker, ...]:
    """Every use that these steps would cut off as things stand, each once."""
    return look_at(host, steps).uses


def _counts(item: Taken, blocker: Blocker) -> bool:
    kind = KINDS[blocker.kind]
    return kind.cuts_a_use and (kind.holds or not item.held_only)


def uses_left(
    host: Host, steps: Iterable[Step], allowed: Iterable[Allowance] = ()
) -> tuple[Blocker, ...]:
    """The uses that the steps would cut off and that are not allowed by kind and name."""
    return _not_allowed(look_at(host, steps).uses, allowed)


def _not_allowed(uses: Iterable[Blocker], allowed: Iterable[Allowance]) -> tuple[Blocker, ...]:
    permits = {(entry.kind, entry.what) for entry in allowed}
    return tuple(
        entry
        for entry in uses
        if (entry.kind, entry.subject) not in permits or not KINDS[entry.kind].can_be_allowed
    )


def _remedy(left: tuple[Blocker, ...]) -> str:
    """What to do about these: where one of them is never permitted, the command that ends it."""
    for entry in left:
        if not KINDS[entry.kind].can_be_allowed:
            return (
                f"{entry.remedy or f'vfiotool why {entry.device}'} (--allow does not permit this)"
            )
    permits = dict.fromkeys(shlex.quote(f"{entry.kind}:{entry.subject}") for entry in left)
    allows = " ".join(f"--allow {permit}" for permit in permits)
    return f"end that use first (see: vfiotool why {left[0].device}); to override: {allows}"


def refuse_uses(host: Host, steps: Iterable[Step], allowed: Iterable[Allowance] = ()) -> Look:
    """What was seen, all of whose uses are allowed by kind and name.

    Raises Refused, naming every use that is not.
    """
    seen = look_at(host, steps)
    left = _not_allowed(seen.uses, allowed)
    if not left:
        return seen
    lines = [f"{entry.device} {entry.kind}: {entry.detail} [{entry.evidence}]" for entry in left]
    raise Refused(
        "refusing: device is in use: " + "; ".join(lines),
        hint=_remedy(left),
        device=left[0].device,
    )
