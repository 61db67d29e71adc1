"""The watcher of --confirm-within: its own change alone, through the guard, until it works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.change.changing import EDU, NVME, binding, do, furnished, run_folder
from tests.fakes.kernel import FakeKernel, Fault
from vfiotool.change import confirm as confirming
from vfiotool.change.confirm import attach, confirm, revert_unconfirmed
from vfiotool.change.journal import Journal, started_at
from vfiotool.change.recover import recover
from vfiotool.change.sealed import seal
from vfiotool.errors import NotFound, Refused, Stuck
from vfiotool.host.paths import OPEN_NODES


@pytest.fixture
def kernel() -> FakeKernel:
    return furnished()


@pytest.fixture
def journal(kernel: FakeKernel) -> Iterator[Journal]:
    with run_folder() as folder:
        yield Journal(kernel.host(), folder)


def pend(journal: Journal, after: int = 0, pid: int | None = None, since: str = "7") -> str:
    # Asked here: the process that imported this may have been this one's parent.
    maker = os.getpid() if pid is None else pid
    entry = {"transaction": None, "pid": maker, "since": since, "after": after, "failed": None}
    journal.pending.replace("token", seal(entry))
    return "token"


def use(kernel: FakeKernel, address: str) -> None:
    path = kernel.host().realpath(f"/sys/bus/pci/devices/{address}")
    kernel._put(OPEN_NODES, f"4242\tqemu\t/dev/vfio/9\t{path}\n.\n".encode())


def end_use(kernel: FakeKernel) -> None:
    kernel._put(OPEN_NODES, b".\n")


def half_done(kernel: FakeKernel, journal: Journal, address: str) -> None:
    kernel.faults = (Fault("hang", len(kernel.writes) + 2),)
    with pytest.raises(Stuck):
        do(kernel.host(), journal, binding(address, driver="none"))
    kernel.clear_faults()


def test_the_watcher_leaves_the_half_done_changes_of_others_alone(
    kernel: FakeKernel, journal: Journal
) -> None:
    half_done(kernel, journal, NVME)
    there = kernel.state()
    token = pend(journal, after=1)
    do(kernel.host(), journal, binding(EDU))
    assert revert_unconfirmed(kernel.host(), journal, token, 5) == "undone 2"
    assert kernel.state() == there
    assert [record.outcome for record in journal.history()][:1] == [None]


def test_a_revert_that_failed_is_kept_for_confirm_and_tried_again(
    kernel: FakeKernel, journal: Journal
) -> None:
    before = kernel.state()
    token = pend(journal)
    attach(journal, token, do(kernel.host(), journal, binding(NVME)).transaction)
    use(kernel, NVME)
    with pytest.raises(Refused, match="open-file"):
        revert_unconfirmed(kernel.host(), journal, token, 5, tries=2)
    assert kernel.driver_of(NVME) == "vfio-pci"
    assert journal.pending.names() == [token]
    # It waits between two tries; the use ends meanwhile, and the next one succeeds.
    kernel.clock.after(3, lambda: end_use(kernel))
    assert revert_unconfirmed(kernel.host(), journal, token, 5) == "undone 1"
    assert {key: value for key, value in kernel.state().items() if key in before} == before
    assert journal.pending.names() == []


def test_a_change_whose_revert_fails_can_still_be_confirmed(
    kernel: FakeKernel, journal: Journal
) -> None:
    token = pend(journal)
    attach(journal, token, do(kernel.host(), journal, binding(NVME)).transaction)
    use(kernel, NVME)
    with pytest.raises(Refused):
        revert_unconfirmed(kernel.host(), journal, token, 5, tries=1)
    assert confirm(kernel.host(), journal) == [1]
    assert revert_unconfirmed(kernel.host(), journal, token, 5) is None


def test_confirm_says_why_a_half_done_change_cannot_be_kept(
    kernel: FakeKernel, journal: Journal
) -> None:
    token = pend(journal)
    half_done(kernel, journal, NVME)
    kernel.faults = (Fault("EIO", len(kernel.writes) + 1, always=True),)
    kernel.failing = {"/sys/bus/pci/drivers_probe": "EIO"}
    with pytest.raises(NotFound, match="left half done"):
        confirm(kernel.host(), journal)
    assert journal.pending.names() == [token]


def read_processes(kernel: FakeKernel) -> None:
    """Let the fake host have the processes of this machine."""
    faked = kernel.read

    def read(path: str) -> bytes:
        if not path.startswith("/proc/"):
            return faked(path)
        with open(path, "rb") as file:
            return file.read()

    kernel.read = read  # type: ignore[method-assign]


def test_a_stopped_process_does_not_stop_the_watcher(kernel: FakeKernel, journal: Journal) -> None:
    host = kernel.host()
    read_processes(kernel)
    maker = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert maker.stdout is not None and maker.stdout.readline() == "up\n"
        since = started_at(host, maker.pid)
        assert since is not None
        maker.send_signal(signal.SIGSTOP)
        while b") T" not in host.read_bytes(f"/proc/{maker.pid}/stat"):
            pass
        token = pend(journal, pid=maker.pid, since=since)
        assert revert_unconfirmed(host, journal, token, 5) == "nothing to do"
        # It was asked to end, and would have been killed.
        assert maker.wait(timeout=30) in (-signal.SIGTERM, -signal.SIGKILL)
    finally:
        maker.kill()
        maker.wait()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("finish", [None, True, False])
def test_another_device_at_the_address_is_nothing_to_undo(
    kernel: FakeKernel, journal: Journal, finish: bool | None, used: bool
) -> None:
    half_done(kernel, journal, NVME)
    base = f"/sys/devices/pci0000:00/{NVME}"
    kernel._put(f"{base}/device", b"0xbeef\n")
    text = kernel.files[f"{base}/uevent"].replace(b"1B36:0010", b"1B36:BEEF")
    kernel._put(f"{base}/uevent", text)
    if used:
        kernel._put(OPEN_NODES, f"4242\tfsck\t/dev/nvme9n1\t{base}\n.\n".encode())
    writes = len(kernel.writes)
    (result,) = recover(kernel.host(), journal, finish=finish)
    assert result.result == "undone"
    assert len(kernel.writes) == writes


def test_arming_waits_for_its_own_child_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller's child that has ended keeps its exit status."""
    monkeypatch.setattr(confirming, "_watch", lambda *_: None)
    other = subprocess.Popen(["false"])
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    confirming._arm_process("/nonexistent", "token", 1.0)
    assert other.wait() == 1


def test_a_maker_that_works_is_left_to_end_by_itself(kernel: FakeKernel, journal: Journal) -> None:
    read_processes(kernel)
    host = kernel.host()
    maker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        since = started_at(host, maker.pid)
        entry = {"pid": maker.pid, "since": since, "after": 0, "transaction": None, "failed": None}
        journal.pending.replace("token", seal(entry))

        def end() -> None:
            maker.kill()
            maker.wait()

        kernel.clock.after(1, end)
        assert revert_unconfirmed(host, journal, "token", 5) == "nothing to do"
    finally:
        maker.kill()
    assert maker.wait() == -signal.SIGKILL
