"""The runner of tests in guests: which guests there are, and what becomes of lost ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self

import pytest

from tests.guests import runs
from tests.guests.runs import GuestRuns, Outcome, Place
from vfiotool.errors import Unsupported
from vfiotool.lab.channel import Kind
from vfiotool.lab.guest import Completed, GuestLost, GuestTimeout

PLACE = Place("full", "6.12")
SHORT = ["tests/lab/test_acs_on_kernels.py", "tests/lab/test_bind.py", "tests/lab/test_uses.py"]
LONG = ["tests/lab/test_crash.py", "tests/lab/test_held.py"]


class Machine:
    """Stands for all guests: what each boot, and each file that runs in one, comes to."""

    def __init__(self) -> None:
        self.boots: list[str] = []
        self.ran: list[list[str]] = []
        self.limits: list[float] = []
        self.ends: dict[str, list[Exception]] = {}

    def guest(self, machine: str, kernel: str, **_: object) -> FakeGuest:
        return FakeGuest(self)


class FakeGuest:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __enter__(self) -> Self:
        self.machine.boots.append("boot")
        if ends := self.machine.ends.get("boot"):
            raise ends.pop(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.boots.append("end")

    def exec(
        self,
        command: list[str],
        *,
        sink: Callable[[Kind, bytes], None],
        timeout_s: float,
        **_: Any,
    ) -> Completed:
        self.machine.limits.append(timeout_s)
        files = [word for word in command if word.startswith("tests/lab/test_")]
        self.machine.ran.append(files)

        def send(**row: object) -> None:
            sink(Kind.OUTPUT, json.dumps(row).encode() + b"\n")

        for file in files:
            test = f"{file}::test"
            send(file=file, test=test, outcome="started")
            if ends := self.machine.ends.get(file):
                raise ends.pop(0)
            send(file=file, test=test, outcome="passed", text="", seconds=0.1)
        send(file="", test="", outcome="finished", status=0)
        return Completed(0, b"", b"")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    monkeypatch.setattr(runs, "Guest", made.guest)
    monkeypatch.setattr(runs, "yardstick", SimpleNamespace(HOST_S="S", measure=lambda: 1.0))
    yield made


def run(files: list[str]) -> dict[str, Outcome]:
    work = GuestRuns([(PLACE, file) for file in files])
    return {file: work.outcome(PLACE, file) for file in files}


def test_short_files_share_a_guest_and_each_proof_has_its_own(machine: Machine) -> None:
    found = run([*LONG, *SHORT])
    assert machine.ran == [SHORT, *([file] for file in LONG)]
    assert machine.boots == ["boot", "end"] * 3
    assert all(len(outcome.of("passed")) == 1 for outcome in found.values())


def test_a_proof_says_how_long_it_may_take(machine: Machine) -> None:
    run([*SHORT, LONG[1], "tests/lab/test_uses_sweep.py"])
    usual = runs.BOOT_AND_TESTS_S
    assert machine.limits[:2] == [usual, usual] and machine.limits[2] > usual


def test_a_file_may_be_left_to_the_proofs_whole_or_on_some_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = Place("full", "6.1")
    some, usual, proof = SHORT[2], SHORT[1], LONG[1]
    cases = ((PLACE, some), (older, some), (older, usual), (older, proof))
    for wanted, expected in ((None, ["", "always on 6.12", "", "long"]), ("1", [""] * 4)):
        monkeypatch.delenv(runs.PROOFS_WANTED, raising=False)
        if wanted:
            monkeypatch.setenv(runs.PROOFS_WANTED, wanted)
        assert [runs.left_out(place, file) for place, file in cases] == expected


def test_a_guest_that_never_came_up_is_started_once_more_and_that_is_said(machine: Machine) -> None:
    machine.ends["boot"] = [GuestLost("did not come up within 180 s")]
    found = run(SHORT)
    assert machine.ran == [SHORT]
    for outcome in found.values():
        assert (outcome.lost, len(outcome.of("passed"))) == (None, 1)
        assert outcome.again == "did not come up within 180 s"


def test_guests_that_do_not_come_up_twice_are_lost(machine: Machine) -> None:
    machine.ends["boot"] = [GuestLost("no"), GuestLost("no again")]
    found = run(SHORT)
    assert machine.boots == ["boot", "boot"] and machine.ran == []
    assert {outcome.lost for outcome in found.values()} == {"no again"}


@pytest.mark.parametrize("end", [GuestLost("panicked"), GuestTimeout("hangs")])
def test_a_file_that_takes_its_guest_down_is_lost_and_the_rest_gets_another(
    machine: Machine, end: Exception
) -> None:
    machine.ends[SHORT[1]] = [end]
    found = run(SHORT)
    # The file itself is not tried again.
    assert machine.ran == [SHORT, SHORT[2:]]
    assert [outcome.lost is not None for outcome in found.values()] == [False, True, False]
    lost = found[SHORT[1]].lost or ""
    assert str(end) in lost and f"in {SHORT[1]}::test" in lost
    assert found[SHORT[2]].of("passed")


def test_a_machine_without_a_lab_says_so_for_each_file(machine: Machine) -> None:
    machine.ends["boot"] = [Unsupported("no QEMU", hint="install it")]
    found = run(SHORT)
    assert {outcome.unavailable for outcome in found.values()} == {"no QEMU; install it"}


def test_a_fault_of_the_runner_itself_is_no_pass(machine: Machine) -> None:
    machine.ends["boot"] = [ValueError("a fault")]
    found = run(SHORT)
    assert {outcome.lost for outcome in found.values()} == {"ValueError: a fault"}
