"""Every way in which a disk can be in use, produced for real; `why` names it and lets go again."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.blockers_guest import assert_passable, blockers, disk_of, need, run, wait_for, why

MACHINE = "storage"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

FIRST = "0000:01:00.0"
SECOND = "0000:02:00.0"
NO_UDEV = (
    "activation{udev_sync=0 udev_rules=0} devices{use_devicesfile=0 obtain_device_list_from_udev=0}"
)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path) -> Iterator[ExitStack]:
    """Undoes what a test did, last first, and holds that both disks are free again."""
    need("vfio-pci", "nvme")
    with ExitStack() as stack:
        yield stack
    assert_passable(FIRST)


@pytest.fixture
def mount_point(tmp_path: Path) -> Path:
    point = tmp_path / "mnt with space"
    point.mkdir()
    return point


def make_ext4(node: str) -> None:
    need("ext4", tools=("mkfs.ext4",))
    run("mkfs.ext4", "-q", "-F", node)


def write_partitions(node: str, *spans: tuple[int, int]) -> None:
    """A DOS partition table of (first sector, sectors), and the kernel told of it."""
    entries = b"".join(struct.pack("<8B2I", 0, 0, 0, 0, 0x83, 0, 0, 0, *span) for span in spans)
    table = bytes(446) + entries.ljust(64, b"\0") + (b"\x55\xaa" if spans else bytes(2))
    with open(node, "r+b", buffering=0) as disk:
        disk.write(table)
    run("blockdev", "--rereadpt", node)


def mount(stack: ExitStack, node: str, point: Path) -> None:
    run("mount", node, str(point))
    stack.callback(run, "umount", str(point))


def hold(stack: ExitStack, node: str, mode: int) -> subprocess.Popen[bytes]:
    """A process that has the node open."""
    descriptor = os.open(node, mode | os.O_CLOEXEC)
    child = subprocess.Popen(["sleep", "1000"], stdin=descriptor)
    os.close(descriptor)
    stack.callback(child.wait)
    stack.callback(child.kill)
    return child


def subjects(device: str, kind: str) -> list[str]:
    return [entry["subject"] for entry in blockers(device, kind)]


def test_a_mounted_disk_is_named_with_its_mount_point_and_freed_by_umount(
    clean: ExitStack, mount_point: Path
) -> None:
    disk = disk_of(FIRST)
    make_ext4(f"/dev/{disk}")
    assert_passable(FIRST)
    mount(clean, f"/dev/{disk}", mount_point)
    code, answer = why(FIRST)
    (entry,) = answer["blockers"]
    assert code == 1
    assert (entry["kind"], entry["device"]) == ("mounted", FIRST)
    assert entry["subject"] == str(mount_point)
    assert f"{disk} is mounted on {mount_point} (ext4)" in entry["detail"]
    number = Path(f"/sys/class/block/{disk}/dev").read_text().strip()
    assert entry["evidence"].startswith(f"/proc/self/mountinfo: {number} ")
    assert answer["next"][0] == f"umount '{mount_point}'"


def test_a_mounted_partition_counts(clean: ExitStack, mount_point: Path) -> None:
    disk = disk_of(FIRST)
    write_partitions(f"/dev/{disk}", (2048, 65536), (67584, 131072))
    clean.callback(write_partitions, f"/dev/{disk}")
    part = f"/dev/{disk}p2"
    wait_for(lambda: Path(part).exists(), part)
    make_ext4(part)
    mount(clean, part, mount_point)
    (entry,) = blockers(FIRST, "mounted")
    assert f"{disk}p2 is mounted" in entry["detail"]


def test_the_other_disk_is_not_blamed(clean: ExitStack, mount_point: Path) -> None:
    disk = disk_of(FIRST)
    make_ext4(f"/dev/{disk}")
    mount(clean, f"/dev/{disk}", mount_point)
    assert_passable(SECOND)


def test_a_bind_mount_keeps_a_disk_in_use_after_the_first_mount_is_gone(
    clean: ExitStack, mount_point: Path, tmp_path: Path
) -> None:
    disk = disk_of(FIRST)
    make_ext4(f"/dev/{disk}")
    run("mount", f"/dev/{disk}", str(mount_point))
    second = tmp_path / "bind"
    second.mkdir()
    run("mount", "--bind", str(mount_point), str(second))
    clean.callback(run, "umount", str(second))
    run("umount", str(mount_point))
    assert subjects(FIRST, "mounted") == [str(second)]


def test_a_mount_in_another_namespace_is_found(clean: ExitStack, mount_point: Path) -> None:
    disk = disk_of(FIRST)
    make_ext4(f"/dev/{disk}")
    script = f"mount /dev/{disk} '{mount_point}' && echo mounted && exec cat"
    child = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    clean.callback(child.wait, 30)
    clean.callback(child.stdin.close)
    assert child.stdout.readline() == "mounted\n"
    (entry,) = blockers(FIRST, "mounted")
    assert entry["detail"].endswith(f"in the mount namespace of pid {child.pid}")
    assert entry["evidence"].startswith(f"/proc/{child.pid}/mountinfo: ")


def test_a_lazily_unmounted_disk_is_still_claimed(clean: ExitStack, mount_point: Path) -> None:
    disk = disk_of(FIRST)
    make_ext4(f"/dev/{disk}")
    run("mount", f"/dev/{disk}", str(mount_point))
    with (mount_point / "held").open("w") as held:
        run("umount", "--lazy", str(mount_point))
        (entry,) = why(FIRST)[1]["blockers"]
        assert (entry["kind"], entry["subject"]) == ("storage-member", disk)
        assert "O_EXCL" in entry["evidence"]
        held.write("x")
    wait_for(lambda: why(FIRST)[0] == 0, "the file system to go")


def test_swap_on_a_disk(clean: ExitStack) -> None:
    disk = disk_of(FIRST)
    node = f"/dev/{disk}"
    run("mkswap", node)
    if "swap" not in Path("/proc/filesystems").read_text() and not Path("/proc/swaps").exists():
        pytest.skip("this kernel has no swap")
    run("swapon", node)
    clean.callback(run, "swapoff", node)
    (entry,) = blockers(FIRST, "swap")
    assert entry["subject"] == node
    assert entry["evidence"] == f"/proc/swaps: {node}"
    assert why(FIRST)[1]["next"][0] == f"swapoff {node}"


def test_a_swap_file_on_a_disk(clean: ExitStack, mount_point: Path) -> None:
    if not Path("/proc/swaps").exists():
        pytest.skip("this kernel has no swap")
    disk = disk_of(FIRST)
    make_ext4(f"/dev/{disk}")
    mount(clean, f"/dev/{disk}", mount_point)
    area = mount_point / "swap"
    area.write_bytes(bytes(16 << 20))
    area.chmod(0o600)
    run("mkswap", str(area))
    run("swapon", str(area))
    clean.callback(run, "swapoff", str(area))
    assert subjects(FIRST, "swap") == [str(area)]
    assert why(FIRST)[1]["next"][:2] == [f"swapoff '{area}'", f"umount '{mount_point}'"]


def test_a_logical_volume_over_two_disks_blocks_both(clean: ExitStack, mount_point: Path) -> None:
    need("dm-mod", "ext4", tools=("pvcreate", "vgcreate", "lvcreate", "mkfs.ext4"))
    disks = [disk_of(FIRST), disk_of(SECOND)]
    nodes = [f"/dev/{disk}" for disk in disks]
    lvm = ("--config", NO_UDEV)
    run("pvcreate", *lvm, "-ff", "-y", *nodes)
    run("vgcreate", *lvm, "vg-lab", *nodes)
    clean.callback(run, "wipefs", "-q", "-a", *nodes)
    assert_passable(FIRST)
    run("lvcreate", *lvm, "-y", "-Wn", "-Zn", "-i", "2", "-L", "64M", "-n", "data", "vg-lab")
    clean.callback(run, "lvchange", *lvm, "-an", "vg-lab/data")
    node = "/dev/mapper/vg--lab-data"
    make_ext4(node)
    mount(clean, node, mount_point)
    for address, disk in zip((FIRST, SECOND), disks, strict=True):
        code, answer = why(address)
        assert code == 1
        found = {entry["kind"]: entry for entry in answer["blockers"]}
        assert set(found) == {"mounted", "storage-member"}
        upper = found["storage-member"]["subject"]
        assert found["mounted"]["detail"].startswith(f"{disk} > {upper} is mounted on")
        assert "LVM logical volume vg--lab-data" in found["storage-member"]["detail"]
        assert Path(found["storage-member"]["evidence"]).is_symlink()
        assert answer["next"][:2] == [
            f"umount '{mount_point}'",
            "lvchange --activate n vg-lab/data",
        ]
    run("umount", str(mount_point))
    assert subjects(FIRST, "mounted") == []
    assert len(subjects(FIRST, "storage-member")) == 1
    run("mount", node, str(mount_point))


def test_an_encrypted_disk(clean: ExitStack, mount_point: Path) -> None:
    need("dm-crypt", "ext4", tools=("cryptsetup", "mkfs.ext4"))
    disk = disk_of(FIRST)
    options = ("--type", "plain", "--cipher", "aes-xts-plain64", "--key-size", "256")
    key = Path("/tmp/blockers.key")
    key.write_bytes(bytes(range(32)))
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}
    opened = subprocess.run(
        ["cryptsetup", "open", *options, "--key-file", str(key), f"/dev/{disk}", "secret"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert opened.returncode == 0, opened.stderr
    clean.callback(subprocess.run, ["cryptsetup", "close", "secret"], check=True, env=environment)
    make_ext4("/dev/mapper/secret")
    mount(clean, "/dev/mapper/secret", mount_point)
    _, answer = why(FIRST)
    found = {entry["kind"]: entry for entry in answer["blockers"]}
    assert set(found) == {"mounted", "storage-member"}
    assert "dm-crypt volume secret" in found["storage-member"]["detail"]
    assert answer["next"][:2] == [f"umount '{mount_point}'", "cryptsetup close secret"]


def test_a_raid_of_two_disks_blocks_both(clean: ExitStack, mount_point: Path) -> None:
    need("md-mod", "raid1", "ext4", tools=("mdadm", "mkfs.ext4"))
    nodes = [f"/dev/{disk_of(address)}" for address in (FIRST, SECOND)]
    run(
        *("mdadm", "--create", "/dev/md7", "--run", "--level=1", "--raid-devices=2"),
        *("--metadata=1.2", "--assume-clean", *nodes),
    )
    clean.callback(run, "mdadm", "--zero-superblock", *nodes)
    clean.callback(run, "mdadm", "--stop", "/dev/md7")
    make_ext4("/dev/md7")
    mount(clean, "/dev/md7", mount_point)
    for address in (FIRST, SECOND):
        _, answer = why(address)
        found = {entry["kind"]: entry for entry in answer["blockers"]}
        assert set(found) == {"mounted", "storage-member"}
        assert "md7 (MD raid1)" in found["storage-member"]["detail"]
        assert answer["next"][:2] == [f"umount '{mount_point}'", "mdadm --stop /dev/md7"]


def test_a_loop_device_over_a_disk(clean: ExitStack, mount_point: Path) -> None:
    need("loop", tools=("losetup",))
    disk = disk_of(FIRST)
    make_ext4(f"/dev/{disk}")
    node = run("losetup", "--find", "--show", f"/dev/{disk}").strip()
    clean.callback(run, "losetup", "--detach", node)
    mount(clean, node, mount_point)
    found = {entry["kind"]: entry for entry in why(FIRST)[1]["blockers"]}
    assert set(found) == {"mounted", "storage-member"}
    loop = Path(found["storage-member"]["evidence"])
    assert loop.read_text().strip() == f"/dev/{disk}"


def test_a_disk_exported_over_the_network(clean: ExitStack) -> None:
    need("nvmet")
    config = Path("/sys/kernel/config")
    if not (config / "nvmet").is_dir():
        run("mount", "-t", "configfs", "none", str(config))
    system = config / "nvmet" / "subsystems" / "nqn.lab"
    space = system / "namespaces" / "1"
    system.mkdir()
    clean.callback(system.rmdir)
    space.mkdir()
    clean.callback(space.rmdir)
    (space / "device_path").write_text(f"/dev/{disk_of(FIRST)}")
    assert_passable(FIRST)
    (space / "enable").write_text("1")
    clean.callback((space / "enable").write_text, "0")
    (entry,) = blockers(FIRST, "storage-member")
    assert (entry["subject"], entry["evidence"]) == ("nqn.lab", f"{space}/device_path")


def test_btrfs_blocks_the_member_that_no_mount_table_names(
    clean: ExitStack, mount_point: Path
) -> None:
    need("btrfs", tools=("mkfs.btrfs",))
    nodes = [f"/dev/{disk_of(address)}" for address in (FIRST, SECOND)]
    run("mkfs.btrfs", "-q", "-f", "-d", "single", "-m", "raid1", *nodes)
    run("btrfs", "device", "scan", *nodes)
    mount(clean, nodes[0], mount_point)
    for address in (FIRST, SECOND):
        assert subjects(address, "mounted") == [str(mount_point)]


def test_an_open_controller_node_is_named_with_the_process(clean: ExitStack) -> None:
    disk = disk_of(FIRST)
    node = f"/dev/{disk.removesuffix('n1')}"
    child = hold(clean, node, os.O_RDONLY)
    (entry,) = blockers(FIRST, "open-file")
    assert entry["subject"] == node
    assert entry["evidence"] == f"pid {child.pid} (sleep) has {node} open"


def test_an_open_namespace_node_is_named(clean: ExitStack) -> None:
    node = f"/dev/{disk_of(FIRST)}"
    child = hold(clean, node, os.O_RDONLY)
    (entry,) = blockers(FIRST, "open-file")
    assert entry["detail"] == f"{node} is open in pid {child.pid} (sleep)"


def test_an_open_generic_node_is_named(clean: ExitStack) -> None:
    node = f"/dev/{disk_of(FIRST).replace('nvme', 'ng')}"
    if not Path(node).exists():
        pytest.skip("this kernel makes no generic NVMe node")
    hold(clean, node, os.O_RDONLY)
    assert subjects(FIRST, "open-file") == [node]


def test_a_held_vfio_group_is_in_use(clean: ExitStack) -> None:
    address = "0000:00:01.0"
    assert_passable(address)
    group = Path(f"/sys/bus/pci/devices/{address}/iommu_group").resolve().name
    Path(f"/sys/bus/pci/devices/{address}/driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(address)
    clean.callback(Path("/sys/bus/pci/drivers/vfio-pci/unbind").write_text, address)
    node = f"/dev/vfio/{group}"
    child = hold(clean, node, os.O_RDWR)
    (entry,) = blockers(address, "open-file")
    assert entry["evidence"] == f"pid {child.pid} (sleep) has {node} open"
    child.kill()
    child.wait()
    assert_passable(address)
