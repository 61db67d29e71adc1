"""The comparison of two captures by device."""

from __future__ import annotations

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.snapshot.devices import differences
from vfiotool.snapshot.diff import compare
from vfiotool.snapshot.text import Snapshot

DISK, EDU = "0000:01:00.0", "0000:02:00.0"


def snapshot(small: SmallHost) -> Snapshot:
    return Snapshot({}, dict(small.files), dict(small.links), frozenset(small.folders))


def hosts(driver: str, point: str, count: int) -> Snapshot:
    small = SmallHost()
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    small.function(DISK, identity="1b36:0010", class_code="010802", driver=driver, group=1)
    small.mounts(f"self\t40 1 259:0 / {point} rw - ext4 /dev/nvme0n1 rw")
    small.file("/proc/interrupts", f" 31: {count} 0 IR-PCI-MSIX")
    return snapshot(small)


def test_a_driver_and_a_mount_are_told_by_what_they_are_of() -> None:
    found = differences(hosts("nvme", "/a", 1), hosts("vfio-pci", "/b", 1))
    assert [item.line() for item in found] == [
        "- /a: /dev/nvme0n1 (ext4)",
        "+ /b: /dev/nvme0n1 (ext4)",
        f"~ {DISK}: driver nvme => vfio-pci",
    ]


def test_counters_are_no_difference_but_in_the_raw_comparison() -> None:
    before, after = hosts("nvme", "/a", 1), hosts("nvme", "/a", 2)
    assert differences(before, after) == []
    assert compare(before, after, volatile=False) == []
    assert [change.path for change in compare(before, after)] == ["/proc/interrupts"]


def test_of_a_device_that_came_that_alone_is_told() -> None:
    small = SmallHost()
    small.function(EDU, group=2, driver="x")
    found = differences(Snapshot({}, {}, {}, frozenset()), snapshot(small))
    assert [item.line() for item in found] == [f"+ {EDU}: 1234:11e8 class 00ff00"]


@pytest.mark.parametrize(
    ("path", "before", "moved", "changed"),
    [
        (
            "/sys/devices/system/node/node0/meminfo",
            "Node 0 MemTotal: 983708 kB\nNode 0 MemFree: 855836 kB\n",
            "Node 0 MemTotal: 983708 kB\nNode 0 MemFree: 839904 kB\n",
            "Node 0 MemTotal: 491854 kB\nNode 0 MemFree: 839904 kB\n",
        ),
        (
            "/proc/swaps",
            "Filename Type Size Used Priority\n/dev/sda2 partition 9 0 -2\n",
            "Filename Type Size Used Priority\n/dev/sda2\tpartition\t9\t7\t-2\n",
            "Filename Type Size Used Priority\n/dev/sdb2 partition 9 0 -2\n",
        ),
    ],
)
def test_of_a_table_that_moves_what_stays_is_compared(
    path: str, before: str, moved: str, changed: str
) -> None:
    def of(text: str) -> Snapshot:
        return Snapshot({}, {path: text.encode()}, {}, frozenset())

    assert compare(of(before), of(moved), volatile=False) == []
    assert [change.path for change in compare(of(before), of(changed), volatile=False)] == [path]
    assert [change.path for change in compare(of(before), of(moved))] == [path]
    gone = Snapshot({}, {}, {}, frozenset())
    assert [change.path for change in compare(of(before), gone, volatile=False)] == [path]
