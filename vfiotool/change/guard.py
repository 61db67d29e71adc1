"""The guard before the first write: what a plan would take away from, and who allowed it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver
from vfiotool.change.steps.mdev import SetMdev
from vfiotool.change.steps.vdpa import SetVdpa
from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.pci import read_functions
from vfiotool.errors import Refused, UsageError
from vfiotool.host.host import Host
from vfiotool.usage.blocker import KINDS
from vfiotool.usage.survey import Blocker, blockers


@dataclass(frozen=True)
class Allowance:
    """One `--allow KIND:WHAT`: this use, of this kind, may be cut off."""

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


def find_blockers(host: Host, steps: Iterable[Step]) -> tuple[Blocker, ...]:
    """Every use of the host that these steps would cut off, each once."""
    found: dict[Blocker, None] = {}
    steps = tuple(steps)
    taken = [s.address for s in steps if isinstance(s, BindDriver) and s.bus == "pci"]
    # All at once: what tells a VF's index is then read once for each card.
    functions = {item.address: item for item in read_functions(host, taken, links=False)}
    for step in steps:
        if isinstance(step, BindDriver) and _takes_away(step):
            found.update(dict.fromkeys(blockers(host, step.address, functions)))
        elif isinstance(step, SetMdev) and not step.exists:
            found.update(dict.fromkeys(blockers(host, step.uuid)))
        elif isinstance(step, SetVdpa) and not step.exists:
            found.update(dict.fromkeys(blockers(host, step.name)))
    return tuple(blocker for blocker in found if KINDS[blocker.kind].cuts_a_use)


def _takes_away(step: BindDriver) -> bool:
    if step.before.driver is None:
        return False
    # Giving a device back from VFIO asks its holder to let go (VFIO_PCI_REQ_ERR_IRQ): that is
    # how a virtual machine is told to unplug it, not something to refuse.
    return not is_vfio_driver(step.before.driver) or step.after.taken


def refuse_hurtful(host: Host, steps: Iterable[Step], allowed: Iterable[Allowance] = ()) -> None:
    """Raise Refused, naming every use that is not allowed by kind and name."""
    permits = {(entry.kind, entry.what) for entry in allowed}
    left = [
        blocker
        for blocker in find_blockers(host, steps)
        if (blocker.kind, blocker.subject) not in permits
    ]
    if not left:
        return
    lines = [f"{entry.device} {entry.kind}: {entry.detail} [{entry.evidence}]" for entry in left]
    allows = " ".join(dict.fromkeys(f"--allow {entry.kind}:{entry.subject}" for entry in left))
    raise Refused(
        "it would hurt this host: " + "; ".join(lines),
        hint=f"end that use first; vfiotool why {left[0].device} tells more. Only if you are sure: "
        f"{allows}",
        device=left[0].device,
    )
