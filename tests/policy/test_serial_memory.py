"""A disk that a policy names by its serial number stays that disk when no driver tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.change.changing import NVME, STUBBORN, do, furnished, releasing, run_folder
from tests.fakes.kernel import FakeKernel
from vfiotool.change.apply import change
from vfiotool.change.journal import Journal
from vfiotool.change.undo import undo
from vfiotool.errors import NotFound
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import Plan, plan_policy

TEXT = 'version = 1\n[[device]]\nmatch = { serial = "twin-b" }\n'
SERIALS = {NVME: "twin-b", STUBBORN: "twin-a"}


class Disks(FakeKernel):
    """Disks whose serial numbers show only below the nvme driver's own controller."""

    def _attach(self, address: str, driver: str) -> None:
        super()._attach(address, driver)
        if driver == "nvme" and address in SERIALS:
            serial = f"{SERIALS[address]}\n".encode()
            self._put(f"/sys/devices/pci0000:00/{address}/nvme/nvme0/serial", serial)

    def _detach(self, address: str) -> None:
        super()._detach(address)
        self._remove(f"/sys/devices/pci0000:00/{address}/nvme")


def host_of_disks() -> Disks:
    kernel = furnished()
    kernel.__class__ = Disks
    for address in SERIALS:
        kernel._detach(address)
        kernel._attach(address, "nvme")
    assert isinstance(kernel, Disks)
    return kernel


def plan(kernel: FakeKernel, journal: Journal | None) -> Plan:
    policy = parse_policy(TEXT)
    return plan_policy(policy, read_policy_facts(kernel.host(), policy, journal))


def apply(kernel: FakeKernel, journal: Journal) -> tuple[str, ...]:
    done = change(kernel.host(), journal, "apply", lambda: plan(kernel, journal).steps)
    return tuple(step.target for step in done.steps if step.verb == "bind-driver")


def test_a_policy_by_serial_stays_in_sync_once_its_disk_is_on_vfio() -> None:
    kernel = host_of_disks()
    with run_folder() as folder:
        journal = Journal(kernel.host(), folder)
        assert apply(kernel, journal) == (NVME,)
        assert kernel.driver_of(NVME) == "vfio-pci"
        assert plan(kernel, journal).steps == ()
        assert apply(kernel, Journal(kernel.host(), folder)) == ()
        undo(kernel.host(), journal)
        assert kernel.driver_of(NVME) == "nvme"
        assert apply(kernel, journal) == (NVME,)


def test_a_parked_disk_is_remembered_too_and_a_released_one_tells_for_itself() -> None:
    kernel = host_of_disks()
    with run_folder() as folder:
        journal = Journal(kernel.host(), folder)
        policy = parse_policy(TEXT + 'driver = "none"\n')

        def parked() -> Plan:
            return plan_policy(policy, read_policy_facts(kernel.host(), policy, journal))

        change(kernel.host(), journal, "park", lambda: parked().steps)
        assert parked().steps == ()
        do(kernel.host(), journal, releasing(NVME))
        assert journal.origins("pci") == {}
        assert plan(kernel, journal).steps


def test_a_disk_that_came_in_its_place_is_not_taken_for_it() -> None:
    kernel = host_of_disks()
    with run_folder() as folder:
        journal = Journal(kernel.host(), folder)
        apply(kernel, journal)
        # Pulled, and another of the same kind put in: the override went with the first one.
        kernel._detach(NVME)
        kernel._put(f"/sys/devices/pci0000:00/{NVME}/driver_override", b"(null)\n")
        kernel._attach(NVME, "vfio-pci")
        with pytest.raises(NotFound, match="no device matches serial twin-b"):
            plan(kernel, journal)


def test_a_disk_that_shows_another_serial_is_believed_before_the_memory() -> None:
    kernel = host_of_disks()
    with run_folder() as folder:
        journal = Journal(kernel.host(), folder)
        apply(kernel, journal)
        kernel._put(f"/sys/devices/pci0000:00/{NVME}/nvme/nvme0/serial", b"twin-c\n")
        with pytest.raises(NotFound):
            plan(kernel, journal)


def test_without_a_journal_nothing_is_made_up() -> None:
    kernel = host_of_disks()
    with run_folder() as folder:
        apply(kernel, Journal(kernel.host(), folder))
        with pytest.raises(NotFound) as missing:
            plan(kernel, None)
    assert "twin-a" not in f"{missing.value.message} {missing.value.hint}"


def test_a_damaged_memory_is_named(tmp_path: Path) -> None:
    kernel = host_of_disks()
    journal = Journal(kernel.host(), str(tmp_path / "run"))
    apply(kernel, journal)
    (file,) = (tmp_path / "run").glob("boot-*/origins/pci-*")
    file.write_text(file.read_text().replace("twin-b", "twin-x"))
    with pytest.raises(Exception, match="is damaged"):
        plan(kernel, Journal(kernel.host(), str(tmp_path / "run")))
