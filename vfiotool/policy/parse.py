"""Reads a policy: the TOML of the contract as frozen rules, or every fault with its place."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vfiotool.devices.pci import Address
from vfiotool.errors import NotFound, Refused, UsageError, from_oserror
from vfiotool.host.paths import OWN_DESCRIPTORS
from vfiotool.host.toml import load_toml
from vfiotool.policy.model import (
    DeviceRule,
    Match,
    MdevRule,
    Policy,
    SriovRule,
    VdpaRule,
    VfRule,
)
from vfiotool.policy.toml_places import Path, Place, key_places

LARGEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a policy, and where."""

    line: int
    column: int
    message: str


class PolicyError(UsageError):
    """A policy with faults, all of them; nothing of it is applied."""

    kind = "policy"

    def __init__(self, name: str, faults: list[Fault]) -> None:
        faults = sorted(faults, key=lambda fault: (fault.line, fault.column))
        lines = [f"{name}:{fault.line}:{fault.column}: {fault.message}" for fault in faults]
        super().__init__("\n".join(lines), hint="nothing was applied; fix the policy and try again")
        self.faults = tuple(faults)


Check = Callable[[Any], str | None]


def _text(pattern: str, what: str) -> Check:
    compiled = re.compile(pattern, re.ASCII | re.IGNORECASE)

    def check(value: Any) -> str | None:
        if not isinstance(value, str):
            return f"must be a string, {what}"
        return None if compiled.fullmatch(value) else f"{_shown(value)} is not {what}"

    return check


def _number(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return f"must be a number from {low} to {high}"
        return None if low <= value <= high else f"{value} is not between {low} and {high}"

    return check


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _choice(*words: str) -> Check:
    def check(value: Any) -> str | None:
        return None if value in words else f"must be one of {', '.join(words)}"

    return check


def _shown(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:60] + "…")


_ADDRESS = _text(
    r"(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[01][0-9a-f]\.[0-7]", "an address as 0000:05:01.0"
)
_ID = _text(r"[0-9a-f]{4}:[0-9a-f]{4}(:[0-9a-f]{4}:[0-9a-f]{4})?", "an id as 10de:2684")
_DRIVER = _text(r"[a-z0-9][a-z0-9_.+-]{0,63}", "a driver's name, or none")
_NAME = _text(r"[a-z0-9][a-z0-9_.:+-]{0,127}", "a name of letters, digits and _ . : + -")
_LABEL = _text(r"[a-z0-9][a-z0-9 _.:+/-]{0,199}", "a serial number, slot or path")
_UUID = _text(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "a UUID")
_MAC = _text(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", "a unicast MAC address as 52:54:00:00:00:01")
_ATTRIBUTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", re.ASCII)

_MATCH: Mapping[str, Check] = {
    "address": _ADDRESS,
    "id": _ID,
    "serial": _LABEL,
    "slot": _LABEL,
    "path": _LABEL,
    "net": _text(r"[a-z0-9][a-z0-9_.@-]{0,14}", "the name of a network interface"),
    "pf": _ADDRESS,
    "index": _number(0, 65535),
}
_VF: Mapping[str, Check] = {
    "index": _number(0, 65535),
    "mac": _MAC,
    "vlan": _number(0, 4094),
    "qos": _number(0, 7),
    "trust": _flag,
    "spoof_check": _flag,
    "min_rate_mbps": _number(0, 1 << 31),
    "max_rate_mbps": _number(0, 1 << 31),
    "driver": _DRIVER,
    "msix": _number(1, 2048),
    "vgpu_type": _number(0, 1 << 31),
}
_DEVICE: Mapping[str, Check] = {
    "driver": _DRIVER,
    "group": _choice("whole", "refuse"),
}
_SRIOV: Mapping[str, Check] = {
    "vfs": _number(0, 65535),
    "autoprobe": _flag,
    "eswitch": _choice("legacy", "switchdev"),
    "driver": _DRIVER,
    "vf_token": _UUID,
}
_MDEV: Mapping[str, Check] = {"parent": _NAME, "type": _NAME, "uuid": _UUID}
_VDPA: Mapping[str, Check] = {
    "name": _NAME,
    "parent": _text(r"[a-z0-9][a-z0-9_.:+/-]{0,127}", "a parent as vfiotool vdpa parents shows it"),
    "driver": _choice("vhost_vdpa", "virtio_vdpa"),
    "mac": _MAC,
    "mtu": _number(68, 65535),
    "max_vqp": _number(1, 65535),
}


def read_policy(path: str) -> Policy:
    """The policy in a file. Raises PolicyError with all faults, and as `read_policy_text`."""
    return parse_policy(read_policy_text(path), path)


def read_policy_text(path: str) -> str:
    """The text of a policy or a saved plan. Raises NotFound, Refused for one that anybody can
    write and root is to follow, UsageError for what is no text file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFound(f"there is no policy {path}", hint="vfiotool export prints one") from error
    except OSError as error:
        raise from_oserror(f"open the policy {path}", error) from error
    facts = os.fstat(descriptor)
    if stat.S_ISFIFO(facts.st_mode) and path.startswith(OWN_DESCRIPTORS):
        # A pipe that the caller has open already, such as a shell's <(…).
        os.set_blocking(descriptor, True)
    elif not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise UsageError(f"the policy {path} is no regular file", hint="a pipe: vfiotool plan -")
    with os.fdopen(descriptor, "rb") as file:
        if os.geteuid() == 0 and facts.st_mode & stat.S_IWOTH:
            raise Refused(
                f"anybody can write to {path}, and root would follow it",
                hint=f"chmod o-w {path}, and read it again first",
            )
        data = file.read(LARGEST_BYTES + 1)
    if len(data) > LARGEST_BYTES:
        raise UsageError(f"the policy {path} is larger than {LARGEST_BYTES >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the policy {path} is not UTF-8: {error}") from error


def parse_policy(text: str, name: str = "policy") -> Policy:
    """The policy of a text; `name` stands before each fault. Raises PolicyError."""
    try:
        document = load_toml(text)
    except ValueError as error:
        raise PolicyError(name, [_syntax_fault(error, text)]) from error
    reader = _Reader(text, document)
    policy = reader.policy(name)
    if reader.faults:
        raise PolicyError(name, reader.faults)
    return policy


def _syntax_fault(error: ValueError, text: str) -> Fault:
    message = str(error)
    if " (at " not in message:
        return Fault(1, 1, message)
    place = re.search(r"\(at line (\d+), column (\d+)\)", message)
    if place is None:
        lines = text.count("\n") + 1
        return Fault(lines, 1, message.partition(" (at ")[0])
    return Fault(int(place[1]), int(place[2]), message.partition(" (at ")[0])


class _Reader:
    def __init__(self, text: str, document: dict[str, Any]) -> None:
        self.text = text
        self.document = document
        self.faults: list[Fault] = []
        self._places: dict[Path, Place] | None = None

    def place(self, path: Path) -> Place:
        if self._places is None:
            self._places = key_places(self.text)
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, (1, 1))

    def fault(self, path: Path, message: str) -> None:
        self.faults.append(Fault(*self.place(path), message))

    def policy(self, name: str) -> Policy:
        self.known((), self.document, ("version", "device", "sriov", "mdev", "vdpa"))
        if self.document.get("version") != 1:
            self.fault(("version",), "version = 1 must be given: there is no other yet")
        policy = Policy(
            name=name,
            text=self.text,
            devices=tuple(self.device(*entry) for entry in self.tables("device")),
            sriov=tuple(self.sriov(*entry) for entry in self.tables("sriov")),
            mdevs=tuple(self.mdev(*entry) for entry in self.tables("mdev")),
            vdpas=tuple(self.vdpa(*entry) for entry in self.tables("vdpa")),
        )
        self.unique(("device", "match"), [str(rule.match) for rule in policy.devices])
        self.unique(("sriov", "match"), [str(rule.match) for rule in policy.sriov])
        self.unique(("mdev", "uuid"), [rule.uuid for rule in policy.mdevs])
        self.unique(("vdpa", "name"), [rule.name for rule in policy.vdpas])
        return policy

    def unique(self, where: tuple[str, str], values: list[str]) -> None:
        seen: dict[str, int] = {}
        for index, value in enumerate(values):
            if value and value in seen:
                line = self.place((where[0], seen[value], where[1]))[0]
                self.fault((where[0], index, where[1]), f"{value} is there already, in line {line}")
            seen.setdefault(value, index)

    def tables(self, kind: str) -> list[tuple[Path, dict[str, Any]]]:
        value = self.document.get(kind, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self.fault((kind,), f"{kind} must be tables: write [[{kind}]]")
            return []
        return [((kind, index), entry) for index, entry in enumerate(value)]

    def known(self, path: Path, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
        where = f"[[{path[0]}]]" if path else "a policy"
        for key in table:
            if key in names:
                continue
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
            self.fault((*path, key), f"unknown key {_shown(key)} in {where}: {meant}")

    def take(
        self, path: Path, table: Mapping[str, Any], checks: Mapping[str, Check]
    ) -> dict[str, Any]:
        """The values of those keys that are right; a fault for each that is not."""
        values = {}
        for key, check in checks.items():
            if key not in table:
                continue
            wrong = check(table[key])
            if wrong is None:
                values[key] = table[key]
            else:
                self.fault((*path, key), f"{key} {wrong}")
        return values

    def need(self, path: Path, table: Mapping[str, Any], *keys: str) -> None:
        for key in keys:
            if key not in table:
                self.fault(path, f"[[{path[0]}]] needs {key}")

    def match(self, path: Path, table: Mapping[str, Any]) -> Match:
        found = table.get("match")
        path = (*path, "match")
        if not isinstance(found, dict) or not found:
            self.fault(path, 'match must say which device: match = { id = "10de:2684" }')
            return Match()
        self.known(path, found, tuple(_MATCH))
        values = self.take(path, found, _MATCH)
        if ("pf" in found) != ("index" in found):
            self.fault(path, "pf and index go together: { pf = …, index = n } is one VF")
        for key in ("address", "pf"):
            if key in values:
                values[key] = str(Address.parse(values[key]))
        if "id" in values:
            values["id"] = values["id"].lower()
        return Match(**values)

    def count(self, path: Path, table: Mapping[str, Any]) -> int | None:
        found = table.get("expect")
        if found is None:
            return None
        path = (*path, "expect")
        if not isinstance(found, dict):
            self.fault(path, "expect must be a table: expect = { count = 1 }")
            return None
        self.known(path, found, ("count",))
        count = self.take(path, found, {"count": _number(0, 65536)}).get("count")
        return None if count is None else int(count)

    def device(self, path: Path, table: dict[str, Any]) -> DeviceRule:
        self.known(path, table, ("match", "expect", *_DEVICE))
        return DeviceRule(
            match=self.match(path, table),
            count=self.count(path, table),
            place=self.place(path),
            **self.take(path, table, _DEVICE),
        )

    def sriov(self, path: Path, table: dict[str, Any]) -> SriovRule:
        self.known(path, table, ("match", "expect", "vf", *_SRIOV))
        self.need(path, table, "vfs")
        values = self.take(path, table, _SRIOV)
        if "eswitch" in values and "driver" in values:
            text = "eswitch is of the driver that is there: apply driver first, or leave it out"
            self.fault((*path, "eswitch"), text)
        rules = self.vf_rules(path, table, values.get("vfs"))
        return SriovRule(
            match=self.match(path, table),
            count=self.count(path, table),
            vf=rules,
            place=self.place(path),
            **{"vfs": 0, **values},
        )

    def vf_rules(self, path: Path, table: dict[str, Any], vfs: int | None) -> tuple[VfRule, ...]:
        path = (*path, "vf")
        listed = table.get("vf", [])
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            self.fault(path, "vf must be a list of tables: vf = [ { index = 0, … } ]")
            return ()
        rules: list[VfRule] = []
        for number, entry in enumerate(listed):
            here = (*path, number)
            self.known(here, entry, tuple(_VF))
            self.need(here, entry, "index")
            values = self.take(here, entry, _VF)
            index = values.setdefault("index", 0)
            if vfs is not None and index >= vfs:
                self.fault((*here, "index"), f"there is no VF {index} among {vfs} (from 0)")
            if any(rule.index == index for rule in rules):
                self.fault((*here, "index"), f"VF {index} is there already")
            if values.get("min_rate_mbps", 0) > (values.get("max_rate_mbps") or 1 << 31):
                self.fault((*here, "min_rate_mbps"), "the least rate is above the greatest")
            rules.append(VfRule(**values))
        return tuple(rules)

    def mdev(self, path: Path, table: dict[str, Any]) -> MdevRule:
        self.known(path, table, ("attrs", *_MDEV))
        self.need(path, table, *_MDEV)
        values = self.take(path, table, _MDEV)
        if "uuid" in values:
            values["uuid"] = values["uuid"].lower()
        blank = dict.fromkeys(_MDEV, "")
        return MdevRule(
            attrs=self.attributes(path, table), place=self.place(path), **{**blank, **values}
        )

    def attributes(self, path: Path, table: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        path = (*path, "attrs")
        found = []
        listed = table.get("attrs", [])
        if not isinstance(listed, list):
            self.fault(path, 'attrs must be a list of pairs: attrs = [ ["name", "value"] ]')
            return ()
        for number, pair in enumerate(listed):
            here = (*path, number)
            if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_text, pair)):
                self.fault(here, 'an attribute is a pair of strings: ["name", "value"]')
            elif not _ATTRIBUTE.fullmatch(pair[0]) or len(pair[0]) > 200:
                self.fault(here, f"{_shown(pair[0])} is not an attribute's name below the mdev")
            elif len(pair[1]) > 4095 or not pair[1].isprintable():
                self.fault(here, f"the value of {pair[0]} is no line that sysfs would take")
            else:
                found.append((pair[0], pair[1]))
        return tuple(found)

    def vdpa(self, path: Path, table: dict[str, Any]) -> VdpaRule:
        self.known(path, table, tuple(_VDPA))
        self.need(path, table, "name", "parent")
        values = {"name": "", "parent": "", **self.take(path, table, _VDPA)}
        return VdpaRule(place=self.place(path), **values)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
