"""Signals during a change: kept until the write in hand has returned, then everything goes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.change.changing import EDU, NVME, Make, binding, do, furnished, run_folder
from tests.fakes.kernel import FakeKernel
from tests.fakes.strikes import struck
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.signals import Interrupted, kept
from vfiotool.cli import main as app
from vfiotool.cli import program
from vfiotool.cli.globals import Globals
from vfiotool.errors import Stuck
from vfiotool.host.child import WriterProcess

BOTH: Make = binding(EDU, NVME)


@pytest.fixture
def kernel() -> FakeKernel:
    return furnished()


@pytest.fixture
def journal(kernel: FakeKernel) -> Iterator[Journal]:
    with run_folder() as folder:
        yield Journal(kernel.host(), folder)


def at_write(kernel: FakeKernel, wanted: int, *signals: int) -> None:
    """Send ourselves signals as the kernel gets the write of that number."""

    def send(number: int, path: str, data: str) -> None:
        if number == wanted:
            for one in signals:
                os.kill(os.getpid(), one)

    kernel.before_write = send


def writes_of(make: Make) -> int:
    kernel = furnished()
    with run_folder() as folder:
        do(kernel.host(), Journal(kernel.host(), folder), make)
    return len(kernel.writes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", range(1, writes_of(BOTH)))
def test_a_signal_at_any_write_takes_the_change_back(
    kernel: FakeKernel, journal: Journal, at: int, number: int
) -> None:
    before, handler = kernel.state(), signal.getsignal(number)
    at_write(kernel, at, number)
    with pytest.raises(Interrupted) as caught:
        do(kernel.host(), journal, BOTH)
    assert caught.value.number == number
    assert kernel.state() == before
    (record,) = journal.history()
    assert (record.outcome, record.error) == ("rolled-back", "interrupted")
    assert signal.getsignal(number) == handler


def test_a_signal_at_the_last_write_comes_too_late(kernel: FakeKernel, journal: Journal) -> None:
    at_write(kernel, writes_of(BOTH), signal.SIGINT)
    assert do(kernel.host(), journal, BOTH).transaction == 1
    assert kernel.driver_of(NVME) == "vfio-pci"


def test_a_change_ends_though_its_terminal_goes_away(kernel: FakeKernel, journal: Journal) -> None:
    at_write(kernel, 2, signal.SIGHUP)
    do(kernel.host(), journal, BOTH)
    assert kernel.driver_of(NVME) == "vfio-pci"


@pytest.mark.parametrize("at", range(1, writes_of(BOTH)))
def test_a_second_signal_leaves_what_recover_undoes(
    kernel: FakeKernel, journal: Journal, at: int
) -> None:
    before = kernel.state()
    at_write(kernel, at, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Stuck, match="interrupted while the kernel worked on it") as caught:
        do(kernel.host(), journal, BOTH)
    assert caught.value.hint == "vfiotool recover"
    kernel.before_write = None
    (result,) = recover(kernel.host(), journal)
    assert result.result == "undone"
    assert kernel.state() == before


def test_an_interrupted_access_leaves_no_answer_for_the_next(tmp_path: Path) -> None:
    pipe, plain = tmp_path / "pipe", tmp_path / "plain"
    os.mkfifo(pipe)
    plain.write_text("plain")
    child = WriterProcess()
    with pytest.raises(KeyboardInterrupt), struck(0.2):
        # Opening a pipe to write waits for its reader, as a device's lock is waited for.
        child.write_attribute(str(pipe), b"x", 30.0)
    assert not child.usable()
    reader = os.open(pipe, os.O_RDONLY)
    deadline = time.monotonic() + 10
    while not os.read(reader, 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(reader)


def test_the_command_says_that_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str], chosen: Globals) -> int:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(program, "run", interrupted)
    assert app.main(["bind", EDU]) == 143
    assert "changes were rolled back" in capsys.readouterr().err


def test_a_change_in_another_thread_leaves_the_signals_to_the_main_one() -> None:
    """signal(2) is the main thread's: a program that uses the library keeps its own handlers."""
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def change() -> None:
        with kept():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    assert seen == [before]
    with kept():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
