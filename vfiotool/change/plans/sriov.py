"""Plans for a physical function: its driver, its eswitch mode, its VFs. Pure, as plan.py is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vfiotool.change.plans.bind import plan_bind, stands
from vfiotool.change.plans.facts import DeviceFacts, Facts, SriovFacts, vf_address, vf_routing
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver
from vfiotool.change.steps.eswitch import SetEswitchMode
from vfiotool.change.steps.sriov import SetAutoprobe, SetVfCount
from vfiotool.change.steps.state import ANY, PARKED, Binding, Identity
from vfiotool.change.steps.vf_network import SetVfProperty
from vfiotool.devices.sriov import NO_ESWITCH
from vfiotool.errors import Foretold, Refused, Unsupported, UsageError
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.netlink.route import VfSettings

LEGACY, SWITCHDEV = "legacy", "switchdev"
# Drivers that make VFs in legacy mode and switch with them there, unbound (eswitch_offloads.c of
# mlx5, bnxt_vfr.c). The others want no VF while they switch, and say so (ice: ice_eswitch.c).
VFS_FIRST = frozenset({"mlx5_core", "bnxt_en"})


@dataclass(frozen=True)
class PfGoal:
    """What is wanted of a physical function; None leaves a thing as it is.

    `autoprobe` is whether the kernel offers new VFs to host drivers; `driver` is the physical
    function's own.
    """

    vfs: int
    autoprobe: bool | None = None
    eswitch: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class PfPlan:
    """The steps up to where the VFs stand as wanted, but for their drivers.

    `remade` tells that all VFs are new. `waiting` maps each VF that was kept from its driver, by
    address, to what it is to get back once it is set up: see `give_back`.
    """

    steps: tuple[Step, ...]
    remade: bool
    waiting: Mapping[str, Binding]


def plan_vf_count(
    facts: Facts,
    pf: str,
    count: int,
    *,
    autoprobe: bool | None = None,
    eswitch: str | None = None,
    settings: Iterable[VfSettings] = (),
) -> tuple[Step, ...]:
    """Set a physical function's number of VFs, and its eswitch mode. Raises as `plan_pf`."""
    plan = plan_pf(facts, pf, PfGoal(count, autoprobe, eswitch), settings)
    device = facts.device(pf)
    back = (give_back(facts, device, vf, binding) for vf, binding in plan.waiting.items())
    return (*plan.steps, *back)


def plan_pf(facts: Facts, pf: str, goal: PfGoal, settings: Iterable[VfSettings] = ()) -> PfPlan:
    """Bring a physical function to its goal, its VFs not yet handed out.

    VFs that will be destroyed let go of their drivers first, so that undoing gives them back;
    `settings` are those VFs' addresses and VLANs, which undoing gives back too. Raises NotFound,
    Unsupported without SR-IOV or eswitch, UsageError for what cannot be, Refused where vfio-pci
    may not make VFs, Foretold where there is no memory or no bus number for them.
    """
    device = facts.device(pf)
    sriov = sriov_of(device)
    if not 0 <= goal.vfs <= sriov.total:
        raise UsageError(
            f"{pf} can have 0 to {sriov.total} VFs, not {goal.vfs}", hint=f"vfiotool vf list {pf}"
        )
    if goal.driver == "none" and goal.vfs:
        raise UsageError(f"{pf} cannot have {goal.vfs} VFs without a driver", device=pf)
    _refuse_eswitch(device, sriov, goal)
    draft = _Draft(facts, device, sriov, goal, tuple(settings))
    moves = goal.driver is not None and not stands(device.binding, _binding(goal.driver))
    if goal.vfs and (moves or sriov.num != goal.vfs):
        _refuse_vfio(facts, device, goal)
        _refuse_without_room(device, sriov, goal.vfs)
    if goal.driver is not None and moves:
        draft.remake(plan_bind(without_vfs(facts, pf), [pf], goal.driver))
    elif device.binding.driver in VFS_FIRST:
        draft.switch_with_vfs()
    elif goal.eswitch not in (None, sriov.eswitch):
        draft.remake((draft.mode(sriov.eswitch, goal.eswitch or LEGACY),))
    else:
        draft.count(sriov.num, goal.vfs)
    return PfPlan(tuple(draft.steps), draft.remade, draft.waiting)


class _Draft:
    """The steps of one physical function, as they are collected."""

    def __init__(
        self,
        facts: Facts,
        device: DeviceFacts,
        sriov: SriovFacts,
        goal: PfGoal,
        settings: tuple[VfSettings, ...],
    ) -> None:
        self.facts, self.device, self.sriov, self.goal = facts, device, sriov, goal
        self.settings = settings
        self.steps: list[Step] = []
        self.remade = False
        self.waiting: dict[str, Binding] = {}

    def mode(self, before: str | None, after: str) -> Step:
        return SetEswitchMode(self.device.address, before, after, self.device.identity)

    def remake(self, between: Iterable[Step]) -> None:
        """Have no VFs while `between` runs, and all of them anew afterwards."""
        self.count(self.sriov.num, 0)
        self.steps += between
        self.count(0, self.goal.vfs)

    def switch_with_vfs(self) -> None:
        """Make the VFs in legacy mode, and switch while they are there and unbound."""
        have, want = self.sriov.num, self.goal.vfs
        now, mode = self.sriov.eswitch, self.goal.eswitch or self.sriov.eswitch
        to_legacy = now == SWITCHDEV and (have != want or mode == LEGACY)
        to_switchdev = mode == SWITCHDEV and (now != SWITCHDEV or to_legacy)
        if have == want and (to_legacy or to_switchdev):
            self.unbind()
        if to_legacy:
            if have != want:
                self.steps += self._farewell()
            self.steps.append(self.mode(SWITCHDEV, LEGACY))
        self.count(have, want, quiet=to_switchdev, farewell=not to_legacy)
        if to_switchdev:
            self.steps.append(self.mode(LEGACY if to_legacy else now, SWITCHDEV))

    def unbind(self) -> None:
        """Keep the VFs that stay from their drivers until they are given back."""
        for vf in self.sriov.vfs:
            device = self.facts.devices.get(vf)
            if device is not None and device.binding.driver is not None:
                self.steps.append(park_vf(device))
                self.waiting[vf] = device.binding

    def count(self, have: int, want: int, *, quiet: bool = False, farewell: bool = True) -> None:
        """Change the number of VFs; with `quiet` the new ones wait for their drivers."""
        if have == want:
            return
        if have and farewell:
            self.steps += self._farewell()
        probing = self.sriov.autoprobe
        wanted = probing if self.goal.autoprobe is None else self.goal.autoprobe
        offered = wanted and not quiet
        pf = self.device.address
        change = probing is not None and offered is not None and offered != probing
        if change:
            self.steps.append(SetAutoprobe(pf, bool(probing), bool(offered)))
        self.steps.append(SetVfCount(pf, have, want, self.device.identity))
        if change:
            self.steps.append(SetAutoprobe(pf, bool(offered), bool(probing)))
        self.remade = want > 0
        if wanted and quiet:
            places = (vf_address(pf, self.sriov, index) for index in range(want))
            self.waiting.update((place, Binding(ANY, None)) for place in places if place)

    def _farewell(self) -> list[Step]:
        """What undoing needs to know of the VFs before they are destroyed."""
        pf = self.device.address
        steps: list[Step] = [
            SetVfProperty(pf, found.index, found, found, keep=True)
            for found in self.settings
            if found.index < self.sriov.num
        ]
        for vf in self.sriov.vfs:
            device = self.facts.devices.get(vf)
            if device is not None:
                # One without a driver needs no parking, but undoing must leave it without again.
                parked = Binding(None, PARKED)
                goal = device.binding if device.binding.driver is None else parked
                steps.append(BindDriver(vf, device.binding, goal, device.identity, fresh=True))
        return steps


def park_vf(device: DeviceFacts) -> Step:
    return BindDriver(device.address, device.binding, Binding(None, PARKED), device.identity)


def give_back(facts: Facts, pf: DeviceFacts, vf: str, binding: Binding) -> Step:
    """The step that gives a waiting VF its driver; a new one what the kernel chooses."""
    if binding.driver == ANY:
        return hand_out(pf, vf, binding)
    identity = facts.device(vf).identity
    return BindDriver(vf, Binding(None, PARKED), binding, identity)


def hand_out(pf: DeviceFacts, vf: str, binding: Binding) -> Step:
    """The step that gives a VF a driver which the same plan makes."""
    device = None if pf.sriov is None else pf.sriov.vf_device
    identity = Identity(vendor=pf.identity.vendor, device=device)
    return BindDriver(vf, Binding(None, None), binding, identity, fresh=True)


def sriov_of(device: DeviceFacts) -> SriovFacts:
    """Raises Unsupported."""
    if device.sriov is None:
        raise Unsupported(
            f"{device.address} has no SR-IOV capability that the kernel would drive",
            hint="vfiotool vf list shows the physical functions that have",
            device=device.address,
        )
    return device.sriov


def without_vfs(facts: Facts, pf: str) -> Facts:
    """The facts as they will be once the function's VFs are gone."""
    device = facts.device(pf)
    if device.sriov is None:
        return facts
    bare = replace(device, sriov=replace(device.sriov, num=0, vfs=()))
    return replace(facts, devices={**facts.devices, pf: bare})


def _binding(driver: str) -> Binding:
    return Binding(None, PARKED) if driver == "none" else Binding(driver, driver)


def _refuse_eswitch(device: DeviceFacts, sriov: SriovFacts, goal: PfGoal) -> None:
    if goal.eswitch is None or sriov.eswitch != NO_ESWITCH:
        return
    raise Unsupported(
        f"{device.address} has no eswitch: its driver, {device.binding}, knows no modes",
        hint="mlx5_core, ice, bnxt_en and others have; leave eswitch out for the rest",
        device=device.address,
    )


def _refuse_without_room(device: DeviceFacts, sriov: SriovFacts, count: int) -> None:
    """The kernel makes VFs only with memory and bus numbers for all of them.

    Source: drivers/pci/iov.c, sriov_enable ("not enough MMIO resources for SR-IOV", "bus %02x out
    of range").
    """
    pf = device.address
    if sriov.vf_memory is False:
        raise Foretold(
            f"the firmware gave the VFs of {pf} no memory: the kernel would refuse to make any",
            reason="no-vf-memory",
            evidence=f"{SYS_PCI_DEVICES}/{pf}/resource, lines 8 to 13",
            hint="switch on Above 4G Decoding and SR-IOV in the firmware's set-up, or boot with "
            "pci=realloc",
            device=pf,
        )
    last = 0xFF if sriov.last_bus is None else sriov.last_bus
    routing = vf_routing(pf, sriov, count - 1)
    if routing is None or routing >> 8 <= last or count <= sriov.num:
        return
    first = vf_routing(pf, sriov, 0) or 0
    fitting = max(0, ((last << 8) + 0xFF - first) // max(sriov.stride or 1, 1) + 1)
    seen = f"{SYS_PCI_DEVICES}/{pf}/sriov_offset, sriov_stride"
    raise Foretold(
        f"VF {count - 1} of {pf} would be on bus {routing >> 8:02x}, and the buses there end at "
        f"{last:02x}: the kernel would refuse to make {count} VFs",
        reason="no-bus-number",
        evidence=seen if sriov.last_bus is None else f"{seen}; subordinate_bus_number above it",
        hint=f"at most {fitting} VFs fit; pci=assign-busses on the kernel's command line may make "
        "room for more",
        device=pf,
    )


def _refuse_vfio(facts: Facts, device: DeviceFacts, goal: PfGoal) -> None:
    """vfio-pci makes VFs only if its `enable_sriov` is set (drivers/vfio/pci/vfio_pci.c)."""
    bound = device.binding.driver == "vfio-pci" and goal.driver in (None, "vfio-pci")
    if facts.vfio_makes_vfs or not (bound or goal.driver == "vfio-pci"):
        return
    if facts.vfio_makes_vfs is None and not bound:
        # Not loaded yet: its option is told when it is.
        return
    raise Refused(
        f"vfio-pci makes no VFs of {device.address}: its option enable_sriov is not set",
        hint="it is for drivers in user space that know their VFs: "
        "echo Y > /sys/module/vfio_pci/parameters/enable_sriov, and for every boot "
        "'options vfio-pci enable_sriov=1' in modprobe.d",
        device=device.address,
    )
