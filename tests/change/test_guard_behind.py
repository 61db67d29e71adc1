"""A bridge's step asks about what lies behind it, before anything is written."""

from __future__ import annotations

from tests.fakes.small_host import SmallHost
from vfiotool.change.guard import find_blockers
from vfiotool.change.steps.bind import BindDriver, Binding
from vfiotool.devices.attached import functions_behind
from vfiotool.usage.case import read_case
from vfiotool.usage.verdict import explain


def parked(address: str, driver: str) -> BindDriver:
    return BindDriver(address, Binding(driver, None), Binding(None, "none"))


def bridge_with_a_disk() -> SmallHost:
    small = SmallHost()
    small.function("0000:00:1c.0", class_code="060400", driver="shpchp", group=1)
    path = small.function(
        "0000:05:00.0", under=["0000:00:1c.0"], class_code="010802", driver="nvme", group=1
    )
    small.block("nvme0n1", f"{path}/nvme/nvme0/nvme0n1", "259:0")
    return small


def test_a_disk_behind_a_bridge_that_is_mounted_stops_the_bridges_step() -> None:
    small = bridge_with_a_disk()
    step = parked("0000:00:1c.0", "shpchp")
    assert find_blockers(small.host(), [step]) == ()
    small.mounts("self\t30 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw")
    found = find_blockers(small.host(), [step])
    assert [(entry.kind, entry.device) for entry in found] == [("mounted", "0000:05:00.0")]


def test_a_bridge_without_a_driver_takes_nothing_from_anybody() -> None:
    small = bridge_with_a_disk()
    del small.links["/sys/devices/pci0000:00/0000:00:1c.0/driver"]
    taken = parked("0000:00:1c.0", "shpchp").takes(small.host())
    assert "0000:05:00.0" not in [item.device for item in taken]


def test_all_that_lies_behind_is_found_through_bridges_and_domains() -> None:
    small = SmallHost()
    small.function("0000:00:0e.0", driver="vmd")
    small.function("10000:e0:06.0", under=["0000:00:0e.0", "pci10000:e0"])
    small.function("10000:e1:00.0", under=["0000:00:0e.0", "pci10000:e0", "10000:e0:06.0"])
    small.function("0000:00:0f.0")
    assert functions_behind(small.host(), "0000:00:0e.0") == ("10000:e0:06.0", "10000:e1:00.0")
    assert functions_behind(small.host(), "0000:00:0f.0") == ()
    assert functions_behind(small.host(), "0000:77:00.0") == ()


def test_a_group_with_a_controller_and_what_lies_behind_it_has_no_step() -> None:
    """Binding the whole group would take the disk away in the middle (Intel's VMD)."""
    small = SmallHost()
    small.folders.add("/sys/bus/pci/drivers/vfio-pci")
    small.function("0000:00:1f.3", class_code="040300", driver="snd_hda_intel", group=3)
    small.function("0000:00:0e.0", class_code="010400", driver="vmd", group=3)
    path = small.function(
        "10000:e1:00.0",
        under=["0000:00:0e.0", "pci10000:e0"],
        class_code="010802",
        driver="nvme",
        group=3,
    )
    small.block("nvme0n1", f"{path}/nvme/nvme0/nvme0n1", "259:0")
    verdict = explain(read_case(small.host(), "0000:00:1f.3"))
    assert verdict.next == ()
    assert any("10000:e1:00.0 lies behind 0000:00:0e.0" in note for note in verdict.notes)
