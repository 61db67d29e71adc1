"""Why functions share an IOMMU group: which port lacks which Access Control Services.

Follows the kernel's own decision (drivers/iommu/iommu.c, pci_device_group; drivers/pci/pci.c,
pci_acs_enabled): a function joins its upstream bridge's group unless every port from that bridge
to the root isolates, and its sibling functions' unless it isolates itself. Features missing from
a port's ACS capability register count as hard-wired on; a port without the capability isolates
nothing. For particular chips the kernel knows better than their registers say
(pci_dev_specific_acs_enabled): a port that merges is always a member of the group itself, so with
the group's members given, ports that the kernel trusts are not blamed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vfiotool.devices.config.decode import ConfigSpace, read_config
from vfiotool.devices.pci import Address
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES

# REQ_ACS_FLAGS of drivers/iommu/iommu.c, under the names of the capability's decoder.
REQUIRED = {
    "source_validation": "source validation",
    "request_redirect": "request redirect",
    "completion_redirect": "completion redirect",
    "upstream_forwarding": "upstream forwarding",
}


@dataclass(frozen=True, slots=True)
class Merger:
    """One port, bridge or function that merges devices into one group.

    `missing` names the ACS features that are off; `reason` says it in a sentence; `unread`: its
    configuration space could not be read, so nothing is known of it.
    """

    address: str
    missing: tuple[str, ...]
    reason: str
    unread: bool = False


def reasons(mergers: tuple[Merger, ...]) -> list[str]:
    """A sentence for each merger; one for all whose configuration could not be read."""
    unread = [merger.address for merger in mergers if merger.unread]
    found = [merger.reason for merger in mergers if not merger.unread]
    if len(unread) == 1:
        return [*found, next(merger.reason for merger in mergers if merger.unread)]
    if unread:
        found.append(f"the configuration of the ports {', '.join(unread)} cannot be read")
    return found


def find_mergers(
    host: Host, address: str, path: str, members: Collection[str] | None = None
) -> tuple[Merger, ...]:
    """What merges the function at `path` with others, from itself up to the root.

    With the group's `members` only they are considered; without, every port on the way is.

    Empty where everything isolates. Configuration space beyond its header needs root: a port that
    cannot be read is named as such, with nothing said to be missing.
    """
    pieces = [piece for piece in path.split("/") if Address.is_address(piece)]
    found = []
    # A bridge shares its group with what lies below it, if it cannot keep that apart.
    has_children = any(Address.is_address(name) for name in host.listdir(path))
    for port in reversed(pieces if has_children else pieces[:-1]):
        if members is not None and port not in members:
            continue
        merger = _judge_port(host, port)
        if merger is not None:
            found.append(merger)
    own = _judge_function(host, address, members)
    return (*([own] if own is not None else []), *found)


def _judge_port(host: Host, port: str) -> Merger | None:
    config = read_config(host, port)
    if config is None or not config.complete:
        reason = f"the configuration of port {port} cannot be read without root"
        return Merger(port, (), reason, unread=True)
    kind = _port_type(config)
    if kind is None:
        return Merger(port, (), f"{port} is a conventional PCI bridge, which cannot isolate")
    if kind in ("pcie-to-pci-bridge", "pci-to-pcie-bridge"):
        reason = f"behind {port}, a bridge to conventional PCI, all devices share one identity"
        return Merger(port, (), reason)
    if kind == "upstream-port" and not (config.header and config.header.multi_function):
        return None
    return _judge_flags(port, f"the {kind.replace('-', ' ')} {port}", config)


def _judge_function(host: Host, address: str, members: Collection[str] | None) -> Merger | None:
    """Whether the function may talk to its siblings past the IOMMU."""
    config = read_config(host, address)
    if config is None or not config.complete or config.header is None:
        return None
    base = address.rpartition(".")[0]
    siblings = [
        name
        for name in host.listdir(SYS_PCI_DEVICES)
        if name != address
        and name.rpartition(".")[0] == base
        and (members is None or name in members)
    ]
    if not siblings or not config.header.multi_function:
        return None
    if _port_type(config) is None:
        reason = f"{base} is a conventional multi-function device, which cannot isolate"
        return Merger(address, (), reason)
    return _judge_flags(address, f"the multi-function device {base}", config)


def _judge_flags(address: str, what: str, config: ConfigSpace) -> Merger | None:
    acs = config.find("acs")
    if acs is None:
        return Merger(address, tuple(REQUIRED.values()), f"{what} has no ACS capability")
    can, does = acs.fields.get("capabilities"), acs.fields.get("control")
    if not isinstance(can, dict) or not isinstance(does, dict):
        return Merger(address, (), f"the ACS capability of {address} cannot be read whole")
    missing = tuple(words for name, words in REQUIRED.items() if can.get(name) and not does[name])
    if not missing:
        return None
    return Merger(address, missing, f"{what} has ACS {', '.join(missing)} switched off")


def _port_type(config: ConfigSpace) -> str | None:
    """The PCI Express port type, or None for a conventional device."""
    pcie = config.find("pcie")
    kind = None if pcie is None else pcie.fields.get("port_type")
    return kind if isinstance(kind, str) else None
