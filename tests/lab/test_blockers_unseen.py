"""Uses that no path and no table of this namespace shows, produced for real; `why` names them."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.blockers_guest import (
    PCI,
    assert_passable,
    blockers,
    disk_of,
    need,
    run,
    wait_for,
    why,
)
from tests.lab.commands import vfiotool

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
ALWAYS_ON = ("6.12", "iommufd")

# What `full` has: the NVMe disk with VFs, and edu, which has a memory BAR and no driver.
DISK = "0000:03:00.0"
EDU = "0000:00:01.0"
CLONE_FILES = 0x400
# io_uring_setup(2), io_uring_register(2): the same number on every architecture.
IO_URING_SETUP, IO_URING_REGISTER, REGISTER_FILES = 425, 427, 2


@pytest.fixture(autouse=True)
def clean() -> Iterator[ExitStack]:
    """Undoes what a test did, last first, and holds that the disk is free again."""
    need("vfio-pci", "nvme")
    disk_of(DISK)
    with ExitStack() as stack:
        yield stack
    wait_for(lambda: not blockers(DISK, "open-file"), "the disk to be closed")
    assert_passable(DISK)


def number_of(disk: str) -> tuple[int, int]:
    major, _, minor = Path(f"/sys/class/block/{disk}/dev").read_text().strip().partition(":")
    return int(major), int(minor)


def node_elsewhere(stack: ExitStack, tmp_path: Path, name: str) -> Path:
    """A node of the disk below a folder of a file system of its own, far from /dev."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "dev", "none", str(folder))
    stack.callback(run, "umount", "-l", str(folder))
    node = folder / name
    os.mknod(node, 0o600 | 0o060000, os.makedev(*number_of(disk_of(DISK))))
    return node


def hold(stack: ExitStack, program: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that does `program` and says so, until the test is over."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}\nprint('ready', flush=True)\ninput()", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    said = process.stdout.readline()
    if said.startswith("skip"):
        pytest.skip(said)
    assert said == "ready\n"
    return process


def test_a_node_outside_dev_is_known_by_its_number(clean: ExitStack, tmp_path: Path) -> None:
    node = node_elsewhere(clean, tmp_path, "vol-7")
    hold(clean, "import sys; f = open(sys.argv[1], 'rb', 0)", str(node))
    (entry,) = blockers(DISK, "open-file")
    assert entry["subject"] == str(node)
    assert vfiotool("bind", DISK, "--dry-run").code == 4


def test_a_node_bound_onto_a_plain_file_is_known_by_its_number(
    clean: ExitStack, tmp_path: Path
) -> None:
    """As Kubernetes hands raw volumes to a container."""
    target = tmp_path / "volume"
    target.touch()
    run("mount", "--bind", f"/dev/{disk_of(DISK)}", str(target))
    clean.callback(run, "umount", "-l", str(target))
    hold(clean, "import sys; f = open(sys.argv[1], 'rb', 0)", str(target))
    assert blockers(DISK, "open-file")


def test_a_lazily_unmounted_disk_without_a_node_is_unseen(clean: ExitStack, tmp_path: Path) -> None:
    disk = disk_of(DISK)
    run("mkfs.ext4", "-qF", f"/dev/{disk}")
    point = tmp_path / "point"
    point.mkdir()
    run("mount", f"/dev/{disk}", str(point))
    process = hold(clean, "import os, sys; os.chdir(sys.argv[1])", str(point))
    run("umount", "-l", str(point))
    os.rename(f"/dev/{disk}", "/dev/moved-away")
    try:
        (entry,) = blockers(DISK, "unseen")
        assert entry["subject"] == f"block-claim/{disk}"
        assert vfiotool("bind", DISK, "--dry-run").code == 4
    finally:
        os.rename("/dev/moved-away", f"/dev/{disk}")
    assert blockers(DISK, "storage-member")
    process.kill()
    process.wait()
    wait_for(lambda: not blockers(DISK, "storage-member"), "the file system to go")


def test_a_loop_device_over_a_node_elsewhere_is_found(clean: ExitStack, tmp_path: Path) -> None:
    need("loop", tools=("losetup",))
    node = node_elsewhere(clean, tmp_path, "under")
    loop = run("losetup", "--find", "--show", str(node)).strip()
    clean.callback(run, "losetup", "--detach", loop)
    entries = blockers(DISK, "storage-member")
    assert [entry["subject"] for entry in entries] == [loop.removeprefix("/dev/")]


def test_a_thread_with_files_of_its_own_is_looked_into(clean: ExitStack) -> None:
    program = (
        "import ctypes, os, sys, threading\n"
        "done = threading.Event()\n"
        "def keep():\n"
        f"    assert ctypes.CDLL(None).unshare({CLONE_FILES}) == 0\n"
        "    os.open(sys.argv[1], os.O_RDONLY); done.set(); threading.Event().wait()\n"
        "threading.Thread(target=keep, daemon=True).start(); done.wait()"
    )
    hold(clean, program, f"/dev/{disk_of(DISK)}")
    assert blockers(DISK, "open-file")


def test_a_file_registered_with_io_uring_is_seen(clean: ExitStack) -> None:
    program = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "params = ctypes.create_string_buffer(120)\n"
        f"ring = libc.syscall({IO_URING_SETUP}, 4, params)\n"
        "if ring < 0: print('skip: no io_uring'); sys.exit()\n"
        "disk = os.open(sys.argv[1], os.O_RDONLY)\n"
        "files = (ctypes.c_int * 1)(disk)\n"
        f"assert libc.syscall({IO_URING_REGISTER}, ring, {REGISTER_FILES}, files, 1) == 0\n"
        "os.close(disk)"
    )
    hold(clean, program, f"/dev/{disk_of(DISK)}")
    assert blockers(DISK, "open-file")


def test_memory_that_is_mapped_keeps_a_device_though_its_file_is_closed(
    clean: ExitStack,
) -> None:
    program = (
        "import mmap, os, sys\n"
        "file = os.open(sys.argv[1], os.O_RDWR); window = mmap.mmap(file, 4096)\n"
        "os.closerange(3, 99)"
    )
    hold(clean, program, str(PCI / EDU / "resource0"))
    (entry,) = blockers(EDU, "open-file")
    assert entry["subject"].endswith("/resource0")


def interface() -> tuple[str, str]:
    """The address of igb and its interface."""
    for folder in sorted(PCI.iterdir()):
        if (folder / "driver").exists() and (folder / "driver").resolve().name == "igb":
            wait_for(lambda folder=folder: list((folder / "net").iterdir()), "its interface")
            return folder.name, next((folder / "net").iterdir()).name
    pytest.skip("this machine has no igb")


def in_namespace(stack: ExitStack) -> str:
    """A process in a network namespace of its own, as a container is; its pid."""
    libc = "import ctypes; assert ctypes.CDLL(None).unshare(0x40000000) == 0"
    return str(hold(stack, libc).pid)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("macvlan", "macvlan mode bridge"),
        ("8021q", "vlan id 7"),
        # There it tells its own index in the place of the card's.
        ("vxlan", "vxlan id 7 dstport 4789 dev {}"),
    ],
)
def test_what_stands_on_a_card_from_a_container_is_named(
    clean: ExitStack, module: str, kind: str
) -> None:
    address, name = interface()
    need(module)
    pid = in_namespace(clean)
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    run("ip", "link", "add", "link", name, "name", "upper0", "type", *kind.format(name).split())
    run("ip", "link", "set", "upper0", "netns", pid)
    run("nsenter", "-t", pid, "-n", "ip", "addr", "add", "192.168.7.2/24", "dev", "upper0")
    (entry,) = blockers(address, "bridge-or-bond")
    assert entry["subject"] == "upper0"
    assert f"of pid {pid} stands on {name}" in entry["detail"]
    assert "192.168.7.2/24" in entry["detail"]
    assert vfiotool("bind", address, "--dry-run").code == 4


def test_a_card_in_a_namespace_without_processes_is_named(clean: ExitStack) -> None:
    address, name = interface()
    run("ip", "netns", "add", "blue")
    clean.callback(run, "ip", "netns", "delete", "blue")
    run("ip", "link", "set", name, "netns", "blue")
    clean.callback(run, "ip", "-n", "blue", "link", "set", name, "netns", "1")
    (entry,) = blockers(address, "route")
    assert "the network namespace /run/netns/blue" in entry["detail"]


def test_a_route_of_another_table_is_a_use(clean: ExitStack) -> None:
    address, name = interface()
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    run("ip", "route", "add", "10.99.0.0/16", "dev", name, "table", "100")
    if "table 100" not in run("ip", "route", "show", "table", "all", "dev", name):
        pytest.skip("this kernel has one routing table (CONFIG_IP_MULTIPLE_TABLES)")
    (entry,) = blockers(address, "route")
    assert "10.99.0.0/16 table 100" in entry["detail"]


def test_a_packet_socket_is_a_use(clean: ExitStack) -> None:
    address, name = interface()
    need("af_packet")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as listener:
        listener.bind((name, 3))
        (entry,) = blockers(address, "packet-socket")
        assert entry["subject"] == name
    assert not blockers(address, "packet-socket")


def join(name: str) -> socket.socket:
    """A program that receives the multicasts of an interface."""
    member = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    where = struct.pack(
        "=4s4si", socket.inet_aton("239.1.2.3"), bytes(4), socket.if_nametoindex(name)
    )
    member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, where)
    return member


def test_a_program_that_receives_multicasts_is_a_use(clean: ExitStack) -> None:
    if not Path("/proc/net/igmp").exists():
        pytest.skip("this kernel does not tell who receives multicasts (CONFIG_IP_MULTICAST)")
    address, name = interface()
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    assert_passable(address)
    with join(name):
        (entry,) = blockers(address, "packet-socket")
        assert (entry["subject"], "multicasts" in entry["detail"]) == (name, True)
        assert vfiotool("bind", address, "--dry-run").code == 4
    assert_passable(address)


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("address add fe80::1/64 dev {}", "address flush dev {}"),
        ("nexthop add id 5 dev {}", "nexthop flush dev {}"),
        ("-family mpls route add 100 via inet6 fe80::99 dev {}", "-family mpls route flush dev {}"),
    ],
)
def test_what_is_routed_without_an_ip_address_is_a_use_that_its_step_ends(
    clean: ExitStack, words: str, end: str
) -> None:
    address, name = interface()
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    if "mpls" in words:
        need("mpls_router")
        Path("/proc/sys/net/mpls/platform_labels").write_text("1000")
    # A next hop is taken of an interface with a link alone.
    carrier = PCI / address / "net" / name / "carrier"
    wait_for(lambda: carrier.read_text() == "1\n", f"a link of {name}")
    run("ip", *words.format(name).split())
    (entry,) = blockers(address, "route")
    assert entry["subject"] == name
    assert vfiotool("bind", address, "--dry-run").code == 4
    step = why(address)[1]["next"][0]
    assert step == f"ip {end.format(name)}"
    run(*step.split())
    assert_passable(address)


def test_an_llc_socket_that_unbinding_would_wait_for_is_a_use(clean: ExitStack) -> None:
    """The interface was gone, its driver's unbinding never came to an end."""
    address, name = interface()
    need("llc2")
    station = bytes.fromhex((PCI / address / "net" / name / "address").read_text().replace(":", ""))
    # include/uapi/linux/llc.h: family, hardware type, test, xid, ua, SAP, address.
    place = struct.pack("=HHBBBB6s2x", socket.AF_LLC, 1, 0, 0, 0, 0x42, station)
    with socket.socket(socket.AF_LLC, socket.SOCK_DGRAM) as listener:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.bind(listener.fileno(), place, len(place)) == 0, ctypes.get_errno()
        (entry,) = blockers(address, "packet-socket")
        assert (entry["subject"], "LLC" in entry["detail"]) == (name, True)
        assert vfiotool("bind", address, "--dry-run").code == 4
    assert_passable(address)


def test_a_mount_namespace_kept_by_a_file_is_looked_into(clean: ExitStack, tmp_path: Path) -> None:
    disk = disk_of(DISK)
    run("mkfs.ext4", "-qF", f"/dev/{disk}")
    folder = tmp_path / "namespaces"
    folder.mkdir()
    run("mount", "--bind", str(folder), str(folder))
    clean.callback(run, "umount", "-l", str(folder))
    run("mount", "--make-private", str(folder))
    kept, point = folder / "kept", tmp_path / "inside"
    kept.touch()
    point.mkdir()
    run("unshare", f"--mount={kept}", "mount", f"/dev/{disk}", str(point))
    clean.callback(run, "umount", str(kept))
    (entry,) = blockers(DISK, "mounted")
    assert f"in the mount namespace {kept}" in entry["detail"]


def configfs() -> Path:
    base = Path("/sys/kernel/config")
    need("configfs")
    if not os.path.ismount(base):
        run("mount", "-t", "configfs", "none", str(base))
    return base


def folder(stack: ExitStack, path: Path) -> Path:
    path.mkdir()
    stack.callback(path.rmdir)
    return path


def test_a_console_that_the_module_was_loaded_with_is_unseen_beside_one_that_shows(
    clean: ExitStack,
) -> None:
    """It has no folder in configfs; another target has."""
    address, name = interface()
    if not Path("/lib/modules", os.uname().release, "kernel/drivers/net/netconsole.ko").exists():
        pytest.skip("this kernel has no module netconsole")
    base = configfs()
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    run("ip", "address", "add", "10.9.9.9/24", "dev", name)
    where = f"netconsole=6665@10.9.9.9/{name},6666@10.9.9.1/52:54:00:00:00:99"
    run("modprobe", "netconsole", where)
    clean.callback(run, "modprobe", "-r", "netconsole")
    run("ip", "address", "flush", "dev", name)
    other = folder(clean, base / "netconsole/other")
    (other / "dev_name").write_text("another0")
    assert [path.name for path in other.parent.iterdir()] == ["other"]
    (entry,) = blockers(address, "unseen")
    assert entry["subject"] == "/sys/kernel/config/netconsole"
    assert vfiotool("bind", address, "--dry-run").code == 4


# include/uapi/linux/bpf.h: commands, BPF_PROG_TYPE_SCHED_CLS, BPF_TCX_EGRESS; `r0 = 0; exit`.
BPF, PROG_LOAD, LINK_CREATE, CLASSIFIER, TCX_EGRESS = 321, 5, 28, 3, 47
PASSES_ALL = bytes.fromhex("b7000000000000009500000000000000")


def bpf(command: int, *words: bytes) -> int:
    attributes = ctypes.create_string_buffer(b"".join(words), 128)
    made: int = ctypes.CDLL(None, use_errno=True).syscall(BPF, command, attributes, 128)
    if made < 0:
        pytest.skip(f"this kernel has no tcx: {os.strerror(ctypes.get_errno())}")
    return made


def test_a_program_that_sees_packets_without_a_filter_is_named(clean: ExitStack) -> None:
    address, name = interface()
    code, license = ctypes.create_string_buffer(PASSES_ALL), ctypes.create_string_buffer(b"GPL")
    places = struct.pack("=QQ", ctypes.addressof(code), ctypes.addressof(license))
    program = bpf(PROG_LOAD, struct.pack("=II", CLASSIFIER, 2), places)
    clean.callback(os.close, program)
    link = bpf(LINK_CREATE, struct.pack("=III", program, socket.if_nametoindex(name), TCX_EGRESS))
    try:
        (entry,) = blockers(address, "traffic-rule")
        assert (entry["subject"], "tcx" in entry["detail"]) == (name, True)
        assert vfiotool("bind", address, "--dry-run").code == 4
    finally:
        os.close(link)
    assert_passable(address)


def test_an_observation_that_cannot_fork_is_no_free_device(clean: ExitStack) -> None:
    """With the processes' limit reached: nothing may read as unused."""
    group = Path("/sys/fs/cgroup")
    if not (group / "cgroup.controllers").exists():
        run("mount", "-t", "cgroup2", "cgroup2", str(group))
    if "pids" not in (group / "cgroup.controllers").read_text().split():
        pytest.skip("this kernel limits no processes (CONFIG_CGROUP_PIDS)")
    (group / "cgroup.subtree_control").write_text("+pids")
    few = group / "few"
    few.mkdir(exist_ok=True)
    clean.callback(few.rmdir)
    (few / "pids.max").write_text("1")
    script = 'echo $$ > "$0"/cgroup.procs; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, str(few), sys.executable, "-m", "vfiotool", "bind", DISK],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode != 0, done.stdout
    assert (PCI / DISK / "driver").resolve().name == "nvme"
