"""Between the look at who uses a disk and the write that takes it, nobody can come to mount it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.change.changing import NVME, binding, furnished, run_folder
from tests.fakes.kernel import FakeKernel
from vfiotool.change import guard
from vfiotool.change.apply import change
from vfiotool.change.guard import Allowance
from vfiotool.change.journal import Journal
from vfiotool.errors import Refused
from vfiotool.host.child import WriterProcess, _write_once
from vfiotool.usage.blocker import Blocker, Usage

NODE = "/dev/nvme0n1"


class Claiming(FakeKernel):
    """A kernel whose disks can be claimed; `claimed_first`: how often somebody has one first."""

    claims_disks = True
    claimed_first = 0
    claims: list[tuple[str, tuple[str, ...]]]

    def write_claiming(
        self, path: str, data: bytes, timeout_s: float, disks: tuple[str, ...]
    ) -> bool:
        self.claims.append((path.rpartition("/")[2], disks))
        if self.claimed_first:
            self.claimed_first -= 1
            return False
        self.write_attribute(path, data, timeout_s)
        return True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Claiming:
    kernel = furnished()
    kernel.__class__ = Claiming
    assert isinstance(kernel, Claiming)
    kernel.claims = []
    monkeypatch.setattr(guard, "_disks_of", lambda sight, taken: ("nvme0n1",))
    return kernel


def take(kernel: Claiming, allowed: tuple[Allowance, ...] = ()) -> None:
    host = kernel.host()
    with run_folder() as folder:
        journal = Journal(host, folder)
        steps = binding(NVME)(host, journal)
        change(host, journal, "a change", lambda: steps, timeout_s=5.0, allowed=allowed)


def driver(kernel: Claiming) -> str | None:
    return kernel.host().linkname(f"/sys/bus/pci/devices/{NVME}/driver")


def test_a_disk_is_claimed_while_its_driver_is_unbound(kernel: Claiming) -> None:
    take(kernel)
    assert ("unbind", ("nvme0n1",)) in kernel.claims
    assert driver(kernel) == "vfio-pci"


def test_a_disk_that_is_free_again_at_the_second_look_is_taken(kernel: Claiming) -> None:
    kernel.claimed_first = 1
    take(kernel)
    assert [name for name, _ in kernel.claims][:2] == ["unbind", "unbind"]
    assert driver(kernel) == "vfio-pci"


def test_a_disk_that_somebody_claims_and_no_look_finds_stays(kernel: Claiming) -> None:
    kernel.claimed_first = 9
    with pytest.raises(Refused, match="nvme0n1: somebody takes it"):
        take(kernel)
    assert driver(kernel) == "nvme"
    assert not any(path.endswith("/unbind") for path, _ in kernel.writes)


MOUNTED = Blocker("mounted", NVME, "/data", "it is mounted at /data", "mount tables")
OPEN = Blocker("open-file", NVME, "/dev/nvme0", "/dev/nvme0 is open in pid 1", "pid 1")


@pytest.mark.parametrize(("use", "taken"), [(MOUNTED, True), (OPEN, False)])
def test_an_allowed_use_of_the_disk_alone_explains_that_it_is_claimed(
    kernel: Claiming, monkeypatch: pytest.MonkeyPatch, use: Blocker, taken: bool
) -> None:
    """What was allowed of something else, such as a node that is open, says nothing of a mount."""
    monkeypatch.setattr(guard, "look", lambda *_: Usage((use,)))
    kernel.claimed_first = 2
    allowed = (Allowance(use.kind, use.subject),)
    if taken:
        take(kernel, allowed)
        assert driver(kernel) == "vfio-pci"
        return
    with pytest.raises(Refused, match="nvme0n1: somebody takes it"):
        take(kernel, allowed)
    assert driver(kernel) == "nvme"


def test_nothing_is_written_while_a_disk_is_another_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute, real = tmp_path / "unbind", os.open
    attribute.touch()
    held: dict[str, int] = {}

    def opened(path: str, flags: int) -> int:
        if path in held:
            assert flags & os.O_EXCL
            raise OSError(held[path], "held")
        return real(path, flags)

    monkeypatch.setattr(os, "open", opened)
    held[NODE] = errno.EBUSY
    assert _write_once(str(attribute), b"1", [NODE]) == (0, -1)
    # It may be anybody's: this process cannot open it.
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        held[NODE] = number
        assert _write_once(str(attribute), b"1", [NODE]) == (number, 0)
    assert attribute.read_bytes() == b""
    # No node, or no medium: nobody can mount it.
    held[NODE] = errno.ENOENT
    assert _write_once(str(attribute), b"1", [NODE]) == (0, 1)
    assert attribute.read_bytes() == b"1"


def test_the_writing_child_tells_that_a_disk_is_another_s(tmp_path: Path) -> None:
    attribute = tmp_path / "unbind"
    attribute.touch()
    child = WriterProcess()
    try:
        assert child.write_attribute(str(attribute), b"1", 30.0, (str(tmp_path / "absent"),))
        with pytest.raises(OSError, match="absent") as caught:
            child.write_attribute(str(tmp_path / "absent"), b"1", 30.0, (NODE,))
        assert caught.value.filename == str(tmp_path / "absent")
    finally:
        child.close()
