"""The closed set of steps, and their form in journals, saved plans and `--json`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver, LoadModule
from vfiotool.change.steps.eswitch import SetEswitchMode
from vfiotool.change.steps.mdev import SetMdev, SetMdevAttribute
from vfiotool.change.steps.sriov import SetAutoprobe, SetMsixCount, SetVfCount, SetVgpuType
from vfiotool.change.steps.vdpa import SetVdpa, SetVdpaAutoprobe
from vfiotool.change.steps.vf_network import SetVfProperty
from vfiotool.errors import KernelError, VfiotoolError

STEPS: dict[str, type[Step]] = {
    kind.verb: kind
    for kind in (
        BindDriver,
        LoadModule,
        SetVfCount,
        SetAutoprobe,
        SetEswitchMode,
        SetVfProperty,
        SetMsixCount,
        SetMdev,
        SetMdevAttribute,
        SetVgpuType,
        SetVdpa,
        SetVdpaAutoprobe,
    )
}


def step_to_json(step: Step) -> dict[str, Any]:
    """All of a step, for the journal and for saved plans; `step_from_json` gives it back."""
    return {"verb": step.verb, **asdict(step)}


def step_from_json(record: dict[str, Any]) -> Step:
    """The step of a record. Raises KernelError if the record is not one of `step_to_json`'s."""
    try:
        kind = STEPS[record["verb"]]
        names = {field.name for field in fields(kind)}
        values = {name: record[name] for name in names if name in record}
        for name, nested in kind.nested.items():
            values[name] = nested(**values[name])
        return kind(**values)
    except (KeyError, TypeError) as error:
        raise KernelError(
            f"the journal holds a step that this version does not know: {error}",
            hint="recover with the version of vfiotool that wrote it",
        ) from error


def steps_as_json(steps: tuple[Step, ...]) -> list[dict[str, object]]:
    """The contract's `steps`: number, verb, target, from, to, undo."""
    rows = []
    for number, step in enumerate(steps, 1):
        before, after = step.ends()
        rows.append(
            {
                "number": number,
                "verb": step.verb,
                "target": step.target,
                "from": before,
                "to": after,
                "undo": step.undo_text(),
            }
        )
    return rows


def not_done(step: Step) -> VfiotoolError:
    before, after = step.ends()
    return KernelError(
        f"{step.target}: {step.verb} from {before} to {after} did not hold when it was read back",
        device=step.target,
    )
