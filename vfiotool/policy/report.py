"""A plan as people read it: the steps under the device that each concerns, and a summary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import LoadModule
from vfiotool.change.steps.sriov import SetAutoprobe, SetVfCount
from vfiotool.change.steps.vf_network import SetVfProperty
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.plan import Plan, Refusal


def plan_lines(steps: Sequence[Step]) -> list[str]:
    """The steps grouped by device; their numbers tell the order in which they would run."""
    remade = {step.pf for step in steps if isinstance(step, SetVfCount)}
    groups: dict[str, list[str]] = {}
    for number, step in enumerate(steps, 1):
        before, after = step.words()
        if isinstance(step, SetVfProperty) and step.keep:
            line = f"{number}. {step.verb}: {before}, remembered for an undo"
        else:
            line = f"{number}. {step.verb}: {before} -> {after}"
        undo = step.undo_text()
        if undo is None and isinstance(step, SetVfProperty) and step.pf in remade:
            undo = "it goes with its VF"
        groups.setdefault(_heading(step), []).append(
            f"  {line}   (undo: {undo})" if undo else f"  {line}"
        )
    return [text for heading, lines in groups.items() for text in (heading, *lines)]


def _heading(step: Step) -> str:
    return f"module {step.target}" if isinstance(step, LoadModule) else step.target


def devices_of(steps: Iterable[Step]) -> tuple[str, ...]:
    """The devices that the steps change, each once. A VF's settings are its function's."""
    names = (
        step.pf if isinstance(step, SetVfProperty) else step.target
        for step in steps
        if not isinstance(step, LoadModule)
    )
    return tuple(dict.fromkeys(names))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def summary(plan: Plan) -> str:
    """One line: how much would change, and whether it would be refused."""
    devices = _counted(len(devices_of(plan.steps)), "device")
    if plan.refusals:
        return f"refused: apply would not begin ({_counted(len(plan.refusals), 'reason')})"
    if not plan.steps:
        return "in sync: nothing to do"
    return f"{_counted(len(plan.steps), 'step')} on {devices}"


def drift_summary(plan: Plan) -> str:
    """One line for `status`: in sync, or how many devices differ from the policy."""
    number = len(devices_of(plan.steps))
    verb = "differs" if number == 1 else "differ"
    said = [f"{_counted(number, 'device')} {verb} from the policy"] if plan.steps else []
    if plan.refusals:
        said.append(f"{_counted(len(plan.refusals), 'rule')} cannot be followed")
    return f"drift: {', '.join(said)}" if said else "in sync"


def drift_lines(steps: Sequence[Step]) -> list[str]:
    """What is and what the policy wants, by device; not the ways between them.

    A value that is changed in several steps stands once; the automatic probing that is switched
    off while VFs are made and on again after it differs from nothing.
    """
    shown = [step for step in steps if not _is_means(step)]
    ways: dict[tuple[str, str], list[Step]] = {}
    for step in shown:
        ways.setdefault((_heading(step), step.verb), []).append(step)
    groups: dict[str, list[str]] = {}
    for (heading, verb), way in ways.items():
        before, after = way[0].words()[0], way[-1].words()[1]
        what, first = verb.partition("-")[2], way[0]
        lines = groups.setdefault(heading, [])
        if before != after:
            known = not (
                isinstance(first, SetVfProperty) and first.before == VfSettings(first.index)
            )
            lines.append(f"  {what}: " + (f"is {before}, " if known else "") + f"wanted {after}")
        elif not isinstance(first, SetAutoprobe):
            lines.append(f"  {what}: {before}, to be made anew")
    groups = {heading: lines for heading, lines in groups.items() if lines}
    return [text for heading, lines in groups.items() for text in (heading, *lines)]


def _is_means(step: Step) -> bool:
    return isinstance(step, LoadModule) or (isinstance(step, SetVfProperty) and step.keep)


def refusal_lines(refusals: Iterable[Refusal]) -> list[str]:
    """One line a refusal: where, what kind, what was seen and where it was seen."""
    return [
        f"apply would refuse: {entry.device or '-'} {entry.kind}: {entry.detail}"
        + (f" [{entry.evidence}]" if entry.evidence else "")
        for entry in refusals
    ]
