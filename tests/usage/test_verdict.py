"""`why`, on hosts in memory: what stands in the way, and what to type next."""

from __future__ import annotations

import pytest

from tests.fakes.config_space import build
from tests.fakes.small_host import SmallHost
from vfiotool.errors import NotFound
from vfiotool.usage.case import read_case
from vfiotool.usage.verdict import Verdict, explain

EDU = "0000:00:01.0"
DISK = "0000:01:00.0"
NIC = "0000:02:00.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
REMAPPED = " 31: 0 0 IR-PCI-MSIX-0000:00:1e.0 0-edge virtio0"
PLAIN = " 31: 0 0 PCI-MSIX-0000:00:1e.0 0-edge virtio0"


@pytest.fixture
def small() -> SmallHost:
    small = SmallHost()
    small.folders.add("/sys/bus/pci/drivers/vfio-pci")
    small.file("/proc/interrupts", REMAPPED)
    small.file("/sys/firmware/acpi/tables/DMAR", "")
    return small


def ask(small: SmallHost, address: str) -> Verdict:
    host = small.host()
    return explain(read_case(host, address, reasons=True))


def kinds(verdict: Verdict) -> list[tuple[str, str]]:
    return [(blocker.kind, blocker.device) for blocker in verdict.blockers]


def test_an_unused_device_in_a_group_of_its_own_is_passable(small: SmallHost) -> None:
    small.function(EDU, group=3)
    verdict = ask(small, EDU)
    assert (verdict.passable, verdict.blockers) == (True, ())
    assert verdict.group is not None and verdict.group.id == 3
    assert verdict.next == (
        f"vfiotool bind {EDU}",
        f"vfiotool vm check {EDU}",
        f"vfiotool vm qemu {EDU}",
    )


def test_a_device_on_vfio_is_ready_for_a_vm(small: SmallHost) -> None:
    small.function(EDU, group=3, driver="vfio-pci")
    verdict = ask(small, EDU)
    assert verdict.passable
    assert verdict.next == (f"vfiotool vm check {EDU}", f"vfiotool vm qemu {EDU}")


def test_a_device_on_vfio_that_a_process_holds_is_not_passable(small: SmallHost) -> None:
    small.function(EDU, group=3, driver="vfio-pci")
    small.file("/proc/vfiotool/open-nodes", "5\tqemu\t/dev/vfio/3\t/sys/devices/virtual/vfio/3")
    assert kinds(ask(small, EDU)) == [("open-file", EDU)]


def test_the_other_members_and_what_uses_them_are_named(small: SmallHost) -> None:
    small.function(EDU, group=3)
    small.nvme(DISK, "nvme0n1", "259:0", group=3)
    small.function("0000:00:1c.0", class_code="060400", driver="pcieport", group=3)
    small.mounts("self\t40 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw")
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("group-member", DISK), ("mounted", DISK)]
    assert verdict.blockers[0].evidence == f"/sys/kernel/iommu_groups/3/devices/{DISK}"
    assert verdict.next[:2] == ("umount /data", f"vfiotool bind {EDU} --whole-group")


def test_a_bridge_in_the_way_is_parked_and_endpoints_go_along(small: SmallHost) -> None:
    bridge = "0000:00:1c.0"
    small.function(EDU, group=3)
    small.function(bridge, class_code="060401", driver="shpchp", group=3)
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("group-member", bridge)]
    parking = f"vfiotool bind {bridge} --driver none"
    assert verdict.next[:2] == (parking, f"vfiotool bind {EDU}")
    small.function(DISK, driver="nvme", group=3)
    assert ask(small, EDU).next[:2] == (parking, f"vfiotool bind {EDU} --whole-group")
    # A CardBus bridge would take its cards along.
    small.function(bridge, class_code="060700", driver="yenta_cardbus", group=3)
    assert parking not in ask(small, EDU).next


def test_why_a_group_has_several_members_is_a_note(small: SmallHost) -> None:
    port = "0000:00:1c.0"
    config = build([(0x10, b"\x42\x00" + bytes(56))], bridge=True)
    small.function(port, class_code="060400", driver="pcieport", group=3, config=bytes(config))
    small.function(DISK, under=[port], group=3)
    assert ask(small, DISK).notes == (f"the root port {port} has no ACS capability",)


def test_no_iommu_in_the_firmware(small: SmallHost) -> None:
    del small.files["/sys/firmware/acpi/tables/DMAR"]
    small.folders.add("/sys/firmware/acpi/tables")
    small.function(EDU)
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("no-iommu", EDU)]
    assert verdict.blockers[0].detail.endswith("the firmware shows none")
    assert verdict.group is None
    assert verdict.next == ("vfiotool doctor",)


def test_no_iommu_although_the_firmware_has_one_names_the_kernel_option(small: SmallHost) -> None:
    small.function(EDU)
    small.file("/etc/os-release", "ID=debian\nPRETTY_NAME=Debian")
    small.file("/etc/default/grub", "")
    small.file("/proc/cmdline", "quiet")
    verdict = ask(small, EDU)
    assert verdict.blockers[0].detail.endswith("the firmware has one (DMAR)")
    assert verdict.next == (
        "echo 'GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on\"'"
        " >> /etc/default/grub.d/vfio.cfg",
        "update-grub",
        "reboot",
    )


def test_a_device_beside_the_iommu(small: SmallHost) -> None:
    small.function(EDU)
    small.function(DISK, group=1)
    assert ask(small, EDU).blockers[0].detail.startswith("no IOMMU translates for it")


def test_a_noiommu_group_is_no_iommu(small: SmallHost) -> None:
    small.function(EDU, group=0, driver="vfio-pci")
    small.file("/sys/kernel/iommu_groups/0/name", "vfio-noiommu")
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("no-iommu", EDU)]
    assert "no-IOMMU group" in verdict.blockers[0].detail


def test_a_direct_region_blocks_and_a_relaxable_one_does_not(small: SmallHost) -> None:
    small.function(EDU, group=3)
    regions = "/sys/kernel/iommu_groups/3/reserved_regions"
    small.file(regions, "0x00000000000e0000 0x00000000000fffff direct-relaxable")
    assert ask(small, EDU).passable
    small.file(regions, "0x00000000000e0000 0x00000000000fffff direct")
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("reserved-direct", EDU)]
    assert verdict.blockers[0].subject == "0xe0000-0xfffff"
    assert verdict.blockers[0].evidence == regions


def test_interrupts_that_are_not_remapped_block_unless_that_was_allowed(small: SmallHost) -> None:
    small.function(EDU, group=3)
    small.file("/proc/interrupts", PLAIN)
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("no-interrupt-remapping", EDU)]
    assert "PCI-MSIX-0000:00:1e.0 and no IR- chip" in verdict.blockers[0].evidence
    small.file("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y")
    assert ask(small, EDU).passable


@pytest.mark.parametrize(
    ("identity", "class_code", "words"),
    [
        ("8086:3420", "060400", "it is a bridge"),
        ("104c:ac50", "060700", "it is a bridge"),
        ("8086:4660", "060000", "a bridge of the platform"),
        ("8086:7a84", "060100", "a bridge of the platform"),
        ("8086:37c8", "0b4000", "deny list"),
    ],
)
def test_functions_that_vfio_pci_refuses(
    small: SmallHost, identity: str, class_code: str, words: str
) -> None:
    small.function(EDU, group=3, identity=identity, class_code=class_code)
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("no-driver", EDU)]
    assert words in verdict.blockers[0].detail
    assert verdict.next == ()


def test_a_device_on_the_deny_list_is_passable_where_the_list_is_off(small: SmallHost) -> None:
    small.function(EDU, group=3, identity="8086:37c8", class_code="0b4000")
    small.file("/sys/module/vfio_pci/parameters/disable_denylist", "Y")
    assert ask(small, EDU).passable


def test_lockdown_is_a_note_and_no_blocker(small: SmallHost) -> None:
    small.function(EDU, group=3)
    small.file("/sys/kernel/security/lockdown", "none [integrity] confidentiality")
    verdict = ask(small, EDU)
    assert (verdict.passable, len(verdict.notes)) == (True, 1)
    assert "locked down (integrity)" in verdict.notes[0]


def test_what_vendors_call_an_other_bridge_is_a_device(small: SmallHost) -> None:
    """NVIDIA's NVSwitch, which machines for eight cards hand to a virtual machine."""
    small.function(EDU, group=3, identity="10de:22a3", class_code="068000")
    assert ask(small, EDU).next[0] == f"vfiotool bind {EDU}"
    small.function(DISK, group=3, class_code="068000", driver="nvidia-nvswitch")
    assert ask(small, EDU).next[0] == f"vfiotool bind {EDU} --whole-group"


def test_a_bridge_of_the_platform_that_somebody_bound_by_hand_is_ready(small: SmallHost) -> None:
    small.function(EDU, group=3, class_code="060100", driver="vfio-pci")
    assert ask(small, EDU).word == "ready"


def test_a_kernel_without_vfio_pci(small: SmallHost) -> None:
    small.folders.discard("/sys/bus/pci/drivers/vfio-pci")
    small.function(EDU, group=3)
    small.file("/proc/sys/kernel/osrelease", "6.1.0-test")
    small.file("/lib/modules/6.1.0-test/modules.dep", "")
    verdict = ask(small, EDU)
    assert kinds(verdict) == [("no-driver", EDU)]
    small.file("/lib/modules/6.1.0-test/kernel/drivers/vfio/pci/vfio-pci.ko.xz", "")
    assert ask(small, EDU).passable


def test_commands_take_down_what_stands_on_top_first(small: SmallHost) -> None:
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    base = f"/sys/devices/pci0000:00/{DISK}/nvme/nvme0/nvme0n1"
    small.block("nvme0n1", base, "259:0", holders=["md0"])
    small.block("md0", "/sys/devices/virtual/block/md0", "9:0", holders=["dm-0"])
    small.file("/sys/devices/virtual/block/md0/md/level", "raid1")
    small.block("dm-0", "/sys/devices/virtual/block/dm-0", "253:0")
    small.file("/sys/devices/virtual/block/dm-0/dm/name", "vg-root")
    small.file("/sys/devices/virtual/block/dm-0/dm/uuid", "LVM-x")
    small.mounts(
        "self\t40 1 253:0 / /srv rw - ext4 /dev/mapper/vg-root rw",
        "self\t41 40 253:0 / /srv/inner rw - ext4 /dev/mapper/vg-root rw",
    )
    small.file("/proc/swaps", "Filename Type\n/srv/swap file 1 0 -2")
    assert ask(small, DISK).next[:5] == (
        "swapoff /srv/swap",
        "umount /srv/inner",
        "umount /srv",
        "lvchange --activate n vg/root",
        "mdadm --stop /dev/md0",
    )


def test_nothing_is_offered_that_would_take_the_root_file_system(small: SmallHost) -> None:
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    small.mounts("self\t40 1 259:0 / / rw - ext4 /dev/nvme0n1 rw")
    verdict = ask(small, DISK)
    assert verdict.next == ()
    assert verdict.warnings == (
        f"/ is on {DISK}: it cannot be passed through, the host runs from it",
    )


def test_nothing_is_offered_for_the_volume_below_the_root_file_system(small: SmallHost) -> None:
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    base = f"/sys/devices/pci0000:00/{DISK}/nvme/nvme0/nvme0n1"
    small.block("nvme0n1", base, "259:0", holders=["md0"])
    small.block("md0", "/sys/devices/virtual/block/md0", "9:0")
    small.file("/sys/devices/virtual/block/md0/md/level", "raid1")
    small.mounts("self\t40 1 9:0 / / rw - ext4 /dev/md0 rw")
    verdict = ask(small, DISK)
    assert kinds(verdict) == [("mounted", DISK), ("storage-member", DISK)]
    assert verdict.next == ()


def test_no_command_cuts_the_callers_own_session_off_below_a_bridge(small: SmallHost) -> None:
    port = small.network(NIC, "eth1")
    bridge = small.virtual_interface("br0", "bridge", port)
    small.link(f"{port}/master", bridge)
    small.folders.add(f"{bridge}/bridge")
    small.addresses(("br0", "10.0.2.15/24"))
    small.file("/proc/vfiotool/caller", "10.0.2.15\t192.0.2.9")
    verdict = ask(small, NIC)
    assert kinds(verdict) == [("bridge-or-bond", NIC), ("route", NIC)]
    assert verdict.next == ()
    assert verdict.warnings == (
        f"you are logged in over br0 on {NIC}: log in by another way first",
    )


def test_a_display_is_taken_by_a_command_that_says_what_it_cuts_off(small: SmallHost) -> None:
    path = small.function(EDU, class_code="030000", driver="bochs-drm", group=3)
    small.file(f"{path}/boot_vga", "1")
    small.link("/sys/class/drm/card0-Virtual-1", f"{path}/drm/card0/card0-Virtual-1")
    small.file(f"{path}/drm/card0/card0-Virtual-1/enabled", "enabled")
    assert ask(small, EDU).next[0] == (
        f"vfiotool bind {EDU} --allow boot-vga:{EDU} --allow display:card0-Virtual-1"
    )


@pytest.mark.parametrize(("buffer", "last"), [("BOOTFB", "reboot"), ("other", None)])
def test_a_firmware_frame_buffer_is_left_out_at_the_next_boot(
    small: SmallHost, buffer: str, last: str | None
) -> None:
    path = small.function(EDU, class_code="030000", driver="vfio-pci", group=3)
    small.file(f"{path}/resource", "0x00000000c0000000 0x00000000c0ffffff 0x0000000000042208")
    small.file("/proc/iomem", f"c0000000-c0ffffff : {EDU}\n  c0000000-c07fffff : {buffer}")
    steps = ask(small, EDU).next
    assert ("reboot" in steps) == (last == "reboot")
    if last is not None:
        assert steps[-1] == last


def test_what_could_not_be_seen_stands_in_the_way(small: SmallHost) -> None:
    small.function(EDU, group=3)
    small.file("/proc/vfiotool/open-nodes", "!\topen files of 7 processes of other users")
    verdict = ask(small, EDU)
    assert (verdict.word, kinds(verdict)) == ("blocked", [("unseen", EDU)])
    assert "open files of 7 processes of other users" in verdict.blockers[0].detail


def mdev(small: SmallHost, driver: str | None) -> None:
    path = f"{small.function(EDU)}/{UUID}"
    small.link(f"/sys/bus/mdev/devices/{UUID}", path)
    small.member(9, UUID, path)
    if driver is not None:
        small.link(f"{path}/driver", f"/sys/bus/mdev/drivers/{driver}")


def test_a_mediated_device_needs_its_driver_alone(small: SmallHost) -> None:
    mdev(small, "vfio_mdev")
    verdict = ask(small, UUID)
    assert (verdict.passable, verdict.next[-1]) == (True, f"vfiotool vm qemu {UUID}")
    assert verdict.as_json()["address"] == UUID


def test_a_mediated_device_without_a_driver(small: SmallHost) -> None:
    mdev(small, None)
    assert kinds(ask(small, UUID)) == [("no-driver", UUID)]


def test_an_unknown_device_is_not_found(small: SmallHost) -> None:
    for name in ("0000:7f:00.0", UUID):
        with pytest.raises(NotFound):
            ask(small, name)


def test_the_json_has_the_contracts_fields(small: SmallHost) -> None:
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    small.mounts("self\t40 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw")
    answer = ask(small, DISK).as_json()
    assert {"address", "passable", "group", "blockers", "next"} <= set(answer)
    (blocker,) = answer["blockers"]  # type: ignore[misc]
    assert {"kind", "device", "detail", "evidence"} <= set(blocker)


def test_nothing_is_offered_against_the_pool_that_the_root_file_system_is_on(
    small: SmallHost,
) -> None:
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    small.folders.add("/proc/spl/kstat/zfs/rpool")
    small.file("/run/udev/data/b259:0", "E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL=rpool")
    small.mounts("self\t30 1 0:26 / / rw - zfs rpool/ROOT/pve-1 rw")
    verdict = ask(small, DISK)
    assert verdict.next == ()
    assert verdict.warnings[0].startswith("/ is on the ZFS pool rpool")
    small.mounts("self\t30 1 0:26 / /tank rw - zfs rpool/data rw")
    assert ask(small, DISK).next[0] == "zpool export rpool"
    # The root file system on another pool.
    small.mounts("self\t30 1 0:26 / / rw - zfs other/ROOT rw")
    assert ask(small, DISK).next[0] == "zpool export rpool"


def test_a_use_that_no_command_ends_is_said_to_be_one(small: SmallHost) -> None:
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    small.file("/sys/kernel/config/cluster/ours/heartbeat/AB/dev", "nvme0n1")
    small.folders |= {
        "/sys/kernel/config/cluster/ours",
        "/sys/kernel/config/cluster/ours/heartbeat/AB",
    }
    verdict = ask(small, DISK)
    assert verdict.next == ()
    (note,) = verdict.notes
    assert note.startswith("no step is known that ends it: nvme0n1 has the heartbeat")


def test_nothing_is_offered_against_the_network_that_the_root_file_system_is_on(
    small: SmallHost,
) -> None:
    small.network(NIC, "eth1")
    small.addresses(("eth1", "10.0.2.15/24"))
    small.mounts("self\t30 1 0:26 / / rw - nfs4 10.0.2.1:/root rw")
    verdict = ask(small, NIC)
    assert verdict.next == ()
    assert verdict.warnings[0].startswith("/ is mounted over the network (nfs4")


def test_the_default_route_is_a_warning_and_never_a_step(small: SmallHost) -> None:
    small.network(NIC, "eth1")
    small.addresses(("eth1", "10.0.2.15/24"))
    row = "eth1\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0"
    small.file("/proc/net/route", f"Iface\tDestination\n{row}")
    verdict = ask(small, NIC)
    assert verdict.next == ()
    assert "carries the default route" in verdict.warnings[0]


def test_a_group_with_a_device_that_cannot_be_bound_along_has_no_step(small: SmallHost) -> None:
    small.function(EDU, group=3)
    small.member(3, "17020000.ethernet", "/sys/devices/platform/17020000.ethernet")
    small.folders.add("/sys/devices/platform/17020000.ethernet")
    small.link("/sys/devices/platform/17020000.ethernet/driver", "/sys/bus/platform/drivers/xgene")
    verdict = ask(small, EDU)
    assert verdict.next == ()
    assert any("is not a PCI function" in note for note in verdict.notes)


def test_without_an_iommu_no_use_is_ended(small: SmallHost) -> None:
    small.nvme(DISK, "nvme0n1", "259:0")
    small.mounts("self\t40 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw")
    small.file("/proc/cmdline", "quiet")
    assert not [step for step in ask(small, DISK).next if step.startswith("umount")]


def test_the_boot_display_is_taken_with_a_word_on_what_goes_dark(small: SmallHost) -> None:
    path = small.function(EDU, class_code="030000", driver="bochs-drm", group=3)
    small.file(f"{path}/boot_vga", "1")
    assert any("another way in first" in note for note in ask(small, EDU).notes)


def test_a_slot_beside_the_iommu_has_no_step(small: SmallHost) -> None:
    small.function(EDU)
    small.function(DISK, group=1)
    verdict = ask(small, EDU)
    assert verdict.next == ()
    assert any("no IOMMU of this host translates" in note for note in verdict.notes)


def test_a_program_that_holds_the_device_has_to_end_before_the_next_step(small: SmallHost) -> None:
    small.function(EDU, group=3, driver="vfio-pci")
    small.file("/proc/vfiotool/open-nodes", "5\tqemu\t/dev/vfio/3\t/sys/devices/virtual/vfio/3")
    assert any("end that before the next step" in note for note in ask(small, EDU).notes)


def test_a_mediated_device_without_a_driver_is_removed_only_to_be_made_again(
    small: SmallHost,
) -> None:
    mdev(small, None)
    steps = ask(small, UUID).next
    assert steps[0] == f"vfiotool mdev remove {UUID}"
    path = small.links[f"/sys/bus/mdev/devices/{UUID}"]
    assert path
    assert all(step.endswith(UUID) for step in steps)


def test_what_a_mount_makes_visible_is_the_next_step_and_not_the_binding(small: SmallHost) -> None:
    small.nvme(DISK, "nvme0n1", "259:0")
    small.file("/sys/module/target_core_mod/initstate", "live")
    verdict = ask(small, DISK)
    assert kinds(verdict)[0][0] == "unseen"
    mounting = "mount -t configfs none /sys/kernel/config"
    assert verdict.next == (mounting, f"vfiotool why {DISK}")


def test_vfio_pci_that_is_built_in_needs_no_module(small: SmallHost) -> None:
    small.function(EDU, group=3)
    small.file("/proc/sys/kernel/osrelease", "6.12.1")
    small.folders.add("/lib/modules/6.12.1/kernel")
    assert ask(small, EDU).passable
    small.folders.remove("/sys/bus/pci/drivers/vfio-pci")
    assert kinds(ask(small, EDU)) == [("no-driver", EDU)]


def test_who_uses_the_vfs_of_a_function_is_told_of_the_function(small: SmallHost) -> None:
    """They go before it can be had."""
    small.network(NIC, "eth1")
    path = f"/sys/devices/pci0000:00/{NIC}"
    small.file(f"{path}/sriov_totalvfs", "4")
    small.file(f"{path}/sriov_numvfs", "1")
    vf = "0000:02:10.0"
    place = small.function(vf, class_code="020000", driver="igbvf", group=9)
    small.link(f"{path}/virtfn0", place)
    small.link(f"{place}/physfn", path)
    small.link("/sys/class/net/eth2", f"{place}/net/eth2")
    small.file(f"{place}/net/eth2/uevent", "INTERFACE=eth2")
    small.addresses(("eth2", "10.0.0.1/24"))
    assert set(kinds(ask(small, NIC))) == {("vfs-enabled", NIC), ("route", vf)}
