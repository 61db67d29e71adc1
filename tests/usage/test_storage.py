"""Disks in use, on hosts in memory; tests/lab/test_blockers_storage.py does it for real."""

from __future__ import annotations

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.host.paths import BLOCK_CLAIM
from vfiotool.usage.mounts import parse_mount, unescape
from vfiotool.usage.survey import Blocker, blockers, survey

DISK = "0000:01:00.0"


def mount(number: str, point: str, source: str, kind: str = "ext4", pid: str = "self") -> str:
    return f"{pid}\t40 1 {number} / {point} rw,relatime shared:1 - {kind} {source} rw"


@pytest.fixture
def small() -> SmallHost:
    small = SmallHost()
    small.nvme(DISK, "nvme0n1", "259:0")
    return small


def found(small: SmallHost, address: str = DISK) -> list[tuple[str, str]]:
    return [(entry.kind, entry.subject) for entry in blockers(small.host(), address)]


def test_a_disk_nobody_uses_has_no_blockers(small: SmallHost) -> None:
    small.mounts(mount("8:1", "/", "/dev/sda1"))
    assert found(small) == []


def test_a_mount_is_found_by_device_number_whatever_its_source_is_called(small: SmallHost) -> None:
    small.mounts(mount("259:0", "/mnt/a\\040b", "/dev/root"))
    (entry,) = blockers(small.host(), DISK)
    assert entry == Blocker(
        kind="mounted",
        device=DISK,
        subject="/mnt/a b",
        detail="nvme0n1 is mounted on /mnt/a b (ext4)",
        evidence="/proc/self/mountinfo: 259:0 /mnt/a b from /dev/root",
        remedy="umount '/mnt/a b'",
    )


def test_without_other_namespaces_tables_the_own_mountinfo_is_read(small: SmallHost) -> None:
    line = mount("259:0", "/mnt", "/dev/nvme0n1").partition("\t")[2]
    small.file("/proc/self/mountinfo", line)
    assert found(small) == [("mounted", "/mnt")]


@pytest.mark.parametrize(
    "above",
    [
        "40 36 0:99 / /mnt/a rw - tmpfs other rw",
        "40 36 8:17 / /mnt/a rw - ext4 /dev/sdb1 rw",
        "40 35 0:99 / /mnt rw - tmpfs other rw",
    ],
)
def test_what_is_mounted_over_a_mount_is_not_unmounted_for_it(small: SmallHost, above: str) -> None:
    """`umount` of the mount point would end the use of something else."""
    below = "self\t36 35 259:0 / /mnt/a rw - ext4 /dev/nvme0n1 rw"
    root = "self\t35 1 8:1 / / rw - ext4 /dev/sda1 rw"
    small.mounts(root, below)
    (entry,) = blockers(small.host(), DISK)
    assert entry.remedy == "umount /mnt/a"
    small.mounts(root, below, f"self\t{above}")
    (entry,) = blockers(small.host(), DISK)
    assert entry.remedy is None
    assert " hides it" in entry.detail


@pytest.mark.parametrize(
    "options", ["lowerdir=/mnt/a/l", "lowerdir=l/X,upperdir=/mnt/a/u,workdir=/w"]
)
def test_an_overlay_on_a_disk_is_a_use_of_it(small: SmallHost, options: str) -> None:
    """It keeps the disk after the disk's own mount is gone; the host may run from it."""
    small.mounts(
        "self\t35 1 0:40 / / rw - overlay overlay rw," + options,
        "self\t36 35 259:0 / /mnt/a rw - ext4 /dev/nvme0n1 rw",
    )
    assert found(small) == [("mounted", "/"), ("mounted", "/mnt/a")]
    root, _ = blockers(small.host(), DISK)
    assert root.vital is not None and root.remedy is None


def test_a_target_whose_configfs_is_not_mounted_is_unseen(small: SmallHost) -> None:
    """It runs on, and what it exports cannot be looked up."""
    small.file("/sys/module/target_core_mod/initstate", "live")
    (entry,) = blockers(small.host(), DISK)
    assert (entry.kind, entry.subject) == ("unseen", "/sys/kernel/config/target/core")
    assert entry.remedy == "mount -t configfs none /sys/kernel/config"
    small.folders.add("/sys/kernel/config/target/core")
    assert found(small) == []


@pytest.mark.parametrize(
    ("base", "evidence", "remedy"),
    [
        ("/sys/kernel/config/target/core/fileio_0/disk", "info", None),
        (
            "/sys/kernel/config/usb_gadget/g/functions/mass_storage.0/lun.0",
            "file",
            "echo > {}/file",
        ),
    ],
)
def test_what_a_target_opened_as_a_file_is_found_by_number(
    small: SmallHost, base: str, evidence: str, remedy: str | None
) -> None:
    """Neither claims the disk, no process has it open, and the path may lie anywhere."""
    small.file("/proc/vfiotool/block-targets", f"{base}\tfile\t/srv/disk\t259:0\n.")
    small.file(f"{base}/{evidence}", "File: /srv/disk Size: 9")
    small.folders |= {"/sys/kernel/config/target/core/fileio_0", base}
    small.folders.add("/sys/kernel/config/target/core")
    (entry,) = blockers(small.host(), DISK)
    assert (entry.kind, entry.evidence) == ("storage-member", f"{base}/{evidence}")
    assert entry.remedy == (None if remedy is None else remedy.format(base))


def test_a_mount_of_another_namespace_is_named_once_with_its_process(small: SmallHost) -> None:
    small.mounts(
        mount("259:0", "/data", "/dev/nvme0n1", pid="77"),
        mount("259:0", "/data", "/dev/nvme0n1", pid="78"),
    )
    (entry,) = blockers(small.host(), DISK)
    assert entry.detail.endswith("in the mount namespace of pid 77")
    assert entry.remedy == "nsenter --target 77 --mount umount /data"


def test_holders_are_followed_through_every_layer(small: SmallHost) -> None:
    base = f"/sys/devices/pci0000:00/{DISK}/nvme/nvme0/nvme0n1"
    small.block("nvme0n1p2", f"{base}/nvme0n1p2", "259:2", holders=["md0"])
    small.block("md0", "/sys/devices/virtual/block/md0", "9:0", holders=["dm-0"])
    small.file("/sys/devices/virtual/block/md0/md/level", "raid1")
    small.block("dm-0", "/sys/devices/virtual/block/dm-0", "253:0", holders=["dm-1"])
    small.file("/sys/devices/virtual/block/dm-0/dm/uuid", "CRYPT-LUKS2-aa-secret")
    small.file("/sys/devices/virtual/block/dm-0/dm/name", "secret")
    small.block("dm-1", "/sys/devices/virtual/block/dm-1", "253:1")
    small.file("/sys/devices/virtual/block/dm-1/dm/uuid", "LVM-abc")
    small.file("/sys/devices/virtual/block/dm-1/dm/name", "vg--a-root")
    small.mounts(mount("253:1", "/srv", "/dev/mapper/vg--a-root"))
    entries = {entry.subject: entry for entry in blockers(small.host(), DISK)}
    assert entries["/srv"].detail.startswith("nvme0n1p2 > md0 > dm-0 > dm-1 is mounted on /srv")
    assert entries["md0"].remedy == "mdadm --stop /dev/md0"
    assert entries["dm-0"].remedy == "cryptsetup close secret"
    assert entries["dm-1"].remedy == "lvchange --activate n vg-a/root"
    assert entries["dm-0"].evidence == "/sys/class/block/md0/holders/dm-0"


def test_a_multipath_map_over_two_controllers_blocks_both(small: SmallHost) -> None:
    """As multipath-tools maps them, where native NVMe multipath is off."""
    second = "0000:02:00.0"
    small.nvme(second, "nvme1n1", "259:1")
    for address, name in ((DISK, "nvme0n1"), (second, "nvme1n1")):
        base = f"/sys/devices/pci0000:00/{address}/nvme/{name[:-2]}/{name}"
        small.block(name, base, f"259:{name[4]}", holders=["dm-0"])
    small.block("dm-0", "/sys/devices/virtual/block/dm-0", "253:0", holders=["dm-1"])
    small.file("/sys/devices/virtual/block/dm-0/dm/uuid", "mpath-eui.0123")
    small.file("/sys/devices/virtual/block/dm-0/dm/name", "mpatha")
    small.block("dm-1", "/sys/devices/virtual/block/dm-1", "253:1")
    small.file("/sys/devices/virtual/block/dm-1/dm/uuid", "part1-mpath-eui.0123")
    small.file("/sys/devices/virtual/block/dm-1/dm/name", "mpatha-part1")
    small.mounts(mount("253:1", "/srv", "/dev/mapper/mpatha-part1"))
    for address, name in ((DISK, "nvme0n1"), (second, "nvme1n1")):
        entries = {entry.subject: entry for entry in blockers(small.host(), address)}
        assert set(entries) == {"dm-0", "dm-1", "/srv"}
        assert entries["dm-0"].detail == f"{name} is part of dm-0 (multipath map mpatha)"
        assert entries["dm-0"].evidence == f"/sys/class/block/{name}/holders/dm-0"
        assert entries["dm-0"].remedy == "multipath -f mpatha"
        assert entries["dm-1"].detail.endswith("dm-1 (device-mapper device mpatha-part1)")
        assert entries["dm-1"].remedy == "dmsetup remove mpatha-part1"
        assert entries["/srv"].detail.startswith(f"{name} > dm-0 > dm-1 is mounted on /srv")


def test_a_bcache_set_blocks_the_disk_and_its_cache(small: SmallHost) -> None:
    cache = "0000:02:00.0"
    small.nvme(cache, "nvme1n1", "259:1")
    for address, name in ((DISK, "nvme0n1"), (cache, "nvme1n1")):
        base = f"/sys/devices/pci0000:00/{address}/nvme/{name[:-2]}/{name}"
        small.block(name, base, f"259:{name[4]}", holders=["bcache0"])
    small.block("bcache0", "/sys/devices/virtual/block/bcache0", "252:0")
    # A link to the backing disk's own folder (drivers/md/bcache/super.c, bch_cached_dev_run).
    small.folders.add("/sys/devices/virtual/block/bcache0/bcache")
    small.mounts(mount("252:0", "/srv", "/dev/bcache0"))
    for address, name in ((DISK, "nvme0n1"), (cache, "nvme1n1")):
        entries = {entry.subject: entry for entry in blockers(small.host(), address)}
        assert entries["bcache0"].detail == f"{name} is part of bcache0 (bcache)"
        assert entries["bcache0"].remedy == "echo 1 > /sys/class/block/bcache0/bcache/stop"
        assert entries["/srv"].detail.startswith(f"{name} > bcache0 is mounted on /srv")


def test_a_partition_of_a_stacked_device_belongs_to_it(small: SmallHost) -> None:
    base = f"/sys/devices/pci0000:00/{DISK}/nvme/nvme0/nvme0n1"
    small.block("nvme0n1", base, "259:0", holders=["md0"])
    small.block("md0", "/sys/devices/virtual/block/md0", "9:0")
    small.block("md0p1", "/sys/devices/virtual/block/md0/md0p1", "259:9")
    small.mounts(mount("259:9", "/srv", "/dev/md0p1"))
    assert ("mounted", "/srv") in found(small)


def test_holders_that_form_a_loop_end(small: SmallHost) -> None:
    base = f"/sys/devices/pci0000:00/{DISK}/nvme/nvme0/nvme0n1"
    small.block("nvme0n1", base, "259:0", holders=["dm-0"])
    small.block("dm-0", "/sys/devices/virtual/block/dm-0", "253:0", holders=["dm-1"])
    small.block("dm-1", "/sys/devices/virtual/block/dm-1", "253:1", holders=["dm-0"])
    assert found(small) == [("storage-member", "dm-0"), ("storage-member", "dm-1")]


def test_a_multipath_namespace_is_found_through_its_hidden_path() -> None:
    small = SmallHost()
    path = small.function(DISK, class_code="010802", driver="nvme")
    small.block("nvme2c0n1", f"{path}/nvme/nvme0/nvme2c0n1", "259:5")
    head = "/sys/devices/virtual/nvme-subsystem/nvme-subsys2/nvme2n1"
    small.block("nvme2n1", head, "259:0")
    small.block("nvme2n1p1", f"{head}/nvme2n1p1", "259:1")
    small.mounts(mount("259:1", "/srv", "/dev/nvme2n1p1"))
    assert found(small) == [("mounted", "/srv")]


def test_swap_partitions_and_swap_files_are_found(small: SmallHost) -> None:
    small.mounts(mount("259:0", "/data", "/dev/nvme0n1"), mount("8:1", "/", "/dev/sda1"))
    small.file(
        "/proc/swaps",
        "Filename Type Size Used Priority\n"
        "/dev/nvme0n1 partition 1000 0 -2\n"
        "/data/swap\\040file file 1000 0 -3\n"
        "/swap file 1000 0 -4\n"
        "/dev/zram0 partition 1000 0 100",
    )
    swaps = [subject for kind, subject in found(small) if kind == "swap"]
    assert swaps == ["/dev/nvme0n1", "/data/swap file"]


def test_btrfs_and_bcachefs_members_are_found_though_the_mount_names_another_disk(
    small: SmallHost,
) -> None:
    small.nvme("0000:02:00.0", "nvme1n1", "259:1")
    for name in ("nvme0n1", "nvme1n1"):
        small.link(f"/sys/fs/btrfs/uuid-a/devices/{name}", f"/sys/class/block/{name}")
    small.mounts(mount("0:44", "/pool", "/dev/nvme0n1", "btrfs"))
    assert found(small, DISK) == [("mounted", "/pool")]
    assert found(small, "0000:02:00.0") == [("mounted", "/pool")]


def test_of_two_disks_of_one_function_each_that_a_file_system_is_on_is_named(
    small: SmallHost,
) -> None:
    small.block("nvme0n2", f"/sys/devices/pci0000:00/{DISK}/nvme/nvme0/nvme0n2", "259:1")
    for name in ("nvme0n1", "nvme0n2"):
        small.link(f"/sys/fs/btrfs/uuid-a/devices/{name}", f"/sys/class/block/{name}")
    small.mounts(mount("0:44", "/pool", "/dev/nvme0n2", "btrfs"))
    said = {entry.detail.partition(" (")[0] for entry in blockers(small.host(), DISK)}
    whole = "nvme0n1 is part of a mounted file system of several devices"
    assert said == {whole, "nvme0n2 is mounted on /pool"}


def test_a_btrfs_member_counts_even_if_no_mount_is_visible(small: SmallHost) -> None:
    small.link("/sys/fs/btrfs/uuid-a/devices/nvme0n1", "/sys/class/block/nvme0n1")
    assert found(small) == [("mounted", "nvme0n1")]


def test_an_imported_zfs_pool_is_named(small: SmallHost) -> None:
    small.folders.add("/proc/spl/kstat/zfs/tank")
    small.file("/run/udev/data/b259:0", "E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL=tank")
    (entry,) = blockers(small.host(), DISK)
    assert (entry.kind, entry.subject, entry.remedy) == (
        "storage-member",
        "tank",
        "zpool export tank",
    )


def test_an_unimported_zfs_pool_is_no_user(small: SmallHost) -> None:
    small.folders.add("/proc/spl/kstat/zfs/other")
    small.file("/run/udev/data/b259:0", "E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL=tank")
    assert found(small) == []


def test_a_claim_that_no_table_explains_blocks(small: SmallHost) -> None:
    small.file("/proc/vfiotool/block-claim/nvme0n1", "claimed")
    assert found(small) == [("storage-member", "nvme0n1")]


def test_each_disk_whose_use_is_not_explained_is_asked_for_claims(small: SmallHost) -> None:
    base = f"/sys/devices/pci0000:00/{DISK}/nvme/nvme0"
    for name, number in (("nvme0n2", "259:5"), ("nvme0n3", "259:9")):
        small.block(name, f"{base}/{name}", number)
        for part in (1, 2):
            path = f"{base}/{name}/{name}p{part}"
            small.block(f"{name}p{part}", path, f"{number}{part}")
    small.mounts(mount("259:51", "/data", "/dev/nvme0n2p1"))
    for name in ("nvme0n2", "nvme0n2p2", "nvme0n3"):
        small.file(f"/proc/vfiotool/block-claim/{name}", "claimed")
    # The second partition is held beside the mounted first; the third disk is held as a whole.
    assert sorted(found(small)) == [
        ("mounted", "/data"),
        ("storage-member", "nvme0n2p2"),
        ("storage-member", "nvme0n3"),
    ]


@pytest.mark.parametrize("errno", ["EACCES", "EPERM", "ETIMEDOUT", "ENOENT", "EMFILE"])
def test_a_claim_that_cannot_be_probed_is_reported_as_unseen(small: SmallHost, errno: str) -> None:
    small.file("/proc/vfiotool/block-claim/nvme0n1", f"unknown {errno}")
    usage = survey(small.host(), DISK)
    (entry,) = usage.blockers
    assert (entry.kind, entry.subject) == ("unseen", "block-claim/nvme0n1")
    assert errno in entry.detail


def test_tables_of_other_users_are_reported_as_unseen(small: SmallHost) -> None:
    small.mounts("!\tmount tables of 3 processes of other users")
    (entry,) = blockers(small.host(), DISK)
    assert (entry.kind, entry.subject) == ("unseen", "mounts")
    assert "mount tables of 3 processes of other users" in entry.detail


def test_a_loop_device_over_a_disk_is_a_member_though_no_holder(small: SmallHost) -> None:
    small.block("loop3", "/sys/devices/virtual/block/loop3", "7:3")
    small.file("/sys/devices/virtual/block/loop3/loop/backing_file", "/dev/nvme0n1")
    small.block("loop4", "/sys/devices/virtual/block/loop4", "7:4")
    small.file("/sys/devices/virtual/block/loop4/loop/backing_file", "/var/nvme0n1")
    small.mounts(mount("7:3", "/srv", "/dev/loop3"), mount("7:4", "/other", "/dev/loop4"))
    mounted, member = blockers(small.host(), DISK)
    assert mounted.detail.startswith("nvme0n1 > loop3 is mounted on /srv")
    assert member.evidence == "/sys/class/block/loop3/loop/backing_file"
    assert member.remedy == "losetup --detach /dev/loop3"


def test_a_disk_exported_by_the_kernels_nvme_target_is_in_use(small: SmallHost) -> None:
    base = "/sys/kernel/config/nvmet/subsystems/nqn.x/namespaces/1"
    small.file(f"{base}/device_path", "/dev/nvme0n1")
    small.file(f"{base}/enable", "0")
    assert found(small) == []
    small.file(f"{base}/enable", "1")
    (entry,) = blockers(small.host(), DISK)
    assert (entry.kind, entry.subject) == ("storage-member", "nqn.x")
    assert entry.remedy == f"echo 0 > {base}/enable"


def test_shared_folders_over_virtio_are_mounts_of_their_device() -> None:
    small = SmallHost()
    path = small.function(DISK, identity="1af4:1049", driver="virtio-pci")
    small.file(f"{path}/virtio0/mount_tag", "share\0")
    small.mounts(mount("0:20", "/host", "share", "9p"), mount("0:21", "/x", "other", "9p"))
    assert found(small) == [("mounted", "/host")]


def test_a_scsi_disk_below_a_controller_belongs_to_it() -> None:
    small = SmallHost()
    path = small.function(DISK, class_code="010601", driver="ahci")
    disk = f"{path}/ata1/host0/target0:0:0/0:0:0:0/block/sda"
    small.block("sda", disk, "8:0")
    small.block("sda1", f"{disk}/sda1", "8:1")
    small.mounts(mount("8:1", "/", "/dev/sda1"))
    assert found(small) == [("mounted", "/")]


def test_a_bridge_is_not_blamed_for_the_functions_below_it() -> None:
    small = SmallHost()
    small.function("0000:00:1c.0", class_code="060400", driver="pcieport")
    path = small.function(DISK, under=["0000:00:1c.0"], driver="nvme", class_code="010802")
    small.block("nvme0n1", f"{path}/nvme/nvme0/nvme0n1", "259:0")
    small.mounts(mount("259:0", "/", "/dev/nvme0n1"))
    assert found(small, "0000:00:1c.0") == []
    assert found(small) == [("mounted", "/")]


@pytest.mark.parametrize("line", ["", "1 2 3", "1 2 8:1 / /x rw", "1 2 8:1 / /x rw - ext4"])
def test_malformed_mount_lines_are_passed_over(line: str) -> None:
    assert parse_mount("self", line) is None


@pytest.mark.parametrize(
    ("options", "lower"),
    [("", ""), (" rw", ""), (" rw,lowerdir=/a\\040b:/c,upperdir=/d", "/a b")],
)
def test_the_lower_folder_of_an_overlay_is_read_where_it_is_told(options: str, lower: str) -> None:
    parsed = parse_mount("self", f"40 1 0:30 / / rw - overlay overlay{options}")
    assert parsed is not None and parsed.lower == lower


def test_octal_escapes_are_undone() -> None:
    assert unescape("/a\\040b\\134c\\011") == "/a b\\c\t"


def test_a_clusters_heartbeat_is_a_use_that_claims_nothing(small: SmallHost) -> None:
    """OCFS2's: the kernel has the disk open by itself, and shares it with other hosts."""
    base = "/sys/kernel/config/cluster"
    small.file("/sys/module/ocfs2_nodemanager/initstate", "live")
    assert found(small) == [("unseen", base)]
    small.folders |= {base, f"{base}/ours", f"{base}/ours/heartbeat"}
    small.file(f"{base}/ours/heartbeat/threshold", "31")
    small.file(f"{base}/ours/heartbeat/AB12/dev", "")
    small.folders.add(f"{base}/ours/heartbeat/AB12")
    assert found(small) == []
    small.file(f"{base}/ours/heartbeat/AB12/dev", "sdb1")
    assert found(small) == []
    small.file(f"{base}/ours/heartbeat/AB12/dev", "nvme0n1")
    assert found(small) == [("storage-member", "ours")]


TAPE = "/sys/devices/pci0000:00/0000:05:00.0/host3/target3:0:1/3:0:1:0"
LIO = "/sys/kernel/config/target/core"


def library(host: str) -> SmallHost:
    """An adapter with a tape drive that the SCSI target hands on, and another one beside it."""
    small = SmallHost()
    small.function("0000:05:00.0", class_code="010700", driver="mpt3sas")
    small.function("0000:06:00.0", class_code="010700", driver="mpt3sas")
    small.link("/sys/bus/scsi/devices/3:0:1:0", TAPE)
    small.link(
        "/sys/bus/scsi/devices/4:0:2:0",
        "/sys/devices/pci0000:00/0000:06:00.0/host4/target4:0:2/4:0:2:0",
    )
    for path in ("0000:05:00.0/host3", "0000:06:00.0/host4"):
        small.folders.add(f"/sys/devices/pci0000:00/{path}")
    where = f"Channel ID: 0 Target ID: 1 LUN: 0 Host ID: {host}"
    small.file(
        f"{LIO}/pscsi_2/drive/info", f"Status: ACTIVATED\n SCSI Device Bus Location: {where}"
    )
    small.folders |= {LIO, f"{LIO}/pscsi_2", f"{LIO}/pscsi_2/drive"}
    return small


@pytest.mark.parametrize("host", ["3", "PHBA Mode"])
def test_a_tape_drive_that_the_scsi_target_hands_on_is_a_use_of_its_adapter(host: str) -> None:
    """It has no block device, so nothing claims it."""
    small = library(host)
    assert found(small, "0000:05:00.0") == [("storage-member", "pscsi_2/drive")]
    assert found(small, "0000:06:00.0") == []


def test_a_tape_drive_of_another_adapter_is_none_of_this_ones() -> None:
    assert found(library("9"), "0000:05:00.0") == []


def test_a_disk_that_the_scsi_target_hands_on_is_named_once() -> None:
    """Of those it claims the block device."""
    small = library("3")
    small.block("sdb", f"{TAPE}/block/sdb", "8:16")
    small.file(f"{BLOCK_CLAIM}/sdb", "claimed")
    assert found(small, "0000:05:00.0") == [("storage-member", "pscsi_2/drive")]
    small.folders.discard(f"{LIO}/pscsi_2/drive")
    del small.files[f"{LIO}/pscsi_2/drive/info"]
    assert found(small, "0000:05:00.0") == [("storage-member", "sdb")]
