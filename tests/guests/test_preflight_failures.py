"""What `vm check` foretells, for real: the cards that go wrong, and a guest that starts QEMU with
them (tests/lab/failures_vm.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests.failing_cards import failing_machine
from tests.guests.runs import ROOT, need_lab
from vfiotool.lab.guest import Guest
from vfiotool.models import Model

pytestmark = [pytest.mark.lab, pytest.mark.proof]

KERNEL = "6.12"
LIMIT_S = 1800.0
FILE = "tests/lab/failures_vm.py"
# What is asked of the card that does not wake has a guest's part for each state of the model.
SLEEP = "does_not_wake"


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guest, dict[str, Model]]]:
    need_lab(KERNEL)
    folder = tmp_path_factory.mktemp("cards")
    with failing_machine(folder) as (machine, models), Guest(machine, KERNEL, cwd=ROOT) as guest:
        yield guest, models


def in_guest(guest: Guest, *words: str) -> str:
    """Run the guest's part; what it said, which has all that QEMU said."""
    python = str(Path(sys.prefix) / "bin/python")
    options = ["-p", "no:cacheprovider", "-q", "--tb=short", "-rA", "--durations=0"]
    options += ["--import-mode=importlib", "-o", "addopts=", FILE, *words]
    done = guest.exec(
        [python, "-m", "pytest", *options],
        timeout_s=LIMIT_S,
        merge=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    print(done.text)
    assert done.exit_code == 0, done.text[-6000:]
    return done.text


def test_each_failure_is_foretold_comes_and_goes(failing: tuple[Guest, dict[str, Model]]) -> None:
    guest, _ = failing
    assert " skipped" not in in_guest(guest, "-k", f"not {SLEEP}")


def test_a_card_that_does_not_wake_is_found_and_kept_awake(
    failing: tuple[Guest, dict[str, Model]],
) -> None:
    guest, models = failing
    faults = models["Sleeper"].faults
    faults.set("d3-gone")
    in_guest(guest, "-k", f"{SLEEP} and not awake")
    assert faults.gone
    faults.gone = False
    in_guest(guest, "-k", f"{SLEEP}_is_kept_awake")
    assert not faults.gone
