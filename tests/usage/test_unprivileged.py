"""What somebody else than root is told: that it was not looked at, once, and who sees more."""

from __future__ import annotations

import os

import pytest

from tests.fakes.small_host import SmallHost
from tests.usage.test_unseen import DISK, GPU, NIC, USB, quiet_host
from vfiotool.cli import context
from vfiotool.cli.main import main
from vfiotool.host import paths
from vfiotool.usage.case import read_case
from vfiotool.usage.verdict import explain

HIDDEN = "!\tthe open files of 93 processes\n."


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> SmallHost:
    """A running host that an ordinary user looks at."""
    small = quiet_host()
    small.file(paths.OPEN_NODES, HIDDEN)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(context, "open_host", lambda _: small.host(live=True))
    return small


@pytest.mark.parametrize("command", ["devices", "groups", "tree"])
def test_a_listing_says_once_that_root_sees_more(
    unprivileged: SmallHost, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command]) == 0
    said = capsys.readouterr()
    assert "available" not in said.out
    assert said.err.count("sudo") == 1
    assert said.err == (
        "5 of these are blocked only because who uses them cannot be seen without root: "
        f"sudo vfiotool {command}\n"
    )


@pytest.mark.parametrize("command", ["devices", "groups", "tree"])
def test_a_listing_of_root_says_nothing_of_it(
    unprivileged: SmallHost,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main([command]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("device", [DISK, NIC, GPU, USB])
def test_why_names_sudo_as_the_one_step(
    unprivileged: SmallHost, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    assert main(["why", device]) == 1
    said = capsys.readouterr().out
    assert "cannot be told: what may use it was not looked at" in said
    verdict = explain(read_case(unprivileged.host(live=True), device))
    assert verdict.next == (f"sudo vfiotool why {device}",)
    assert verdict.word == "blocked"


def test_a_use_that_is_seen_is_still_named_and_the_step_is_to_look_as_root(
    unprivileged: SmallHost,
) -> None:
    """No step that ends a use is offered while others may be hidden."""
    unprivileged.mounts("self\t30 1 259:0 / /mnt rw - ext4 /dev/nvme0n1 rw", ".")
    verdict = explain(read_case(unprivileged.host(live=True), DISK))
    assert [blocker.kind for blocker in verdict.blockers] == ["mounted", "unseen"]
    assert verdict.next == (f"sudo vfiotool why {DISK}",)


def test_what_has_to_stay_stays_whoever_looks(unprivileged: SmallHost) -> None:
    unprivileged.mounts("self\t30 1 259:0 / / rw - ext4 /dev/nvme0n1 rw", ".")
    verdict = explain(read_case(unprivileged.host(live=True), DISK))
    assert verdict.next == ()
    assert "the host runs from it" in verdict.warnings[0]


def test_another_machines_tree_does_not_call_for_sudo(
    unprivileged: SmallHost, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = explain(read_case(unprivileged.host(), DISK))
    assert not any("sudo" in step for step in verdict.next)
