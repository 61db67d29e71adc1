"""What fails once on the way back is tried again, and damage of what was wanted is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.change.changing import NIC, NVME, binding, counting, do, furnished, run_folder
from tests.fakes.kernel import Fault
from vfiotool.change.journal import Journal
from vfiotool.errors import KernelError, UsageError
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy
from vfiotool.policy.saved import DesiredState


def test_a_roll_back_that_fails_once_is_tried_again() -> None:
    kernel = furnished()
    before = kernel.state()
    kernel.faults = (Fault("EIO", 3), Fault("EIO", 4))
    with run_folder() as folder, pytest.raises(KernelError):
        do(kernel.host(), Journal(kernel.host(), folder), binding(NVME))
    kernel.clear_faults()
    assert kernel.state() == before


def test_a_rule_for_a_vf_by_its_function_and_index_binds_it() -> None:
    kernel = furnished()
    with run_folder() as folder:
        do(kernel.host(), Journal(kernel.host(), folder), counting(NIC, 2))
    text = f'version = 1\n[[device]]\nmatch = {{ pf = "{NIC}", index = 1 }}\ndriver = "vfio-pci"\n'
    policy = parse_policy(text)
    plan = plan_policy(policy, read_policy_facts(kernel.host(), policy))
    targets = [step.target for step in plan.steps if step.verb == "bind-driver"]
    assert targets == [kernel.vf_address(NIC, 1)]


@pytest.mark.parametrize("text", ["{", "[]", '{"policy": 7}', "{}"])
def test_damage_of_what_was_applied_last_is_named_with_a_way_out(tmp_path: Path, text: str) -> None:
    state = DesiredState(str(tmp_path))
    policy = parse_policy("version = 1\n")
    state.save(policy, 1)
    (file,) = [path for path in tmp_path.iterdir() if path.is_file()]
    file.write_text(text)
    with pytest.raises(UsageError, match="is damaged") as caught:
        state.load()
    assert caught.value.hint == "apply the policy again"
