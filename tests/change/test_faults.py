"""The fault sweep: whatever a write does, the host ends as before, as after, or declared stuck.

Each policy is applied with every kind of fault at every one of its writes, once and for good,
alone and together with a second fault at each write of the roll-back that follows. Then the
kernel is mended and `recover` must bring the host to before or after.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest

from tests.change.changing import BEHIND, NIC, NVME, UUID, furnished, run_folder
from tests.change.side_by_side import side_by_side
from tests.fakes.kernel import ERRNOS, FAULTS, FakeKernel, Fault
from tests.guests.runs import PROOFS_WANTED
from vfiotool.change.apply import change
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.steps.base import Step
from vfiotool.errors import Stuck, VfiotoolError
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.model import Policy
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy

HEAD = "version = 1\n"
DISK = f'[[device]]\nmatch = {{ address = "{NVME}" }}\n'
GROUP = f'[[device]]\nmatch = {{ address = "{BEHIND}" }}\ngroup = "whole"\n'
VFS = (
    f'[[sriov]]\nmatch = {{ address = "{NIC}" }}\nvfs = 3\n'
    'vf = [ { index = 0, mac = "52:54:00:00:00:01", vlan = 10, driver = "vfio-pci" },\n'
    '  { index = 1, trust = true, driver = "vfio-pci" }, { index = 2, driver = "none" } ]\n'
)
MDEVS = "".join(
    f'[[mdev]]\nparent = "mtty"\ntype = "mtty-1"\nuuid = "{UUID[:-1]}{digit}"\n'
    'attrs = [ ["attr_level", "3"], ["attr_level", "7"] ]\n'
    for digit in range(4)
)
VARIANT = f'[[device]]\nmatch = {{ address = "{NVME}" }}\ndriver = "mlx5_vfio_pci"\n'
DISK_VFS = (
    f'[[sriov]]\nmatch = {{ address = "{NVME}" }}\nvfs = 2\nautoprobe = false\n'
    f'[[device]]\nmatch = {{ pf = "{NVME}", index = 0 }}\n'
    f'[[device]]\nmatch = {{ pf = "{NVME}", index = 1 }}\ndriver = "none"\n'
)
POLICIES = {
    "disk": DISK,
    "group": GROUP,
    "vfs": VFS,
    "disk-vfs": DISK_VFS,
    "mdevs": MDEVS,
    "variant": VARIANT,
    "mixed": DISK + GROUP + VFS + MDEVS,
}
START_WITH_VFS = "vfs-remade"
# So many writes make a long plan, and one whose roll-backs are not all swept.
LONG, LONGER = 10, 15
PROOFS = bool(os.environ.get(PROOFS_WANTED))
LONG_STRIDE, ENOUGH = (2, 10_000) if PROOFS else (10, 3_000)
FAULTS_OF_ALL = tuple(kind for kind in FAULTS if kind != "partial")
# To the engine these are one error: none of them is asked for by name, and all but EACCES are a
# KernelError. Each write meets each of them alone; within a long plan's roll-back, and everywhere
# in a longer one, which is made of the others, they take turns, but in the proofs.
ALIKE = (*(kind for kind in ERRNOS if kind != "EACCES"), "short")
NAMES = [*POLICIES, START_WITH_VFS]


@dataclass(frozen=True)
class Ground:
    """One policy, the kernel that it starts on, and the states that are allowed at the end."""

    make: Callable[[], FakeKernel]
    policy: Policy
    before: dict[Any, Any]
    after: dict[Any, Any]
    paths: tuple[str, ...]


def kinds_at(path: str) -> tuple[str, ...]:
    """The faults that a write to this path can have: only VFs can be enabled in part."""
    return FAULTS if path.endswith("sriov_numvfs") else FAULTS_OF_ALL


def kinds_in_turn(path: str, turn: int, writes: int, enough: int) -> tuple[str, ...]:
    """The faults of a write: all of them, but one of those alike in a plan of `enough` writes."""
    kinds = kinds_at(path)
    if PROOFS or writes < enough:
        return kinds
    return (ALIKE[turn % len(ALIKE)], *(kind for kind in kinds if kind not in ALIKE))


def run_policy(kernel: FakeKernel, journal: Journal, policy: Policy) -> None:
    host = kernel.host()

    def plan() -> tuple[Step, ...]:
        return plan_policy(policy, read_policy_facts(host, policy, journal)).steps

    change(host, journal, "apply", plan)


def furnished_with_vfs() -> FakeKernel:
    """VFs in every condition, which the policy has to destroy: undoing must make them again."""
    return _furnished_with_vfs().copy()


@cache
def _furnished_with_vfs() -> FakeKernel:
    kernel = furnished()
    with run_folder() as folder:
        text = VFS.replace("vfs = 3", "vfs = 5")
        run_policy(kernel, Journal(kernel.host(), folder), parse_policy(HEAD + text))
    kernel.writes.clear()
    return kernel


@cache
def ground(name: str) -> Ground:
    make = furnished_with_vfs if name == START_WITH_VFS else furnished
    policy = parse_policy(HEAD + POLICIES.get(name, VFS))
    kernel = make()
    before = kernel.state()
    with run_folder() as folder:
        run_policy(kernel, Journal(kernel.host(), folder), policy)
    return Ground(make, policy, before, kernel.state(), paths_of(kernel))


def paths_of(kernel: FakeKernel) -> tuple[str, ...]:
    return tuple(path for path, _ in kernel.writes)


def plain(state: dict[Any, Any]) -> dict[Any, Any]:
    """A state with the random addresses of new VFs made equal."""
    return {
        key: replace(value, mac="random")
        if isinstance(value, VfSettings) and (value.mac or "").startswith("52:00:00")
        else value
        for key, value in state.items()
    }


def is_before(state: dict[Any, Any], ends: Ground) -> bool:
    """Whether it is the first state, addresses included."""
    return state == ends.before


def is_after(state: dict[Any, Any], ends: Ground) -> bool:
    return plain(state) == plain(ends.after)


def run_case(ends: Ground, folder: str, faults: tuple[Fault, ...]) -> tuple[str, tuple[str, ...]]:
    """How the case ended, and where its writes went. Fails unless all promises hold."""
    kernel = ends.make()
    kernel.faults = faults
    journal = Journal(kernel.host(), folder)
    outcome = "applied"
    try:
        run_policy(kernel, journal, ends.policy)
    except Stuck:
        outcome = "stuck"
    except VfiotoolError:
        outcome = "rolled back"
    paths = paths_of(kernel)
    if outcome == "stuck":
        left = [record for record in journal.history() if record.outcome is None]
        assert left and left[0].stuck, "a stuck change must stand in the journal"
    else:
        reached = is_after if outcome == "applied" else is_before
        assert reached(kernel.state(), ends), f"{outcome}, yet the state is another"
    kernel.clear_faults()
    results = recover(kernel.host(), journal)
    if outcome == "stuck":
        assert len(results) == 1
        reached = {"finished": is_after, "undone": is_before}[results[0].result]
        assert reached(kernel.state(), ends), f"recover {results[0].result}, yet is not there"
    else:
        assert results == ()
    assert not [record for record in journal.history() if record.outcome is None]
    return outcome, paths


@cache
def sweep(name: str) -> Counter[tuple[str, str]]:
    """How many cases of each fault ended in which way."""
    tally: Counter[tuple[str, str]] = Counter()
    writes = range(1, len(ground(name).paths) + 1)
    for part in side_by_side(partial(sweep_at, name), writes):
        tally.update(part)
    return tally


def sweep_at(name: str, at: int) -> Counter[tuple[str, str]]:
    """The cases whose first fault is at this write."""
    ends = ground(name)
    tally: Counter[tuple[str, str]] = Counter()

    def run(faults: tuple[Fault, ...], label: str) -> tuple[str, tuple[str, ...]]:
        with run_folder() as folder:
            try:
                outcome, paths = run_case(ends, folder, faults)
            except AssertionError as error:
                raise AssertionError(f"{name}, {faults}: {error}") from error
        tally[label, outcome] += 1
        return outcome, paths

    # Of long plans' roll-backs not each one is swept: neighbours differ by one step undone.
    writes = len(ends.paths)
    stride = 1 if writes < LONGER else LONG_STRIDE
    for kind in kinds_in_turn(ends.paths[at - 1], at, writes, LONGER):
        for always in (False, True):
            run((Fault(kind, at, always),), kind)
    # Faults of a roll-back: EIO at this write starts one, another kind strikes within it.
    _, paths = run((Fault("EIO", at),), "EIO")
    for second in range(at + 1, len(paths) + 1) if at % stride == 0 else ():
        for kind in kinds_in_turn(paths[second - 1], at // stride + second, writes, LONG):
            for always in (False, True):
                run((Fault("EIO", at), Fault(kind, second, always)), f"{kind} rolling back")
    return tally


# Thousands of cases each: `make check` leaves these out.
SLOW = ("vfs", "mdevs", "mixed", START_WITH_VFS)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES]
)
def test_every_fault_at_every_write_ends_before_after_or_declared_stuck(name: str) -> None:
    tally = sweep(name)
    assert {label for label, _ in tally} >= set(FAULTS_OF_ALL)
    assert {outcome for _, outcome in tally} >= {"rolled back", "stuck"}


@pytest.mark.slow
def test_the_sweep_is_large_and_its_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    total: Counter[tuple[str, str]] = Counter()
    for name in NAMES:
        total.update(sweep(name))
    outcomes = ("applied", "rolled back", "stuck")
    lines = [f"{'fault':28}" + "".join(f"{outcome:>13}" for outcome in outcomes)]
    for label in sorted({label for label, _ in total}):
        counts = (total[label, outcome] for outcome in outcomes)
        lines.append(f"{label:28}" + "".join(f"{count:13}" for count in counts))
    with capsys.disabled():
        print("\n" + "\n".join(lines))
        print(f"{sum(total.values())} cases over {len(NAMES)} policies; every stuck one recovered")
    assert sum(total.values()) >= ENOUGH
