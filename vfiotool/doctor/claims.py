"""Which tools claim a device, and which devices of this host they mean."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from vfiotool.devices.attached import is_part_of, net_paths
from vfiotool.devices.inventory import Inventory
from vfiotool.devices.pci import Address
from vfiotool.host.host import Host
from vfiotool.host.paths import OTHER_TOOLS, PROC_CMDLINE, SYS_MDEV_DEVICES, SYS_NET

VF_TOOLS = {"NetworkManager", "systemd.link", "netplan"}


@dataclass(frozen=True, slots=True)
class Claim:
    """One tool's word on one device. `device` is as host/claims.py writes it."""

    tool: str
    file: str
    device: str
    setting: str


@dataclass(frozen=True, slots=True)
class ResolvedClaim:
    """A claim and the devices here that it means; none if it means none that is present."""

    claim: Claim
    devices: tuple[str, ...]


def read_claims(host: Host) -> tuple[Claim, ...]:
    """All tools' claims, and the kernel command line's `vfio-pci.ids=`."""
    lines = [line.split("\t") for line in (host.read(OTHER_TOOLS) or "").splitlines()]
    found = [Claim(*fields) for fields in lines if len(fields) == 4]
    for word in (host.read(PROC_CMDLINE) or "").split():
        name, _, value = word.partition("=")
        if name.replace("_", "-") != "vfio-pci.ids":
            continue
        for entry in value.lower().split(","):
            ident = ":".join(entry.split(":")[:2])
            found.append(Claim("kernel command line", PROC_CMDLINE, f"id:{ident}", word))
    return tuple(found)


def read_resolved_claims(host: Host, inventory: Inventory) -> tuple[ResolvedClaim, ...]:
    """All claims with what they mean on this host."""
    return tuple(
        ResolvedClaim(claim, resolve_claim(host, inventory, claim)) for claim in read_claims(host)
    )


def resolve_claim(host: Host, inventory: Inventory, claim: Claim) -> tuple[str, ...]:
    """The devices here that a claim means; empty if it means none that is present."""
    kind, _, value = claim.device.partition(":")
    if kind == "pci":
        known = Address.is_address(value)
        name = str(Address.parse(value)) if known else value
        return (name,) if name in inventory.by_address else ()
    if kind == "mdev":
        return (value,) if host.exists(f"{SYS_MDEV_DEVICES}/{value}") else ()
    if kind == "id":
        return tuple(
            function.address
            for function in inventory.functions
            if value == f"{function.vendor}:{function.device}"
        )
    if kind == "path":
        name = value.removeprefix("pci-")
        return (name,) if name in inventory.by_address else ()
    paths = [
        path
        for name, path in net_paths(host).items()
        if (kind == "interface" and fnmatchcase(name, value))
        or kind == "netdriver"
        or (kind == "mac" and host.read(f"{SYS_NET}/{name}/address") == value.lower())
    ]
    return tuple(
        function.address
        for function in inventory.functions
        if any(is_part_of(function.path, path) for path in paths)
        and (kind != "netdriver" or function.driver == value)
    )
