"""VFIO devices of which the kernel does not tell which they are: their group is asked."""

from __future__ import annotations

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.host import paths
from vfiotool.usage.survey import survey

EDU = "0000:00:01.0"
CLAIM = f"{paths.VFIO_CLAIM}/3"


def holding(*who: str) -> SmallHost:
    """A device on vfio-pci, and processes with a VFIO device whose group they closed."""
    small = SmallHost()
    small.function(EDU, group=3, driver="vfio-pci")
    lines = [f"{pid}\t{name}\tanon_inode:[vfio-device]\t?" for pid, name in enumerate(who, 5)]
    small.file(paths.OPEN_NODES, "\n".join([*lines, "."]))
    return small


def details(small: SmallHost, *, live: bool = False) -> list[tuple[str, str]]:
    found = survey(small.host(live=live), EDU).blockers
    return [(entry.kind, entry.detail) for entry in found if entry.subject.endswith("/3")]


@pytest.mark.parametrize(
    ("who", "said"),
    [
        (("qemu",), "/dev/vfio/3 is open in pid 5 (qemu)"),
        (("qemu", "dpdk"), "/dev/vfio/3 is open in one of pid 5 (qemu), pid 6 (dpdk)"),
    ],
)
def test_a_group_that_is_claimed_is_held_by_one_of_them(who: tuple[str, ...], said: str) -> None:
    small = holding(*who)
    small.file(CLAIM, "claimed")
    assert details(small) == [("open-file", said)]


@pytest.mark.parametrize("answer", ["free", "unknown ENOENT"])
def test_a_group_that_nobody_has_claimed_is_free(answer: str) -> None:
    small = holding("qemu")
    small.file(CLAIM, answer)
    assert details(small, live=True) == []


@pytest.mark.parametrize(("answer", "live"), [("unknown EIO", False), (None, True)])
def test_a_group_that_could_not_be_asked_is_unseen(answer: str | None, live: bool) -> None:
    small = holding("qemu")
    if answer is not None:
        small.file(CLAIM, answer)
    assert [kind for kind, _ in details(small, live=live)] == ["unseen"]


def test_a_recorded_host_was_never_asked_for_it() -> None:
    assert details(holding("qemu")) == []


def test_nobody_is_asked_where_the_node_itself_tells_its_holder() -> None:
    small = holding("qemu")
    small.file(paths.OPEN_NODES, "5\tqemu\t/dev/vfio/3\t/sys/devices/virtual/vfio/3\n6\tx\tv\t?\n.")
    small.file(CLAIM, "claimed")
    assert details(small) == [("open-file", "/dev/vfio/3 is open in pid 5 (qemu)")]
