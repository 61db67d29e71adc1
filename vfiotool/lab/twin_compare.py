"""What the twin says of its groups and devices, held against what the original says. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vfiotool.lab.twin_lacks import BLOCKERS, FAMILIES, NOT_ACTED, PLAN, VERDICT, TwinLack

# Of the lab and of q35 itself; the original need not have them.
_OWN_SLOTS = ("0000:00:1e.", "0000:00:1f.", "0000:00:00.0")


@dataclass(frozen=True, slots=True)
class TwinDifference:
    """Where the two differ: `device` is the original's address, `what` is compared. `unacted` is
    set where all that makes the difference is uses that a twin does not act out."""

    device: str
    what: str
    original: str
    twin: str
    unacted: bool = False

    def line(self) -> str:
        return f"{self.device}: {self.what}: {self.original} on the host, {self.twin} in the twin"


def compare_groups(
    original: Iterable[Mapping[str, Any]],
    twin: Iterable[Mapping[str, Any]],
    addresses: Mapping[str, str],
) -> list[TwinDifference]:
    """The members, viability and roles of each device's group, by `groups --json` of both.
    `addresses` maps the original's to the twin's; what has none there is not compared."""
    theirs = {device["address"]: (group, device) for group in twin for device in group["devices"]}
    back = {new: old for old, new in addresses.items()}
    found = []
    for group in original:
        for device in group["devices"]:
            address = device["address"]
            new = addresses.get(address)
            if new is None:
                continue
            if new not in theirs:
                found.append(TwinDifference(address, "group", str(group["id"]), "none"))
                continue
            other, its = theirs[new]
            members = {one["address"] for one in group["devices"] if one["address"] in addresses}
            mapped = {
                back[one["address"]]
                for one in other["devices"]
                if one["address"] in back or not one["address"].startswith(_OWN_SLOTS)
            }
            pairs = (
                ("group members", _listed(members), _listed(mapped)),
                ("viable", str(group["viable"]), str(other["viable"])),
                ("role", str(device["role"]), str(its["role"])),
            )
            found += [
                TwinDifference(address, what, one, two) for what, one, two in pairs if one != two
            ]
    return found


def compare_verdicts(
    original: Iterable[Mapping[str, Any]],
    twin: Iterable[Mapping[str, Any]],
    addresses: Mapping[str, str],
) -> list[TwinDifference]:
    """Each device's verdict and blockers, which are those of `why`, by `devices --json` of both."""
    theirs = {device["address"]: device for device in twin}
    back = {new: old for old, new in addresses.items()}
    found = []
    for device in original:
        address = device["address"]
        other = theirs.get(addresses.get(address, ""))
        if other is None:
            continue
        kinds = {row["kind"] for row in device["blockers"] if row["kind"] in NOT_ACTED}
        one = _blockers(device, {old: old for old in addresses})
        two = _blockers(other, back)
        unacted = bool(kinds) and two <= one
        if device["verdict"] != other["verdict"]:
            verdicts = (str(device["verdict"]), str(other["verdict"]))
            found.append(TwinDifference(address, VERDICT, *verdicts, unacted))
        if one - two - {row for row in one if row[0] in NOT_ACTED} or two - one:
            texts = (_rows(one), _rows(two))
            found.append(TwinDifference(address, BLOCKERS, *texts, unacted and one == two))
    return found


def _blockers(device: Mapping[str, Any], names: Mapping[str, str]) -> set[tuple[str, str]]:
    """What stands in a device's way: families of kinds, each with the original's address."""
    return {
        (FAMILIES.get(row["kind"], row["kind"]), names[row["device"]])
        for row in device["blockers"]
        if row["device"] in names
    }


def compare_plans(
    original: Mapping[str, Any], twin: Mapping[str, Any], addresses: Mapping[str, str]
) -> list[TwinDifference]:
    """The steps and refusals of one policy, by `plan --json` of both."""
    back = {new: old for old, new in addresses.items()}
    found: list[TwinDifference] = []
    steps = (_steps(original, {}), _steps(twin, back))
    refusals = (
        _refusals(original, {old: old for old in addresses}),
        _refusals(twin, back),
    )
    for name in sorted(steps[0].keys() | steps[1].keys()):
        one, two = steps[0].get(name, "no step"), steps[1].get(name, "no step")
        if one != two:
            found.append(TwinDifference(name, PLAN, one, two))
    for family, name in sorted(refusals[0] ^ refusals[1]):
        here = (family, name) in refusals[0]
        texts = (family if here else "no refusal", "no refusal" if here else family)
        found.append(TwinDifference(name, PLAN, *texts, here and family in NOT_ACTED))
    return found


def _steps(plan: Mapping[str, Any], back: Mapping[str, str]) -> dict[str, str]:
    """By target; modules are the twin's kernel's, loaded or built in as there."""
    return {
        back.get(step["target"], step["target"]): f"{step['verb']} to {step['to']}"
        for step in plan.get("steps", [])
        if step["verb"] != "load-module"
    }


def _refusals(plan: Mapping[str, Any], names: Mapping[str, str]) -> set[tuple[str, str]]:
    return {
        (FAMILIES.get(row["kind"], row["kind"]), names[row["device"]])
        for row in plan.get("refusals", [])
        if row["device"] in names
    }


def is_explained(found: TwinDifference, lacks: Iterable[TwinLack]) -> bool:
    """Whether something that the twin cannot have is why this device, or one that it is told of
    with, differs."""
    if found.unacted:
        return True
    members = f"{found.original} {found.twin}".replace(",", " ")
    about = {found.device, *(word for word in members.split() if ":" in word)}
    return any(lack.explains(found.what, about) for lack in lacks)


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{kind} {address}" for kind, address in sorted(rows)) or "none"


def _listed(addresses: Iterable[str]) -> str:
    return ", ".join(sorted(addresses))
