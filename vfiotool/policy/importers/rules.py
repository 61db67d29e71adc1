"""What an importer yields: policy rules, and what could not be carried over.

A rule is one table of the policy (CONTRACT, Policy) as plain values; `to_toml` prints it. Names
that could leave a folder, or that nobody gives in good faith, are refused rather than reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vfiotool.devices.drivers import canonical_name
from vfiotool.devices.pci import Address
from vfiotool.errors import UsageError

Value = str | int | bool | Mapping[str, "Value"] | list["Value"]

_DRIVER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}", re.ASCII)
_ATTRIBUTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+-]{0,127}", re.ASCII)
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}", re.ASCII)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Rule:
    """One `[[table]]` of a policy; `where` names the line or file that it comes from."""

    table: str
    values: Mapping[str, Value]
    where: str

    def as_json(self) -> dict[str, object]:
        return {"table": self.table, "where": self.where, **self.values}


@dataclass(frozen=True)
class Leftover:
    """Something that the policy does not say: what it was, where it stood, why it stayed."""

    where: str
    what: str
    why: str

    def as_json(self) -> dict[str, str]:
        return {"where": self.where, "what": self.what, "why": self.why}


@dataclass
class Findings:
    """What has been found so far; the importers add to it in the order of the source."""

    rules: list[Rule] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)

    def leave(self, where: str, what: str, why: str) -> None:
        self.leftovers.append(Leftover(where, what[:200], why))

    def rest(self, where: str, number: int) -> None:
        """Tell that lines were passed over that have to do with something else."""
        if number:
            lines = "1 other line" if number == 1 else f"{number} other lines"
            self.leave(where, lines, "not about devices for VFIO")

    def add(self, rule: Rule) -> None:
        """Add a rule unless the same device has one: a repetition is dropped, a conflict told."""
        for other in self.rules:
            if other.table != rule.table or _object_of(other) != _object_of(rule):
                continue
            if other.values != rule.values:
                self.leave(
                    rule.where,
                    to_toml_value(_object_of(rule)),
                    f"{other.where} asks for something else for it, and stands first",
                )
            return
        self.rules.append(rule)

    def device(self, where: str, match: Mapping[str, Value], driver: str, **more: Value) -> None:
        """A device's rule; the driver is spelt as the kernel spells it (`vfio_pci`: vfio-pci)."""
        values = {"match": dict(match), "driver": canonical_name(driver), **more}
        self.add(Rule("device", values, where))


def _object_of(rule: Rule) -> Value:
    return rule.values.get("match") or rule.values.get("uuid") or rule.values.get("name") or ""


def hostile(where: str, name: str) -> UsageError:
    """The error for a name that must not become a part of a path."""
    shown = name if len(name) <= 60 else f"{name[:57]}…"
    return UsageError(
        f"{where}: the name {shown!r} is refused: it could lead out of its folder",
        hint="repair or remove that entry, then import again",
    )


def check_name(where: str, name: str) -> None:
    """Refuse what would leave a folder or a line: slashes, dot names, control characters, length.

    Raises UsageError; says nothing of whether the name means anything.
    """
    if (
        "/" in name
        or name in (".", "..")
        or ".." in name
        or len(name) > _LONGEST_NAME
        or not name.isprintable()
    ):
        raise hostile(where, name)


def driver_name(where: str, name: str) -> str | None:
    """`name` if it can be a driver's, None if it is none. Raises UsageError if it is hostile."""
    check_name(where, name)
    return name if _DRIVER.fullmatch(name) else None


def parent_name(where: str, name: str) -> str | None:
    """`name` if it can be a parent device's or an mdev type's; as `driver_name`."""
    check_name(where, name)
    return name if _NAME.fullmatch(name) else None


def interface_name(where: str, name: str) -> str | None:
    """`name` if it can be a network interface's (IFNAMSIZ is 16 with the end); as `driver_name`."""
    check_name(where, name)
    return name if _INTERFACE.fullmatch(name) else None


def uuid_name(where: str, name: str) -> str | None:
    """`name` in lower case if it is a UUID of 36 characters; as `driver_name`."""
    check_name(where, name)
    return name.lower() if _UUID.fullmatch(name) else None


def address_name(where: str, name: str) -> str | None:
    """`name` as a full PCI address, None if it is none; as `driver_name`."""
    check_name(where, name)
    return str(Address.parse(name)) if Address.is_address(name) else None


def attribute_pair(where: str, name: str, value: object) -> tuple[list[Value] | None, str]:
    """An mdev's attribute as the policy's pair; or None and why it cannot be one.

    Raises UsageError if the name leads out of the mdev's folder.
    """
    for part in name.split("/"):
        check_name(where, part)
    if not _ATTRIBUTE.fullmatch(name) or len(name) > 200:
        return None, "not the name of an attribute"
    if not isinstance(value, str):
        return None, "the attribute's value is not a string"
    if len(value) > 4095 or not value.isprintable():
        return None, "the attribute's value is not one line of text"
    return [name, value], ""


def to_toml(rules: Iterable[Rule], origin: str) -> str:
    """The policy file: `version` and the rules, each under a comment that names its source."""
    parts = [f"# Imported from {_comment(origin)}.\nversion = 1\n"]
    for rule in rules:
        width = max(len(key) for key in rule.values)
        lines = [f"# {_comment(rule.where)}", f"[[{rule.table}]]"]
        lines += [f"{key:<{width}} = {to_toml_value(value)}" for key, value in rule.values.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def to_toml_value(value: Value) -> str:
    """One value as TOML 1.0 writes it, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {to_toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    items = ", ".join(to_toml_value(item) for item in value)
    return f"[{items}]" if len(items) < 2 or isinstance(value[0], str | int) else f"[ {items} ]"


def _key(text: str) -> str:
    return text if _BARE_KEY.fullmatch(text) else _quoted(text)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else _escape(char) for char in escaped) + '"'


def _escape(char: str) -> str:
    number = ord(char)
    if 0xD800 <= number < 0xE000:
        # TOML knows no surrogates; they stand for bytes that were not UTF-8.
        return "\\uFFFD"
    return f"\\u{number:04X}" if number < 0x10000 else f"\\U{number:08X}"


def _comment(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
