"""A policy as frozen values: what each rule asks for, and where in the file it stands."""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.policy.toml_places import Place


@dataclass(frozen=True)
class Match:
    """Which devices a rule is about; all keys that are not None must hold."""

    address: str | None = None
    id: str | None = None
    serial: str | None = None
    slot: str | None = None
    path: str | None = None
    net: str | None = None
    pf: str | None = None
    index: int | None = None

    def __str__(self) -> str:
        pairs = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return ", ".join(f"{name} {value}" for name, value in pairs if value is not None)


@dataclass(frozen=True)
class DeviceRule:
    """`[[device]]`: a driver for what `match` names. `count` is the number that it must name."""

    match: Match
    driver: str | None = None
    group: str = "refuse"
    count: int | None = None
    place: Place = (0, 0)


@dataclass(frozen=True)
class VfRule:
    """One VF's settings, set on its physical function's interface before it is handed over."""

    index: int
    mac: str | None = None
    vlan: int | None = None
    qos: int | None = None
    trust: bool | None = None
    spoof_check: bool | None = None
    min_rate_mbps: int | None = None
    max_rate_mbps: int | None = None
    driver: str | None = None
    msix: int | None = None
    vgpu_type: int | None = None


@dataclass(frozen=True)
class SriovRule:
    """`[[sriov]]`: how many VFs, whether host drivers are offered them, and what each is like.

    `driver` is the physical function's; `vf_token` is what opens the VFs of one on vfio-pci.
    """

    match: Match
    vfs: int
    autoprobe: bool | None = None
    eswitch: str | None = None
    driver: str | None = None
    vf_token: str | None = None
    vf: tuple[VfRule, ...] = ()
    count: int | None = None
    place: Place = (0, 0)


@dataclass(frozen=True)
class MdevRule:
    """`[[mdev]]`: an instance and its attributes, which are written in their order."""

    parent: str
    type: str
    uuid: str
    attrs: tuple[tuple[str, str], ...] = ()
    place: Place = (0, 0)


@dataclass(frozen=True)
class VdpaRule:
    """`[[vdpa]]`: a device on a vDPA parent."""

    name: str
    parent: str
    driver: str | None = None
    mac: str | None = None
    mtu: int | None = None
    max_vqp: int | None = None
    place: Place = (0, 0)


@dataclass(frozen=True)
class Policy:
    """All rules in the file's order. `name` is the file's, for errors."""

    name: str
    text: str
    devices: tuple[DeviceRule, ...] = ()
    sriov: tuple[SriovRule, ...] = ()
    mdevs: tuple[MdevRule, ...] = ()
    vdpas: tuple[VdpaRule, ...] = ()
