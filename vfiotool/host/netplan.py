"""Which interfaces netplan gives VFs or an eswitch mode, as netplan means them.

Read by indentation and simple flow collections: no YAML parser is among the dependencies. A
definition with `match` means what that names, and its own name is a label then; a VF's definition
names its card in `link`, and where the card has no `virtual-function-count` netplan makes as many
VFs as definitions link to it (netplan's YAML configuration reference, SR-IOV).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FLOW_PAIR = re.compile(r"""([\w-]+|"[^"]*"|'[^']*')\s*:\s*("[^"]*"|'[^']*'|[^,{}\[\]]*)""")
_COUNT, _MODE = "virtual-function-count", "embedded-switch-mode"
_Definitions = dict[str, dict[str, str]]


def netplan_claims(text: str) -> Iterator[tuple[str, str]]:
    """`(device, setting)` of each interface that a file gives VFs; see claims.py for the form."""
    definitions = _definitions(text)
    links: dict[str, int] = {}
    for keys in definitions.values():
        if "link" in keys:
            links[keys["link"]] = links.get(keys["link"], 0) + 1
    for name, keys in definitions.items():
        settings = []
        if _COUNT in keys:
            settings.append(f"{_COUNT}={keys[_COUNT]}")
        elif name in links:
            settings.append(f"link={links[name]}")
        if _MODE in keys:
            settings.append(f"{_MODE}={keys[_MODE]}")
        if settings:
            yield _device(name, keys), " ".join(settings)


def _device(name: str, keys: dict[str, str]) -> str:
    if "match.macaddress" in keys:
        return f"mac:{keys['match.macaddress'].lower()}"
    if "set-name" in keys:
        return f"interface:{keys['set-name']}"
    if "match.name" in keys:
        return f"interface:{keys['match.name']}"
    if "match.driver" in keys:
        return f"netdriver:{keys['match.driver']}"
    return f"interface:{name}"


def _definitions(text: str) -> _Definitions:
    """The definitions below `ethernets`, each with its keys; those of `match` as `match.KEY`."""
    found: _Definitions = {}
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        stripped = line.split(" #")[0].strip()
        key, colon, value = stripped.partition(":")
        if not colon or stripped.startswith("#"):
            continue
        depth = len(line) - len(line.lstrip())
        parents = [entry for entry in parents if entry[0] < depth]
        way = [name for _, name in parents]
        key, value = _plain(key), value.strip()
        if "ethernets" in way:
            below = way[way.index("ethernets") + 1 :]
            if not below:
                _take(found.setdefault(key, {}), "", value)
            else:
                _take(found.setdefault(below[0], {}), ".".join((*below[1:], key)), value)
        parents.append((depth, key))
    return found


def _take(keys: dict[str, str], name: str, value: str) -> None:
    """One value, or the pairs of a flow mapping below its name."""
    if not value.startswith("{"):
        if name and value:
            keys[name] = _plain(value)
        return
    outer = re.sub(r"([\w-]+)\s*:\s*\{([^{}]*)\}", "", value)
    for inner in re.finditer(r"([\w-]+)\s*:\s*\{([^{}]*)\}", value):
        _take(keys, f"{name}.{inner[1]}".strip("."), "{" + inner[2] + "}")
    for pair in _FLOW_PAIR.finditer(outer):
        keys[f"{name}.{_plain(pair[1])}".strip(".")] = _plain(pair[2])


def _plain(text: str) -> str:
    return text.strip().strip("\"'")
