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
_TRIAL = "trial.json"
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
        policy = _policy_of(payload["policy"])
        return SavedPlan(policy, tuple(step_from_json(entry) for entry in payload["steps"]))
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, KernelError, RecursionError) as error:
        raise UsageError(
            f"{name} is no saved plan: {error}", hint="vfiotool plan POLICY --out FILE makes one"
        ) from error


def _policy_of(entry: dict[str, Any]) -> Policy:
    """Raises KeyError, TypeError, ValueError, and UsageError for a policy that is none."""
    text, name = entry["text"], entry["name"]
    if not isinstance(text, str) or not isinstance(name, str):
        raise TypeError("its policy is no text")
    return parse_policy(text, name)


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


def _as_text(policy: Policy, transaction: int | None) -> bytes:
    entry = {
        "format_version": "1.0",
        "policy": {"name": policy.name, "text": policy.text},
        "transaction": transaction,
    }
    return json.dumps(entry, indent=1).encode() + b"\n"


class DesiredState:
    """What was applied last, kept over reboots. Readers and a power loss see old or new."""

    def __init__(self, etc_folder: str = ETC_FOLDER) -> None:
        self._folder = Folder(etc_folder)

    def try_out(self, policy: Policy) -> None:
        """Write what `save` will write, and take it away: raises what that would raise."""
        self._folder.replace(_TRIAL, _as_text(policy, None))
        self._folder.remove(_TRIAL)

    def save(self, policy: Policy, transaction: int | None) -> None:
        """Raises KernelError or NotPermitted, with what was kept before in place."""
        self._folder.replace(_DESIRED, _as_text(policy, transaction))

    def load(self) -> Policy | None:
        """The policy applied last, or None. Raises UsageError if the file is damaged."""
        data = self._folder.read(_DESIRED)
        if data is None:
            return None
        try:
            return _policy_of(json.loads(data)["policy"])
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{self._folder.path}/{_DESIRED} is damaged: {error}", hint="apply the policy again"
            ) from error

    def forget(self) -> None:
        self._folder.remove(_DESIRED)
