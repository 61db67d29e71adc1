"""A report that cannot be written: what was done stands, and the exit code says so."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.change.changing import BEHIND, furnished, run_folder
from tests.fakes.kernel import FakeKernel, Fault
from vfiotool.change.journal import Journal
from vfiotool.cli import context
from vfiotool.cli.change import changing
from vfiotool.cli.main import main

FIXTURE = Path(__file__).resolve().parents[3] / "fixtures/hosts/vfs-enabled"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    """A host that commands take for this one."""
    made = furnished()
    with run_folder() as folder:
        monkeypatch.setattr(context, "open_host", lambda _: made.host())
        monkeypatch.setattr(changing, "Journal", lambda host: Journal(host, folder))
        yield made


class Gone(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error

    def flush(self) -> None:
        raise self._error


FULL = OSError(28, "No space left on device")
CLOSED = BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_change_whose_report_is_lost_stands_and_says_so(
    extra: list[str],
    kernel: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", Gone(FULL))
    assert main(["bind", BEHIND, *extra]) == 0
    said = capsys.readouterr().err
    assert "the output cannot be written: No space left on device; change 1 stands" in said
    assert "vfiotool undo" in said
    assert kernel.host().linkname(f"/sys/bus/pci/devices/{BEHIND}/driver") == "vfio-pci"
    monkeypatch.setattr(sys, "stdout", Gone(FULL))
    assert main(["undo", *extra]) == 0
    assert "change 1 is undone" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [FULL, CLOSED])
def test_notes_that_nobody_can_read_change_no_outcome(
    lost: OSError, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.faults = (Fault("EIO", 2),)
    monkeypatch.setattr(sys, "stderr", Gone(lost))
    assert main(["bind", BEHIND]) == 5


def test_the_kernels_answer_is_never_taken_for_lost_output(
    kernel: FakeKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel.faults = (Fault("EIO", 2),)
    assert main(["--json", "bind", BEHIND]) == 5
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "kernel"
    assert error["errno"] == "EIO"


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_error_keeps_its_exit_code_where_it_cannot_be_printed(
    stream: str, options: list[str]
) -> None:
    """Seen: 1 and a traceback, where the refusal's 4 was due."""
    command = [sys.executable, "-m", "vfiotool", "--root", str(FIXTURE), *options]
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, stream: full}
        done = subprocess.run([*command, "show", "0000:77:00.0"], text=True, check=False, **streams)
    assert done.returncode == 3
    assert "Traceback" not in (done.stderr or "")


def test_a_refusal_keeps_its_exit_code_where_its_reader_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    root = FIXTURE.parent / "storage-in-use"
    command = [sys.executable, "-m", "vfiotool", "--root", str(root), "bind", "01:00.0"]
    try:
        done = subprocess.run([*command, "--dry-run"], stderr=writer, check=False)
    finally:
        os.close(writer)
    assert done.returncode == 4
