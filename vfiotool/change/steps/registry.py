"""Every kind of step, and their form in journals, saved plans and `--json`.

A kind is a class in a file of this folder, and is known by being there.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, fields
from functools import cache
from typing import Any

from vfiotool.change.steps.base import Step
from vfiotool.errors import KernelError, UsageError, VfiotoolError

# What a field of a step, or of what is nested in one, may hold, by its annotation.
_HELD: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "bool": (bool,),
    "bool | None": (bool, type(None)),
}


@cache
def step_kinds() -> dict[str, type[Step]]:
    """The kinds by their verbs."""
    folder = os.path.dirname(__file__)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and name != "__init__.py":
            importlib.import_module(f"{__package__}.{name.removesuffix('.py')}")
    found: dict[str, type[Step]] = {}
    pending = list(Step.__subclasses__())
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__.startswith(f"{__package__}.") and hasattr(kind, "verb"):
            found[kind.verb] = kind
    return found


def step_to_json(step: Step) -> dict[str, Any]:
    """All of a step, for the journal and for saved plans; `step_from_json` gives it back."""
    return {"verb": step.verb, **asdict(step)}


def step_from_json(record: object) -> Step:
    """The step of a record. Raises KernelError if the record is not one of `step_to_json`'s.

    What is read from a file is hostile until shown otherwise: types are as declared, and each
    name is one that can be a path part.
    """
    try:
        if not isinstance(record, dict):
            raise TypeError(f"{str(record)[:40]} is not a step")
        kind = step_kinds()[record["verb"]]
        values = held_values(kind, record)
        for name, nested in kind.nested.items():
            values[name] = nested(**held_values(nested, record[name]))
        step = kind(**values)
        step.check_names()
        return step
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise KernelError(
            f"a step that this version of vfiotool does not know: {error}",
            hint="use the version of vfiotool that wrote it",
        ) from error


def held_values(kind: type, record: object) -> dict[str, Any]:
    """The plain fields of `kind` that a JSON object holds. Raises TypeError for wrong types."""
    if not isinstance(record, dict):
        raise TypeError(f"{str(record)[:40]} where {kind.__name__} is due")
    values: dict[str, Any] = {}
    for field in fields(kind):
        held = _HELD.get(str(field.type))
        if held is None or field.name not in record:
            continue
        value = record[field.name]
        if not isinstance(value, held) or (isinstance(value, bool) and bool not in held):
            raise TypeError(f"{field.name} is {str(value)[:40]!r}")
        values[field.name] = value
    return values


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
