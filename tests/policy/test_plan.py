"""Plans are pure: the same policy on the same host gives the same steps, and so does undoing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.change.changing import (
    BEHIND,
    BESIDE,
    BRIDGE,
    EDU,
    NIC,
    NVME,
    STUBBORN,
    UUID,
    binding,
    counting,
    do,
    furnished,
    run_folder,
)
from tests.fakes.kernel import FakeKernel
from vfiotool.change.journal import Journal
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.registry import step_from_json, step_kinds, step_to_json
from vfiotool.change.undo import undo
from vfiotool.devices.drivers import best_driver, parse_variants
from vfiotool.errors import (
    Ambiguous,
    KernelError,
    NotFound,
    Refused,
    Unsupported,
    UsageError,
)
from vfiotool.host.host import Host
from vfiotool.policy.export import export_policy
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import Plan, plan_policy
from vfiotool.policy.saved import parse_saved, plan_to_text, refuse_changed
from vfiotool.snapshot.load import open_root

ROOT = Path(__file__).resolve().parents[2]
PLANS = sorted(path.name for path in (ROOT / "fixtures/plans").iterdir())
POLICIES = sorted(path.name for path in (ROOT / "policies").glob("*.toml"))


def lines_of(steps: tuple[Step, ...]) -> str:
    rows = []
    for number, step in enumerate(steps, 1):
        before, after = step.ends()
        rows.append(f"{number}. {step.verb} {step.target}: {before} -> {after}\n")
    return "".join(rows) or "in sync\n"


def plan_on(host: Host, text: str, journal: Journal | None = None, **options: bool) -> Plan:
    policy = parse_policy(text)
    return plan_policy(policy, read_policy_facts(host, policy, journal), **options)


def apply(kernel: FakeKernel, text: str, folder: str) -> None:
    host, journal = kernel.host(), Journal(kernel.host(), folder)
    do(host, journal, lambda h, j: plan_on(h, text, j).steps)


def device(**match: str) -> str:
    inside = ", ".join(f'{key} = "{value}"' for key, value in match.items())
    return f"[[device]]\nmatch = {{ {inside} }}\n"


HEAD = "version = 1\n"


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_snapshots_are_as_recorded(name: str) -> None:
    folder = ROOT / "fixtures/plans" / name
    text = (folder / "policy.toml").read_text()
    match = re.match(r"# host: (\S+)\n", text)
    assert match is not None
    steps = plan_on(open_root(str(ROOT / "fixtures/hosts" / match[1])), text).steps
    back = tuple(inverse for step in reversed(steps) if (inverse := step.inverse()) is not None)
    if os.environ.get("VFIOTOOL_RECORD_PLANS"):
        (folder / "plan.txt").write_text(lines_of(steps))
        (folder / "undo.txt").write_text(lines_of(back))
    assert lines_of(steps) == (folder / "plan.txt").read_text()
    assert lines_of(back) == (folder / "undo.txt").read_text()


def furnished_for_all() -> FakeKernel:
    """A host on which each worked example finds its devices, but for vDPA."""
    kernel = furnished()
    gpu = {"class_code": "030000", "group": 20}
    kernel.add_function("0000:41:00.0", "10de:2684", **gpu)  # type: ignore[arg-type]
    kernel.add_function("0000:41:00.1", "10de:22ba", class_code="040300", group=20)
    return kernel


@pytest.mark.parametrize("name", POLICIES)
def test_each_worked_example_is_planned_applied_and_undone(name: str) -> None:
    text = (ROOT / "policies" / name).read_text()
    kernel = furnished_for_all()
    if "vdpa" in name:
        # vDPA is planned over netlink, which the fake kernel has not: tests/lab plans it.
        assert parse_policy(text).vdpas
        return
    before = kernel.state()
    with run_folder() as folder:
        apply(kernel, text, folder)
        assert kernel.state() != before
        journal = Journal(kernel.host(), folder)
        assert plan_on(kernel.host(), text, journal).steps == ()
        undo(kernel.host(), journal)
    assert kernel.state() == before


def test_export_then_plan_is_empty() -> None:
    kernel = furnished_for_all()
    with run_folder() as folder:
        for name in ("mixed", "gpu"):
            apply(kernel, (ROOT / f"policies/{name}.toml").read_text(), folder)
    text = export_policy(kernel.host())
    assert plan_on(kernel.host(), text).steps == ()
    assert {"[[device]]", "[[sriov]]", "[[mdev]]"} <= set(text.splitlines())


def test_an_export_holds_the_settings_of_vfs() -> None:
    kernel = furnished()
    rule = 'mac = "52:54:00:00:00:07", vlan = 9, trust = true, spoof_check = false'
    rule += ', max_rate_mbps = 100, driver = "vfio-pci"'
    text = f'''{HEAD}[[sriov]]
match = {{ address = "{NIC}" }}
vfs = 2
vf = [ {{ index = 1, {rule} }} ]
'''
    with run_folder() as folder:
        apply(kernel, text, folder)
        exported = export_policy(kernel.host())
        (rule,) = parse_policy(exported).sriov
        wanted = parse_policy(text).sriov[0].vf[0]
        assert rule.vf[1] == wanted
        # A host that was started anew comes to the same VFs, the random addresses included.
        before = kernel.state()
        do(kernel.host(), Journal(kernel.host(), folder), counting(NIC, 0))
        apply(kernel, exported, folder)
    assert kernel.state() == before


def test_vfs_get_their_settings_before_they_are_handed_over() -> None:
    text = (ROOT / "policies/nic-vfs.toml").read_text()
    verbs = [step.verb for step in plan_on(furnished().host(), text).steps]
    assert verbs.index("set-vf-property") < verbs.index("bind-driver")
    assert verbs[:3] == ["set-autoprobe", "set-vf-count", "set-autoprobe"]


def test_vgpus_without_mdev_are_types_of_vfs_that_stay_on_their_driver() -> None:
    kernel = furnished()
    kernel.add_driver("nvidia", ["10de:2230"])
    card = "0000:81:00.0"
    kernel.add_function(
        card, "10de:2230", class_code="030200", driver="nvidia", group=30, total_vfs=4, offset=4
    )
    text = f'''{HEAD}[[sriov]]
match = {{ address = "{card}" }}
vfs = 2
vf = [ {{ index = 0, vgpu_type = 558 }}, {{ index = 1, vgpu_type = 559 }} ]
'''
    before = kernel.state()
    with run_folder() as folder:
        apply(kernel, text, folder)
        first = kernel.vf_address(card, 0)
        assert kernel.read(f"/sys/bus/pci/devices/{first}/nvidia/current_vgpu_type") == b"558\n"
        assert kernel.driver_of(first) == "nvidia"
        assert plan_on(kernel.host(), text).steps == ()
        changed = text.replace("559", "560")
        steps = plan_on(kernel.host(), changed).steps
        # A VF that has a type has to give it up before it can have another.
        assert [step.ends() for step in steps] == [("559", "0"), ("0", "560")]
        apply(kernel, changed, folder)
        journal = Journal(kernel.host(), folder)
        undo(kernel.host(), journal)
        assert plan_on(kernel.host(), text).steps == ()
        undo(kernel.host(), journal)
    assert kernel.state() == before


def test_a_vf_whose_own_types_are_unknown_offers_what_the_cards_others_do() -> None:
    kernel = furnished()
    kernel.add_driver("nvidia", ["10de:2230"])
    card = "0000:81:00.0"
    kernel.add_function(
        card, "10de:2230", class_code="030200", driver="nvidia", group=30, total_vfs=4, offset=4
    )
    text = f"""{HEAD}[[sriov]]
match = {{ address = "{card}" }}
vfs = 2
vf = [ {{ index = 0, vgpu_type = 558 }} ]
"""
    with run_folder() as folder:
        do(kernel.host(), Journal(kernel.host(), folder), counting(card, 2))
    other = kernel._real(kernel.vf_address(card, 1))
    kernel._put(f"{other}/nvidia/creatable_vgpu_types", b"ID : vGPU Name\n558 : A\n559 : B\n")
    assert [step.ends() for step in plan_on(kernel.host(), text).steps] == [("0", "558")]
    with pytest.raises(Refused, match=r"offers no vGPU type 560: it can create 558 .A., 559 .B."):
        plan_on(kernel.host(), text.replace("558", "560"))


def test_a_rule_that_names_nothing_is_an_error_or_a_report() -> None:
    text = HEAD + device(id="dead:beef") + device(address=NVME)
    with pytest.raises(NotFound, match=r"policy:2: no device matches id dead:beef"):
        plan_on(furnished().host(), text)
    plan = plan_on(furnished().host(), text, absent_ok=True)
    assert [step.target for step in plan.steps] == [NVME]
    assert len(plan.absent) == 1 and "dead:beef" in plan.absent[0]


def test_a_match_must_name_as_many_as_are_expected() -> None:
    text = HEAD + device(id="1b36:0010") + "expect = { count = 1 }\n"
    with pytest.raises(
        Ambiguous, match=f"names 2 devices where 1 are expected: {NVME}, {STUBBORN}"
    ):
        plan_on(furnished().host(), text)


def test_all_keys_of_a_match_must_hold() -> None:
    text = HEAD + device(address=NVME, id="1234:11e8")
    with pytest.raises(NotFound):
        plan_on(furnished().host(), text)


def test_a_bridge_in_the_way_takes_a_rule_of_its_own() -> None:
    kernel = furnished()
    kernel.add_driver("shpchp", ["1b36:000e"])
    kernel.host().write_attribute("/sys/bus/pci/drivers_probe", BRIDGE)
    text = HEAD + device(address=BEHIND) + 'group = "whole"\n'
    with pytest.raises(Refused, match="stays on shpchp") as caught:
        plan_on(kernel.host(), text)
    assert 'driver = "none"' in (caught.value.hint or "")
    steps = plan_on(kernel.host(), text + device(address=BRIDGE) + 'driver = "none"\n').steps
    assert [step.target for step in steps] == [BEHIND, BESIDE, BRIDGE]


def test_a_group_that_would_not_be_viable_is_refused_unless_taken_whole() -> None:
    with pytest.raises(Refused, match=f"shares group 13 with {BESIDE}, which stays on e1000"):
        plan_on(furnished().host(), HEAD + device(address=BEHIND))
    whole = HEAD + device(address=BEHIND) + 'group = "whole"\n'
    assert [step.target for step in plan_on(furnished().host(), whole).steps] == [BEHIND, BESIDE]
    both = HEAD + device(address=BEHIND) + device(address=BESIDE)
    assert len(plan_on(furnished().host(), both).steps) == 2


def test_rules_that_contradict_each_other_are_refused() -> None:
    text = HEAD + device(address=NVME) + device(id="1b36:0010") + 'driver = "none"\n'
    with pytest.raises(
        UsageError, match=r"is to have none here and vfio-pci by the rule in line 2"
    ):
        plan_on(furnished().host(), text)
    text = HEAD + f'[[sriov]]\nmatch = {{ address = "{NIC}" }}\nvfs = 2\n' + device(address=NIC)
    with pytest.raises(UsageError, match="cannot change its driver and have 2 VFs"):
        plan_on(furnished().host(), text)


def test_mdevs_that_cannot_be_are_refused() -> None:
    text = f'{HEAD}[[mdev]]\nparent = "{{}}"\ntype = "{{}}"\nuuid = "{UUID}"\n'
    with pytest.raises(NotFound, match="is no parent"):
        plan_on(furnished().host(), text.format("nope", "mtty-1"))
    with pytest.raises(NotFound, match="no mdev type"):
        plan_on(furnished().host(), text.format("mtty", "mtty-9"))


def test_vfs_of_what_has_none_are_unsupported() -> None:
    text = f'{HEAD}[[sriov]]\nmatch = {{ address = "{EDU}" }}\nvfs = 1\n'
    with pytest.raises(Unsupported):
        plan_on(furnished().host(), text)


def test_a_saved_plan_is_applied_only_to_the_host_that_it_was_made_for() -> None:
    kernel = furnished()
    policy = parse_policy(HEAD + device(address=NVME) + device(address=EDU))
    steps = plan_policy(policy, read_policy_facts(kernel.host(), policy)).steps
    saved = parse_saved(plan_to_text(policy, steps), "p.plan")
    assert saved is not None
    refuse_changed(saved, steps)
    with run_folder() as folder:
        do(kernel.host(), Journal(kernel.host(), folder), binding(EDU))
    now = plan_policy(policy, read_policy_facts(kernel.host(), policy)).steps
    with pytest.raises(Refused, match=f"step 2 was bind-driver {EDU} from None to vfio-pci"):
        refuse_changed(saved, now)
    with pytest.raises(UsageError, match="no saved plan"):
        parse_saved('{"kind": "other"}', "p.plan")


def test_every_kind_of_step_survives_the_journal() -> None:
    kernel = furnished_for_all()
    seen = set()
    for name in POLICIES:
        if "vdpa" in name:
            continue
        for step in plan_on(kernel.host(), (ROOT / "policies" / name).read_text()).steps:
            assert step_from_json(step_to_json(step)) == step
            seen.add(step.verb)
    assert seen <= set(step_kinds())
    assert len(seen) >= 5
    with pytest.raises(KernelError, match="does not know"):
        step_from_json({"verb": "make-coffee"})


def test_the_most_exact_variant_driver_is_chosen() -> None:
    variants = parse_variants(
        "alias pci:v00008086d*sv*sd*bc*sc*i* e1000\n"
        "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n"
        "alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci\n"
    )
    own = "pci:v000015B3d0000101Esv000015B3sd00000010bc02sc00i00"
    other = "pci:v00008086d000010C9sv00008086sd00000010bc02sc00i00"
    assert best_driver(own, variants) == "mlx5_vfio_pci"
    assert best_driver(other, variants) == "vfio-pci"
    assert best_driver(None, variants) == "vfio-pci"
