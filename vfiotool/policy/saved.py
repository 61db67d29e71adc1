"""Plans kept in a file, and the desired state that survives a reboot.

A saved plan holds the policy's text and the steps that it came to. It is applied only if the same
policy comes to the same steps again: otherwise the host has changed since.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vfiotool.change.folder import Folder
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.registry import step_from_json, step_to_json
from vfiotool.errors import KernelError, Refused, UsageError
from vfiotool.policy.model import Policy
from vfiotool.policy.parse import parse_policy

ETC_FOLDER = "/etc/vfiotool"
_DESIRED = "applied.json"
_KIND = "vfiotool-plan"


@dataclass(frozen=True)
class SavedPlan:
    """A policy and the steps that it came to on a host."""

    policy: Policy
    steps: tuple[Step, ...]


def plan_to_text(policy: Policy, steps: tuple[Step, ...]) -> str:
    """A saved plan's file."""
    payload = {
        "format_version": "1.0",
        "kind": _KIND,
        "policy": {"name": policy.name, "text": policy.text},
        "steps": [step_to_json(step) for step in steps],
    }
    return json.dumps(payload, indent=1) + "\n"


def parse_saved(text: str, name: str) -> SavedPlan | None:
    """The saved plan of a text, or None if it is no saved plan at all. Raises UsageError."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        payload: dict[str, Any] = json.loads(text)
        if payload.get("kind") != _KIND:
            raise ValueError("it is JSON, but no plan of vfiotool")
        policy = parse_policy(payload["policy"]["text"], payload["policy"]["name"])
        return SavedPlan(policy, tuple(step_from_json(entry) for entry in payload["steps"]))
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, KernelError, RecursionError) as error:
        raise UsageError(
            f"{name} is no saved plan: {error}", hint="vfiotool plan POLICY --out FILE makes one"
        ) from error


def refuse_changed(saved: SavedPlan, steps: tuple[Step, ...]) -> None:
    """Raise Refused, naming the first difference, unless the plan comes to the same steps now."""
    if steps == saved.steps:
        return
    for number in range(max(len(steps), len(saved.steps))):
        then = saved.steps[number] if number < len(saved.steps) else None
        now = steps[number] if number < len(steps) else None
        if then != now:
            raise Refused(
                f"the host has changed since the plan was made: step {number + 1} was "
                f"{_shown(then)}, and is {_shown(now)} now",
                hint="plan again, look at it, and apply that",
            )


def _shown(step: Step | None) -> str:
    if step is None:
        return "not there"
    before, after = step.ends()
    return f"{step.verb} {step.target} from {before} to {after}"


class DesiredState:
    """What was applied last, kept over reboots. Readers and a power loss see old or new."""

    def __init__(self, etc_folder: str = ETC_FOLDER) -> None:
        self._folder = Folder(etc_folder)

    def save(self, policy: Policy, transaction: int | None) -> None:
        entry = {
            "format_version": "1.0",
            "policy": {"name": policy.name, "text": policy.text},
            "transaction": transaction,
        }
        self._folder.replace(_DESIRED, json.dumps(entry, indent=1).encode() + b"\n")

    def load(self) -> Policy | None:
        """The policy applied last, or None. Raises UsageError if the file is damaged."""
        data = self._folder.read(_DESIRED)
        if data is None:
            return None
        try:
            entry = json.loads(data)["policy"]
            return parse_policy(entry["text"], entry["name"])
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self._folder.path}/{_DESIRED} is damaged: {error}", hint="apply the policy again"
            ) from error

    def forget(self) -> None:
        self._folder.remove(_DESIRED)
