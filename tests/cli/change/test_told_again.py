"""What stands already is told as that, and leaves no change behind."""

from __future__ import annotations

import json

import pytest

from tests.change.changing import BEHIND
from tests.cli.change.test_lost_report import kernel as kernel
from tests.fakes.kernel import FakeKernel
from vfiotool.cli.main import main


@pytest.mark.usefixtures("kernel")
def test_the_second_bind_says_already_and_makes_no_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ansible and people tell changed from unchanged by it."""
    assert main(["bind", BEHIND]) == 0
    assert f"{BEHIND}: vfio-pci (group 13)" in capsys.readouterr().out
    assert main(["bind", BEHIND]) == 0
    again = capsys.readouterr()
    assert f"{BEHIND}: already vfio-pci (group 13)" in again.out
    assert "until reboot" not in again.err
    assert main(["--json", "bind", BEHIND]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["transaction"]) == ([], None)
    assert main(["--json", "history"]) == 0
    assert len(json.loads(capsys.readouterr().out)["history"]) <= 1


def test_release_of_what_was_never_taken_says_already(
    kernel: FakeKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    before = kernel.host().linkname(f"/sys/bus/pci/devices/{BEHIND}/driver")
    assert main(["release", BEHIND]) == 0
    assert f"{BEHIND}: already {before or 'no driver'}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["bind", BEHIND, "--driver"], ["release", "--timeout"]])
def test_an_option_without_its_value_shows_the_usage_of_its_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"usage: vfiotool {words[0]} [OPTIONS] DEVICE" in capsys.readouterr().err
