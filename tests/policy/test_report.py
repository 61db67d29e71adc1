"""A plan and a drift as people read them."""

from __future__ import annotations

from tests.change.changing import EDU, NIC, furnished
from vfiotool.change.steps.sriov import SetAutoprobe, SetVfCount
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import Plan, Refusal, plan_policy
from vfiotool.policy.report import (
    devices_of,
    drift_lines,
    drift_summary,
    plan_lines,
    refusal_lines,
    summary,
)

TEXT = f"""version = 1
[[sriov]]
match = {{ address = "{NIC}" }}
vfs = 1
vf = [ {{ index = 0, mac = "52:54:00:00:00:01", trust = true, driver = "vfio-pci" }} ]
[[device]]
match = {{ address = "{EDU}" }}
driver = "mlx5_vfio_pci"
"""


def planned() -> Plan:
    policy = parse_policy(TEXT)
    return plan_policy(policy, read_policy_facts(furnished().host(), policy))


def test_steps_stand_under_their_device_and_keep_their_numbers() -> None:
    lines = plan_lines(planned().steps)
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == [NIC, f"{NIC} vf 0", "0000:02:10.0", "module mlx5_vfio_pci", EDU]
    numbers = [int(line.split(".")[0]) for line in lines if line.startswith(" ")]
    assert sorted(numbers) == list(range(1, len(planned().steps) + 1))


def test_no_word_of_pythons_is_shown_and_each_step_says_how_it_is_undone() -> None:
    text = "\n".join((*plan_lines(planned().steps), *drift_lines(planned().steps)))
    assert "trust on" in text
    assert not {"True", "False", "None"} & set(text.replace(",", " ").split())
    (settings,) = [line for line in plan_lines(planned().steps) if "set-vf-property" in line]
    assert settings.endswith("(undo: it goes with its VF)")


def test_the_summaries_count_devices_and_refusals() -> None:
    plan = planned()
    assert devices_of(plan.steps) == (NIC, "0000:02:10.0", EDU)
    assert summary(plan) == f"{len(plan.steps)} steps on 3 devices"
    assert drift_summary(plan) == "drift: 3 devices differ from the policy"
    assert (summary(Plan(())), drift_summary(Plan(()))) == ("in sync: nothing to do", "in sync")
    refused = Plan((), refusals=(Refusal("no-vf-memory", NIC, "p:2: no memory", "resource"),))
    assert summary(refused) == "refused: apply would not begin (1 reason)"
    # What cannot be followed is no sync, though there is no step.
    assert drift_summary(refused) == "drift: 1 rule cannot be followed"
    assert refusal_lines(refused.refusals) == [
        f"apply would refuse: {NIC} no-vf-memory: p:2: no memory [resource]"
    ]


def test_drift_names_what_is_and_what_is_wanted() -> None:
    assert f"{EDU}" in drift_lines(planned().steps)
    assert "  driver: is no driver, wanted mlx5_vfio_pci" in drift_lines(planned().steps)
    assert not any("module" in line for line in drift_lines(planned().steps))


def test_drift_names_no_value_on_the_way_to_the_wanted_one() -> None:
    off, on = SetAutoprobe(NIC, before=True, after=False), SetAutoprobe(NIC, False, True)
    assert drift_lines([off, SetVfCount(NIC, 0, 3), on]) == [NIC, "  vf-count: is 0, wanted 3"]
    assert drift_lines([off]) == [NIC, "  autoprobe: is 1, wanted 0"]
    through_zero = [SetVfCount(NIC, 2, 0), SetVfCount(NIC, 0, 3)]
    assert drift_lines(through_zero) == [NIC, "  vf-count: is 2, wanted 3"]
    anew = [SetVfCount(NIC, 2, 0), off, SetVfCount(NIC, 0, 2), on]
    assert drift_lines(anew) == [NIC, "  vf-count: 2, to be made anew"]
