"""The executor's promises that are not about faults: confirmation, recovery's choices, undo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.change.changing import EDU, NVME, STUBBORN, binding, do, furnished, releasing, run_folder
from tests.fakes.kernel import FakeKernel, Fault
from vfiotool.change.apply import change
from vfiotool.change.confirm import attach, confirm, revert_unconfirmed
from vfiotool.change.guard import Allowance, find_blockers, refuse_uses
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.sealed import seal
from vfiotool.change.steps.registry import steps_as_json
from vfiotool.change.undo import undo, undo_number
from vfiotool.errors import KernelError, NotFound, Refused, Stuck, UsageError
from vfiotool.host.host import Host
from vfiotool.netlink.codec import Message, Request
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.saved import DesiredState


@pytest.fixture
def kernel() -> FakeKernel:
    return furnished()


@pytest.fixture
def journal(kernel: FakeKernel) -> Iterator[Journal]:
    with run_folder() as folder:
        yield Journal(kernel.host(), folder)


def pend(
    journal: Journal, transaction: int | None, pid: int | None = None, since: str = "7"
) -> str:
    # Asked here: the process that imported this may have been this one's parent.
    maker = os.getpid() if pid is None else pid
    entry = {"transaction": transaction, "pid": maker, "since": since, "after": 0}
    journal.pending.replace("token", seal(entry))
    return "token"


def test_an_unconfirmed_change_is_taken_back(kernel: FakeKernel, journal: Journal) -> None:
    before = kernel.state()
    token = pend(journal, None)
    attach(journal, token, do(kernel.host(), journal, binding(NVME)).transaction)
    assert revert_unconfirmed(kernel.host(), journal, token, 5) == "undone 1"
    assert kernel.state() == before
    with pytest.raises(NotFound, match="no change waits"):
        confirm(kernel.host(), journal)


def test_a_confirmed_change_stays(kernel: FakeKernel, journal: Journal) -> None:
    token = pend(journal, None)
    attach(journal, token, do(kernel.host(), journal, binding(NVME)).transaction)
    assert confirm(kernel.host(), journal) == [1]
    assert revert_unconfirmed(kernel.host(), journal, token, 5) is None
    assert kernel.driver_of(NVME) == "vfio-pci"


def test_a_change_that_died_before_its_end_is_recovered_at_the_deadline(
    kernel: FakeKernel, journal: Journal
) -> None:
    before = kernel.state()
    token = pend(journal, None)
    kernel.faults = (Fault("hang", 2),)
    with pytest.raises(Stuck):
        do(kernel.host(), journal, binding(NVME))
    kernel.clear_faults()
    assert revert_unconfirmed(kernel.host(), journal, token, 5) == "1 undone"
    assert kernel.state() == before


def test_a_process_killed_between_its_commit_and_the_watcher_is_taken_back_all_the_same(
    kernel: FakeKernel, journal: Journal
) -> None:
    do(kernel.host(), journal, binding(EDU))
    before = kernel.state()
    entry = {"transaction": None, "pid": os.getpid(), "since": "7", "after": 1}
    journal.pending.replace("token", seal(entry))
    do(kernel.host(), journal, binding(NVME))
    assert revert_unconfirmed(kernel.host(), journal, "token", 5) == "undone 2"
    assert kernel.state() == before


def test_a_later_process_with_the_same_number_is_not_waited_for(
    kernel: FakeKernel, journal: Journal
) -> None:
    kernel._put("/proc/4711/stat", b"4711 (sh) S " + b"0 " * 18 + b"999 0\n")
    token = pend(journal, None, pid=4711, since="7")
    assert revert_unconfirmed(kernel.host(), journal, token, 5) == "nothing to do"


def test_a_change_that_is_still_being_made_cannot_be_confirmed(
    kernel: FakeKernel, journal: Journal
) -> None:
    kernel._put("/proc/4711/stat", b"4711 (vfiotool) S " + b"0 " * 18 + b"7 0\n")
    pend(journal, None, pid=4711, since="7")
    with pytest.raises(NotFound, match="still being made"):
        confirm(kernel.host(), journal)
    # Its watcher is still there.
    assert journal.pending.names() == ["token"]


def test_nothing_to_do_needs_no_confirmation(journal: Journal) -> None:
    attach(journal, pend(journal, None), None)
    assert journal.pending.names() == []


def test_recover_can_be_told_to_undo_or_to_finish(kernel: FakeKernel, journal: Journal) -> None:
    for finish, driver in ((False, "nvme"), (True, "vfio-pci")):
        kernel.faults = (Fault("hang", len(kernel.writes) + 2),)
        with pytest.raises(Stuck):
            do(kernel.host(), journal, binding(NVME))
        kernel.clear_faults()
        recover(kernel.host(), journal, finish=finish)
        assert kernel.driver_of(NVME) == driver


def test_a_change_can_be_undone_once(kernel: FakeKernel, journal: Journal) -> None:
    number = do(kernel.host(), journal, binding(EDU)).transaction
    assert number is not None
    undo_number(kernel.host(), journal, number)
    with pytest.raises(NotFound, match="does not stand"):
        undo_number(kernel.host(), journal, number)


def test_a_neighbours_change_between_the_steps_is_detected(
    kernel: FakeKernel, journal: Journal
) -> None:
    host = kernel.host()

    def meddle(number: int, path: str, data: str) -> None:
        # While the second device is taken, somebody gives the first one back.
        if path.endswith("nvme/unbind") and NVME not in data:
            kernel.before_write = None
            kernel._effect("/sys/bus/pci/drivers/vfio-pci/unbind", "unbind", NVME, NVME, False)

    kernel.drivers["vfio-pci"].refuses.clear()
    kernel.before_write = meddle
    with pytest.raises(KernelError, match=f"{NVME}: bind-driver from nvme .* did not hold"):
        do(host, journal, binding(NVME, STUBBORN))
    assert (kernel.driver_of(NVME), kernel.driver_of(STUBBORN)) == ("nvme", "nvme")


def test_the_steps_have_the_contracts_shape(kernel: FakeKernel, journal: Journal) -> None:
    (row,) = steps_as_json(binding(NVME)(kernel.host(), journal))
    assert row == {
        "number": 1,
        "verb": "bind-driver",
        "target": NVME,
        "from": "nvme",
        "to": "vfio-pci",
        "undo": "bind to nvme, clear the override",
    }


def swap_on(kernel: FakeKernel, address: str) -> None:
    """The host swaps to a disk of this controller."""
    node = f"/sys/devices/pci0000:00/{address}/nvme/nvme0/nvme0n1"
    kernel._put(f"{node}/dev", b"259:0\n")
    kernel._put(f"{node}/size", b"2048\n")
    kernel._link("/sys/class/block/nvme0n1", f"../../{node.removeprefix('/sys/')}")
    kernel._put("/proc/swaps", b"Filename Type Size Used Priority\n/dev/nvme0n1 partition 9 0 -2\n")


def test_undo_does_not_take_a_device_that_is_in_use_by_now(
    kernel: FakeKernel, journal: Journal
) -> None:
    host = kernel.host()
    do(host, journal, binding(NVME))
    do(host, journal, releasing(NVME))
    swap_on(kernel, NVME)
    with pytest.raises(Refused, match="device is in use"):
        undo(host, journal)
    assert kernel.driver_of(NVME) == "nvme"


def test_recover_does_not_take_a_device_that_is_in_use_by_now(
    kernel: FakeKernel, journal: Journal
) -> None:
    host = kernel.host()
    do(host, journal, binding(NVME))
    steps = releasing(NVME)(host, journal)
    transaction = journal.begin("release", steps, ["device-x"])
    transaction.note("step", n=1)
    transaction.release()
    # The release had got as far as the driver when its process was killed.
    for step in steps:
        step.run(_Bare(host))
    swap_on(kernel, NVME)
    assert [entry.result for entry in recover(host, journal)] == ["finished"]
    assert kernel.driver_of(NVME) == "nvme"


class _Bare:
    """A write path without a journal."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def write_attribute(self, path: str, data: str, *, harmless: bool = False) -> None:
        self.host.write_attribute(path, data)

    def load_module(self, name: str) -> None:
        self.host.load_module(name)

    def send_netlink(self, request: Request) -> list[Message]:
        return self.host.send_netlink(request)


def test_what_hurts_is_refused_unless_it_is_allowed_by_name(kernel: FakeKernel) -> None:
    host = kernel.host()
    swap_on(kernel, NVME)
    with run_folder() as folder:
        steps = binding(NVME)(host, Journal(host, folder))
    (blocker,) = find_blockers(host, steps)
    assert blocker.kind == "swap"
    with pytest.raises(Refused, match="refusing: device is in use") as caught:
        refuse_uses(host, steps)
    assert caught.value.exit_code == 4
    wanted = f"swap:{blocker.subject}"
    assert f"--allow {wanted}" in (caught.value.hint or "")
    with pytest.raises(Refused):
        refuse_uses(host, steps, [Allowance.parse("swap:/dev/other")])
    refuse_uses(host, steps, [Allowance.parse(wanted)])
    for text in ("swap", "swap:", ":x", ""):
        with pytest.raises(UsageError, match="is not KIND:WHAT"):
            Allowance.parse(text)


def test_the_boot_display_is_not_taken_unless_it_is_allowed(
    kernel: FakeKernel, journal: Journal
) -> None:
    """It has no driver, and the host's console is shown on it all the same."""
    kernel.add_function("0000:00:05.0", "1234:1111", class_code="030000", group=5)
    base = "/sys/devices/pci0000:00/0000:00:05.0"
    kernel._put(f"{base}/class", b"0x030000\n")
    kernel._put(f"{base}/boot_vga", b"1\n")
    make = binding("0000:00:05.0")
    with pytest.raises(Refused, match="boot-vga"):
        do(kernel.host(), journal, make)
    assert kernel.writes == []
    allowed = [Allowance.parse("boot-vga:0000:00:05.0")]
    host = kernel.host()
    change(host, journal, "bind", lambda: make(host, journal), allowed=allowed)
    assert kernel.driver_of("0000:00:05.0") == "vfio-pci"


def test_a_policy_is_not_applied_where_it_could_not_be_kept(tmp_path: Path) -> None:
    """The desired state is tried out before the change (a folder stands where it is to be)."""
    desired = DesiredState(str(tmp_path / "etc"))
    policy = parse_policy("version = 1\n")
    desired.try_out(policy)
    assert os.listdir(tmp_path / "etc") == []
    (tmp_path / "etc" / "trial.json").mkdir()
    with pytest.raises(KernelError):
        desired.try_out(policy)


def test_a_name_with_a_newline_forges_no_line_of_the_history(
    kernel: FakeKernel, journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    from vfiotool.cli import output

    output.table(("CHANGE", "COMMAND"), [["1", "apply a\n9  2001-01-01  committed  bind \x1b[31m"]])
    assert len(capsys.readouterr().out.splitlines()) == 2
