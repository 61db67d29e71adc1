"""What planning a policy needs to know of a host, read in as few reads as its rules allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from vfiotool.change.journal import Journal, Origin
from vfiotool.change.plans.facts import Facts, read_facts, vf_address
from vfiotool.change.plans.vdpa_facts import VdpaFacts, read_vdpa_facts
from vfiotool.change.steps.state import read_binding, read_msix_count, read_pci_identity
from vfiotool.change.steps.vf_network import read_settings
from vfiotool.devices.mdev import Mdev, MdevType, read_mdev_types, read_mdevs
from vfiotool.devices.pci import PciIdentity, list_addresses, read_identity
from vfiotool.devices.serial import drive_serials, same_serial
from vfiotool.devices.vgpu import parse_creatable, type_path
from vfiotool.errors import NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_MDEV_DEVICES, SYS_PCI_DEVICES
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.mdev_attributes import read_matrix
from vfiotool.policy.model import Match, Policy

MSIX = "msix"


@dataclass(frozen=True)
class PolicyFacts:
    """`devices[i]` and `sriov[i]` are what the i-th rule of that kind names, in bus order.

    `matrices` is what each AP matrix has been assigned, by UUID; its attributes cannot be read.
    `creatable` holds the vGPU types, by number, that each VF of NVIDIA's driver offers now.
    """

    facts: Facts
    devices: tuple[tuple[str, ...], ...]
    sriov: tuple[tuple[str, ...], ...]
    settings: Mapping[str, tuple[VfSettings, ...]]
    attributes: Mapping[tuple[str, str], str]
    numbers: Mapping[tuple[str, str], int]
    types: tuple[MdevType, ...] = ()
    mdevs: tuple[Mdev, ...] = ()
    vdpa: VdpaFacts | None = None
    creatable: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    matrices: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)


def read_policy_facts(host: Host, policy: Policy, journal: Journal | None = None) -> PolicyFacts:
    """Raises Stuck if the lock of a device that a rule names is held."""
    finder = _Finder(host, journal)
    sriov = tuple(finder.find(rule.match) for rule in policy.sriov)
    functions = {name for names in sriov for name in names}
    functions |= {rule.match.pf for rule in policy.devices if rule.match.pf is not None}
    drivers = _drivers_of(policy)
    early = read_facts(
        host,
        sorted(functions),
        journal,
        eswitch_wanted=bool(functions),
        drivers_wanted=drivers,
    )
    made = _vfs_to_be(policy, sriov, early)
    devices = tuple(
        made.get((rule.match.pf, rule.match.index), ())
        if rule.match.pf is not None
        else finder.find(rule.match)
        for rule in policy.devices
    )
    named = {name for names in devices for name in names}
    facts = early
    if named:
        facts = read_facts(
            host,
            sorted(named | functions),
            journal,
            whole_groups=True,
            eswitch_wanted=bool(functions),
            drivers_wanted=drivers,
        )
    settings: dict[str, tuple[VfSettings, ...]] = {}
    for rule, names in zip(policy.sriov, sriov, strict=True):
        for name in names:
            # A function that is to keep its VFs as they are need not be asked about them.
            if rule.vf or facts.devices[name].sriov is not None:
                settings[name] = read_settings(host, name) or ()
    return PolicyFacts(
        facts=facts,
        devices=devices,
        sriov=sriov,
        settings=settings,
        attributes=_read_attributes(host, policy),
        numbers=_read_numbers(host, facts, sriov),
        types=read_mdev_types(host) if policy.mdevs else (),
        mdevs=read_mdevs(host) if policy.mdevs else (),
        vdpa=read_vdpa_facts(host) if policy.vdpas else None,
        creatable=_read_creatable(host, facts, policy, sriov),
        matrices=_read_matrices(host, policy),
    )


def _read_matrices(host: Host, policy: Policy) -> dict[str, tuple[tuple[str, str], ...]]:
    found = ((rule.uuid, read_matrix(host, rule.uuid)) for rule in policy.mdevs if rule.attrs)
    return {uuid: pairs for uuid, pairs in found if pairs is not None}


def _drivers_of(policy: Policy) -> tuple[str, ...]:
    """The drivers that rules ask for by name."""
    named = {rule.driver for rule in policy.devices}
    named |= {rule.driver for rule in policy.sriov}
    named |= {vf.driver for rule in policy.sriov for vf in rule.vf}
    return tuple(sorted(name for name in named if name is not None))


def _read_creatable(
    host: Host, facts: Facts, policy: Policy, sriov: Iterable[tuple[str, ...]]
) -> dict[str, Mapping[int, str]]:
    found: dict[str, Mapping[int, str]] = {}
    for rule, names in zip(policy.sriov, sriov, strict=True):
        if all(vf.vgpu_type is None for vf in rule.vf):
            continue
        for pf in names:
            device = facts.devices.get(pf)
            for vf in () if device is None or device.sriov is None else device.sriov.vfs:
                text = host.read(f"{SYS_PCI_DEVICES}/{vf}/nvidia/creatable_vgpu_types")
                if text is not None:
                    found[vf] = parse_creatable(text)
    return found


def _vfs_to_be(
    policy: Policy, sriov: Iterable[tuple[str, ...]], facts: Facts
) -> dict[tuple[str | None, int | None], tuple[str, ...]]:
    """Where the VF of each PF and index stands, or will stand once the policy has made it."""
    found: dict[tuple[str | None, int | None], tuple[str, ...]] = {}
    counts = {
        name: rule.vfs for rule, names in zip(policy.sriov, sriov, strict=True) for name in names
    }
    for name, device in facts.devices.items():
        if device.sriov is None:
            continue
        for index in range(max(device.sriov.num, counts.get(name, 0))):
            place = vf_address(name, device.sriov, index)
            if place is not None and index < counts.get(name, device.sriov.num):
                found[name, index] = (place,)
    return found


def _read_attributes(host: Host, policy: Policy) -> dict[tuple[str, str], str]:
    found = {}
    for rule in policy.mdevs:
        for name, _ in rule.attrs:
            text = host.read(f"{SYS_MDEV_DEVICES}/{rule.uuid}/{name}")
            if text is not None:
                found[rule.uuid, name] = text
    return found


def _read_numbers(
    host: Host, facts: Facts, sriov: Iterable[tuple[str, ...]]
) -> dict[tuple[str, str], int]:
    """MSI-X counts and vGPU types of the VFs that there are."""
    found = {}
    for pf in {name for names in sriov for name in names}:
        device = facts.devices.get(pf)
        vfs = device.sriov.vfs if device is not None and device.sriov is not None else ()
        for vf in vfs:
            numbers = {
                MSIX: read_msix_count(host, vf),
                "nvidia/current_vgpu_type": host.read_int(type_path(vf)),
            }
            found.update({(vf, name): n for name, n in numbers.items() if n is not None})
    return found


class _Finder:
    """Finds what rules name; the ids of all functions are read once, if any rule asks for them."""

    def __init__(self, host: Host, journal: Journal | None) -> None:
        self.host = host
        self.journal = journal
        self.by_id: dict[str, list[str]] | None = None

    def find(self, match: Match) -> tuple[str, ...]:
        found: set[str] | None = None
        if match.address is not None:
            there = self.host.exists(f"{SYS_PCI_DEVICES}/{match.address}")
            found = {match.address} if there else set()
        if match.id is not None and (found is None or found):
            found = self._narrow(found, self._with_id(match.id, found))
        for kind in ("serial", "slot", "path", "net"):
            text = getattr(match, kind)
            if text is not None and (found is None or found):
                found = self._narrow(found, self._selected(kind, text))
        return tuple(sorted(found or ()))

    @staticmethod
    def _narrow(found: set[str] | None, more: set[str]) -> set[str]:
        return more if found is None else found & more

    def _selected(self, kind: str, text: str) -> set[str]:
        from vfiotool.devices.selector import resolve_all

        found = self._remembered(text) if kind == "serial" else set()
        try:
            return found | set(resolve_all(self.host, f"{kind}:{text}"))
        except NotFound:
            return found

    def _remembered(self, serial: str) -> set[str]:
        """The functions that had a drive of that serial number when they were taken from it.

        Only those that stand as they were left: an override does not outlive a hot-unplug, after
        which another disk of the same kind may be at the address.
        """
        found = set()
        for name, origin in self._origins.items():
            if not any(same_serial(text, serial) for text in origin.serials):
                continue
            try:
                identity = read_pci_identity(self.host, name)
                binding = read_binding(self.host, "pci", name)
            except NotFound:
                continue
            kept = binding.taken and binding.override is not None
            if kept and not origin.identity.differs_from(identity):
                found.add(name)
        # A drive that shows itself is believed before any memory.
        return {name for name in found if not drive_serials(self.host, name)}

    @cached_property
    def _origins(self) -> dict[str, Origin]:
        return {} if self.journal is None else self.journal.origins("pci")

    def _with_id(self, wanted: str, among: set[str] | None) -> set[str]:
        if among is not None:
            pairs = ((name, read_identity(self.host, name)) for name in among)
            return {name for name, found in pairs if found is not None and wanted in _ids(found)}
        if self.by_id is None:
            self.by_id = {}
            for address in list_addresses(self.host):
                identity = read_identity(self.host, address)
                for text in _ids(identity) if identity is not None else ():
                    self.by_id.setdefault(text, []).append(address)
        return set(self.by_id.get(wanted, ()))


def _ids(identity: PciIdentity) -> tuple[str, str]:
    pair = f"{identity.vendor}:{identity.device}"
    return pair, f"{pair}:{identity.subsystem_vendor}:{identity.subsystem_device}"
