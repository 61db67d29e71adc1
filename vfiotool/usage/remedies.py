"""What to type next: the commands that end the uses of a device, and what has none."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from vfiotool.devices.firmware import OPTION_THAT_ENABLES
from vfiotool.usage.blocker import KINDS, Blocker
from vfiotool.usage.case import HostFacts


def vital_use_notes(blockers: tuple[Blocker, ...]) -> Iterable[str]:
    """Why nothing is offered that would end a vital use."""
    for blocker in blockers:
        if blocker.vital and blocker.kind == "mounted":
            yield f"{blocker.subject} is on {blocker.device}: it cannot be given away"
        elif blocker.vital and blocker.kind == "route":
            yield f"you are logged in over {blocker.subject}: log in by another way first"


def bind_command(address: str, blockers: tuple[Blocker, ...], *, whole_group: bool) -> str:
    """The command that takes the device, once what has a command of its own has been ended."""
    words = ["vfiotool", "bind", address, *(["--whole-group"] if whole_group else [])]
    for blocker in blockers:
        if blocker.remedy is None and KINDS[blocker.kind].ends_with_driver:
            words += ["--allow", f"{blocker.kind}:{blocker.subject}"]
    return shlex.join(words)


def remedies(facts: HostFacts, blockers: tuple[Blocker, ...]) -> Iterable[str]:
    """The commands that end each use, those that stand on others first.

    Of what stands below a vital use none: it would fail, or cut the host off all the same.
    """
    kept = {blocker.device for blocker in blockers if blocker.vital}
    ranked = sorted(
        enumerate(blockers),
        key=lambda pair: (
            KINDS[pair[1].kind].order,
            # Volumes are found from the disk upwards and taken down from the top.
            -pair[0] if pair[1].kind in ("storage-member", "mounted") else pair[0],
        ),
    )
    for _, blocker in ranked:
        if blocker.kind == "no-iommu":
            yield from _iommu_commands(facts)
        elif blocker.remedy is not None and blocker.device not in kept:
            yield blocker.remedy


def _iommu_commands(facts: HostFacts) -> Iterable[str]:
    """What turns the IOMMU on: a kernel option where the firmware has one, else the firmware."""
    options = {OPTION_THAT_ENABLES.get(table) for table in facts.tables} - {None, *facts.options}
    for option in sorted(filter(None, options)):
        yield from facts.distribution.kernel_option(option)
        yield "reboot"
    if not options:
        yield "vfiotool doctor"
