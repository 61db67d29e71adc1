"""What the twin says of its groups and devices, held against what the original says. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Of the lab and of q35 itself; the original need not have them.
_OWN_SLOTS = ("0000:00:1e.", "0000:00:1f.", "0000:00:00.0")


@dataclass(frozen=True, slots=True)
class TwinDifference:
    """Where the two differ: `device` is the original's address, `what` is compared."""

    device: str
    what: str
    original: str
    twin: str

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


def _listed(addresses: Iterable[str]) -> str:
    return ", ".join(sorted(addresses))
