"""From a policy and facts to steps: pure, so that it works on a snapshot of a distant host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace

from vfiotool.change.plans.bind import group_endpoints, load_steps, plan_bind, refuse_vgpu, stands
from vfiotool.change.plans.facts import DeviceFacts, Facts, SriovFacts, vf_address
from vfiotool.change.plans.mdev import plan_mdev_create
from vfiotool.change.plans.sriov import (
    PfGoal,
    give_back,
    hand_out,
    park_vf,
    plan_pf,
    sriov_of,
    without_vfs,
)
from vfiotool.change.plans.vdpa import plan_vdpa_add
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver, LoadModule
from vfiotool.change.steps.mdev import SetMdevAttribute
from vfiotool.change.steps.sriov import SetMsixCount, SetVfCount, SetVgpuType
from vfiotool.change.steps.state import PARKED, Binding
from vfiotool.change.steps.vf_network import SETTINGS, SetVfProperty, wanted_of
from vfiotool.devices.iommu import bridge_in_the_way, is_vfio_driver, role_of
from vfiotool.devices.vdpa import VdpaSettings
from vfiotool.errors import (
    Ambiguous,
    Foretold,
    NotFound,
    Refused,
    Unsupported,
    UsageError,
    VfiotoolError,
)
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.facts import MSIX, PolicyFacts
from vfiotool.policy.mdev_attributes import same_assignment
from vfiotool.policy.model import DeviceRule, MdevRule, Policy, SriovRule, VfRule
from vfiotool.policy.toml_places import Place

_VGPU = "nvidia/current_vgpu_type"


@dataclass(frozen=True)
class Refusal:
    """One reason for which `apply` would not begin: a blocker's kind or a fact foretold."""

    kind: str
    device: str | None
    detail: str
    evidence: str = ""

    def as_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "device": self.device,
            "detail": self.detail,
            "evidence": self.evidence,
        }


@dataclass(frozen=True)
class Plan:
    """The steps in their order, and the rules whose devices are absent, as text.

    `refusals` are the rules that cannot be followed, where `plan_policy` was asked to collect
    them; the steps of such a rule are left out.
    """

    steps: tuple[Step, ...]
    absent: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass
class _Draft:
    policy: Policy
    facts: PolicyFacts
    absent_ok: bool
    steps: list[Step] = field(default_factory=list)
    collect: bool = False
    absent: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    goals: dict[str, tuple[str | None, Place]] = field(default_factory=dict)


def plan_policy(
    policy: Policy, facts: PolicyFacts, *, absent_ok: bool = False, collect: bool = False
) -> Plan:
    """What has to be done for the host to be as the policy says; nothing if it is.

    VFs come first, then drivers, mdevs, vDPA. With `absent_ok` a rule that names nothing is left
    out and told; otherwise it raises NotFound. Raises Ambiguous where a rule names another number
    of devices than it expects, Refused where a group would not be viable or the kernel would not
    do it, and what the plans of the single commands raise; each error begins with the rule's
    place. With `collect` refusals do not end the planning: they stand in the plan, which then is
    to be looked at and not to be carried out.
    """
    policy = _spelt_as_here(policy, facts.facts)
    draft = _Draft(policy, facts, absent_ok, collect=collect)
    for sriov, names in zip(policy.sriov, facts.sriov, strict=True):
        with _rule(draft, sriov.place, f"[[sriov]] {sriov.match}"):
            for pf in _expected(names, sriov.count, str(sriov.match)):
                _plan_sriov(draft, sriov, pf)
    for device, names in zip(policy.devices, facts.devices, strict=True):
        with _rule(draft, device.place, f"[[device]] {device.match}"):
            for address in _expected(names, device.count, str(device.match)):
                _plan_device(draft, device, address)
    changed = {step.target for step in draft.steps}
    for device, names in zip(policy.devices, facts.devices, strict=True):
        with _rule(draft, device.place, ""):
            for address in names:
                if address in changed:
                    _refuse_unviable(draft, address)
    for mdev in policy.mdevs:
        with _rule(draft, mdev.place, f"[[mdev]] {mdev.uuid}"):
            _plan_mdev(draft, mdev)
    for vdpa in policy.vdpas:
        with _rule(draft, vdpa.place, f"[[vdpa]] {vdpa.name}"):
            assert facts.vdpa is not None
            settings = VdpaSettings(vdpa.mac, vdpa.mtu, vdpa.max_vqp, None)
            found = plan_vdpa_add(facts.vdpa, vdpa.name, vdpa.parent, vdpa.driver, settings)
            draft.steps += [step for step in found if step not in draft.steps]
    return Plan(tuple(draft.steps), tuple(draft.absent), tuple(draft.refusals))


def _spelt_as_here(policy: Policy, facts: Facts) -> Policy:
    """The policy with its drivers' names as this kernel spells them: `vfio_pci` is `vfio-pci`."""

    def named(driver: str | None) -> str | None:
        return None if driver is None else facts.driver(driver)

    devices = (replace(rule, driver=named(rule.driver)) for rule in policy.devices)
    sriov = (
        replace(
            rule,
            driver=named(rule.driver),
            vf=tuple(replace(vf, driver=named(vf.driver)) for vf in rule.vf),
        )
        for rule in policy.sriov
    )
    return replace(policy, devices=tuple(devices), sriov=tuple(sriov))


@contextmanager
def _rule(draft: _Draft, place: Place, what: str) -> Iterator[None]:
    """Puts the rule's place before errors; with `absent_ok` takes NotFound as a report."""
    where = f"{draft.policy.name}:{place[0]}"
    done = len(draft.steps)
    try:
        yield
    except NotFound as error:
        if not draft.absent_ok:
            raise _placed(where, error) from error
        del draft.steps[done:]
        draft.absent.append(f"{where}: {what}: {error.message}")
    except Refused as error:
        if not draft.collect:
            raise _placed(where, error) from error
        del draft.steps[done:]
        kind, evidence = error.kind, ""
        if isinstance(error, Foretold):
            kind, evidence = error.reason, error.evidence
        draft.refusals.append(Refusal(kind, error.device, f"{where}: {error.message}", evidence))
    except VfiotoolError as error:
        raise _placed(where, error) from error


def _placed(where: str, error: VfiotoolError) -> VfiotoolError:
    placed = copy(error)
    placed.message = f"{where}: {error.message}"
    placed.args = (placed.message,)
    return placed


def _expected(names: tuple[str, ...], count: int | None, match: str) -> tuple[str, ...]:
    if not names and count != 0:
        raise NotFound(f"no device matches {match}", hint="vfiotool devices lists what there is")
    if count is not None and len(names) != count:
        raise Ambiguous(
            f"{match} names {len(names)} devices where {count} are expected: {', '.join(names)}",
            hint="match more closely, by address, serial, slot or path",
        )
    return names


def _plan_sriov(draft: _Draft, rule: SriovRule, pf: str) -> None:
    facts = draft.facts
    device = facts.facts.device(pf)
    sriov = sriov_of(device)
    # VFs that are given a driver must not be taken by the host's first.
    quiet = False if any(vf.driver for vf in rule.vf) or _named_vfs(draft, pf) else rule.autoprobe
    goal = PfGoal(rule.vfs, quiet, rule.eswitch, rule.driver)
    plan = plan_pf(facts.facts, pf, goal, facts.settings.get(pf, ()))
    draft.steps += [step for step in plan.steps if step not in draft.steps]
    waiting = dict(plan.waiting)
    for vf in rule.vf:
        _plan_vf(draft, device, sriov, vf, plan.remade, waiting)
    draft.steps += [
        give_back(facts.facts, device, place, binding) for place, binding in waiting.items()
    ]


def _named_vfs(draft: _Draft, pf: str) -> bool:
    return any(rule.match.pf == pf for rule in draft.policy.devices)


def _plan_vf(
    draft: _Draft,
    device: DeviceFacts,
    sriov: SriovFacts,
    rule: VfRule,
    remade: bool,
    waiting: dict[str, Binding],
) -> None:
    """Set up one VF and give it its driver, which takes it from those that wait for theirs."""
    pf = device.address
    place = vf_address(pf, sriov, rule.index)
    _plan_vf_settings(draft, pf, rule, remade)
    if place is None and (rule.driver or rule.msix is not None or rule.vgpu_type is not None):
        raise Unsupported(
            f"{pf} does not tell where its VF {rule.index} will appear",
            hint="set its VFs first (vfiotool vf set), then apply the policy",
            device=pf,
        )
    if place is None:
        return
    numbers = {} if remade else draft.facts.numbers
    if rule.msix is not None and numbers.get((place, MSIX)) != rule.msix:
        _plan_msix(draft, place, numbers.get((place, MSIX)), rule.msix, remade, waiting)
    if rule.vgpu_type is not None and numbers.get((place, _VGPU)) != rule.vgpu_type:
        _plan_vgpu(draft, pf, place, rule.vgpu_type, remade)
    if rule.driver is not None:
        _bind_vf(draft, device, place, rule.driver, remade, waiting.pop(place, None))


def _plan_vgpu(draft: _Draft, pf: str, place: str, wanted: int, remade: bool) -> None:
    """Set a VF's vGPU type: one that has another type goes to 0 first.

    Raises Foretold for a type that is not among the creatable ones. The list of a VF that has a
    type, or is to be made anew, says nothing of what it will offer: then the card's others count.
    """
    now = None if remade else draft.facts.numbers.get((place, _VGPU))
    lists = draft.facts.creatable
    offered = dict(lists.get(place, {})) if not now and not remade else {}
    if not offered:
        device = draft.facts.facts.devices.get(pf)
        vfs = () if device is None or device.sriov is None else device.sriov.vfs
        offered = {key: text for vf in vfs for key, text in lists.get(vf, {}).items()}
    if wanted and (offered or place in lists) and wanted not in offered:
        types = ", ".join(f"{key} ({text})" for key, text in sorted(offered.items())) or "none"
        raise Foretold(
            f"{place} offers no vGPU type {wanted}: it can create {types}",
            reason="no-such-type",
            evidence=f"{SYS_PCI_DEVICES}/{place}/nvidia/creatable_vgpu_types",
            hint="types go when the card's memory does: set a VF that is not used to 0",
            device=place,
        )
    if now and wanted:
        draft.steps.append(SetVgpuType(place, now, 0))
        now = 0
    draft.steps.append(SetVgpuType(place, now, wanted))


def _plan_msix(
    draft: _Draft,
    place: str,
    before: int | None,
    after: int,
    remade: bool,
    waiting: dict[str, Binding],
) -> None:
    """The kernel wants the VF unbound for this (drivers/pci/iov.c, sriov_vf_msix_count_store)."""
    found = None if remade else draft.facts.facts.devices.get(place)
    if found is not None and found.binding.driver is not None and place not in waiting:
        draft.steps.append(park_vf(found))
        waiting[place] = found.binding
    draft.steps.append(SetMsixCount(place, before, after))


def _plan_vf_settings(draft: _Draft, pf: str, rule: VfRule, remade: bool) -> None:
    values = {name: getattr(rule, name, None) for name in SETTINGS}
    if rule.mac is not None:
        values["mac"] = rule.mac.lower()
    if not any(value is not None for value in values.values()):
        return
    wanted = VfSettings(rule.index, **values)
    known = {found.index: found for found in draft.facts.settings.get(pf, ())}
    found = None if remade else known.get(rule.index)
    if found is not None and wanted_of(found, wanted) == wanted:
        return
    before = VfSettings(rule.index) if found is None else wanted_of(found, wanted)
    draft.steps.append(SetVfProperty(pf, rule.index, before, wanted))


def _bind_vf(
    draft: _Draft,
    pf: DeviceFacts,
    place: str,
    driver: str,
    remade: bool,
    waiting: Binding | None = None,
) -> None:
    """Give a VF its driver; `waiting` is what it had where the plan has parked it before."""
    goal = Binding(None, PARKED) if driver == "none" else Binding(driver, driver)
    found = None if remade else draft.facts.facts.devices.get(place)
    before = Binding(None, PARKED) if waiting is not None else found.binding if found else None
    if found is not None and before is not None and stands(before, goal):
        return
    cleared = any(isinstance(step, SetVgpuType) and step.vf == place for step in draft.steps)
    if found is not None and not cleared:
        refuse_vgpu(found)
    draft.steps += load_steps(draft.facts.facts, draft.steps, goal.driver)
    if found is not None and before is not None:
        draft.steps.append(BindDriver(place, before, goal, found.identity))
    else:
        draft.steps.append(hand_out(pf, place, goal))


def _plan_device(draft: _Draft, rule: DeviceRule, address: str) -> None:
    facts = draft.facts.facts
    if rule.match.pf is not None:
        _plan_vf_rule(draft, rule, address)
        return
    facts = _with_planned_vfs(draft, facts, address)
    chosen = group_endpoints(facts, address) if rule.group == "whole" else (address,)
    for name in chosen:
        driver = rule.driver or facts.device(name).best_driver
        if not _claim(draft, name, driver, rule.place):
            continue
        for step in plan_bind(facts, [name], driver):
            if not isinstance(step, LoadModule) or step not in draft.steps:
                draft.steps.append(step)


def _with_planned_vfs(draft: _Draft, facts: Facts, address: str) -> Facts:
    """The facts as they will be once the [[sriov]] rules have been followed."""
    count = _planned_counts(draft).get(address)
    device = facts.device(address)
    if count is None or device.sriov is None:
        return facts
    if count:
        raise UsageError(
            f"{address} cannot change its driver and have {count} VFs",
            hint="give the driver that makes them in [[sriov]]: driver = …, or set vfs = 0",
            device=address,
        )
    return without_vfs(facts, address)


def _planned_counts(draft: _Draft) -> dict[str, int]:
    return {
        name: entry.vfs
        for entry, names in zip(draft.policy.sriov, draft.facts.sriov, strict=True)
        for name in names
    }


def _plan_vf_rule(draft: _Draft, rule: DeviceRule, address: str) -> None:
    pf = draft.facts.facts.device(rule.match.pf or "")
    sriov_of(pf)
    remade = any(
        isinstance(step, SetVfCount) and step.pf == pf.address and step.after
        for step in draft.steps
    )
    driver = rule.driver or "vfio-pci"
    if _claim(draft, address, driver, rule.place):
        _bind_vf(draft, pf, address, driver, remade)


def _claim(draft: _Draft, address: str, driver: str, place: Place) -> bool:
    """Whether this rule is the first to say where a device goes. Raises UsageError on a clash."""
    found = draft.goals.setdefault(address, (driver, place))
    if found[0] != driver:
        raise UsageError(
            f"{address} is to have {driver} here and {found[0]} by the rule in line {found[1][0]}",
            hint="match one of the rules more closely",
            device=address,
        )
    return found == (driver, place)


def _refuse_unviable(draft: _Draft, address: str) -> None:
    """A device meant for VFIO needs its whole group off the host's drivers."""
    facts = draft.facts.facts
    driver = draft.goals.get(address, ("", (0, 0)))[0] or ""
    device = facts.devices.get(address)
    if device is None or device.group is None or not is_vfio_driver(driver):
        return
    for name in facts.members.get(device.group, ()):
        other = facts.devices.get(name)
        if other is None or name in draft.goals or role_of(other.binding.driver) != "host":
            continue
        raise Refused(
            f"{address} shares group {device.group} with {name}, which stays on "
            f"{other.binding.driver}: the group would not be viable",
            hint="leave that bridge without a driver by a rule of its own: match its address, "
            'driver = "none"'
            if bridge_in_the_way(other.class_code, other.binding.driver)
            else 'group = "whole" takes the other endpoints along',
            device=address,
        )


def _plan_mdev(draft: _Draft, rule: MdevRule) -> None:
    facts = draft.facts
    made = plan_mdev_create(facts.types, facts.mdevs, rule.parent, rule.type, rule.uuid)
    draft.steps += made
    matrix = () if made else facts.matrices.get(rule.uuid, ())
    assigned = {pair for pair in rule.attrs if same_assignment(*pair, matrix)}
    wanted = dict(pair for pair in rule.attrs if pair not in assigned)
    found = {} if made else {name: facts.attributes.get((rule.uuid, name)) for name in wanted}
    if all(found.get(name) == value for name, value in wanted.items()):
        return
    for name, value in rule.attrs:
        if (name, value) in assigned:
            # Assigning it again is an error of the kernel's.
            continue
        # In the file's order, a repeated one each time: their order may matter to the parent.
        draft.steps.append(SetMdevAttribute(rule.uuid, name, found.get(name), value))
        found[name] = value
