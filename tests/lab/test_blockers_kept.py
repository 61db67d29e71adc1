"""Devices that no table of open files shows as open, held for real; `bind` refuses each."""

from __future__ import annotations

import os
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
from tests.lab.test_blockers_unseen import hold, node_elsewhere

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")

DISK = "0000:03:00.0"
EDU = "0000:00:01.0"


@pytest.fixture(autouse=True)
def clean() -> Iterator[ExitStack]:
    """Undoes what a test did, last first, and holds that the disk is free again."""
    need("vfio-pci", "nvme")
    disk_of(DISK)
    with ExitStack() as stack:
        yield stack
    wait_for(lambda: not blockers(DISK, "open-file"), "the disk to be closed")
    assert_passable(DISK)


def refused(device: str, word: str) -> None:
    done = vfiotool("bind", device)
    assert done.code == 4, done.out + done.err
    assert word in done.err


SEND = (
    "import os, socket, sys\n"
    "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "file = os.open(sys.argv[1], os.O_RDWR); socket.send_fds(a, [b'x'], [file]); os.close(file)\n"
)


def test_a_disk_that_is_in_a_socket_only_is_open(clean: ExitStack) -> None:
    hold(clean, SEND, f"/dev/{disk_of(DISK)}")
    refused(DISK, "open-file")


def test_a_disk_that_is_in_a_socket_within_a_socket_is_open(clean: ExitStack) -> None:
    program = SEND + (
        "c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "socket.send_fds(c, [b'x'], [a.fileno(), b.fileno()]); a.close(); b.close()"
    )
    hold(clean, program, f"/dev/{disk_of(DISK)}")
    refused(DISK, "open-file")


@pytest.mark.parametrize("closed", ["", "os.close(file)"])
def test_a_disk_of_a_process_whose_first_thread_ended_is_open(
    clean: ExitStack, closed: str
) -> None:
    """Its own folder in /proc is empty, and it goes on."""
    program = (
        "import ctypes, mmap, os, sys, threading\n"
        "def other():\n"
        "    file = os.open(sys.argv[1], os.O_RDWR)\n"
        "    libc.mmap(None, 4096, 1, 1, file, ctypes.c_long(0))\n"
        f"    {closed}\n"
        "    while open('/proc/self/stat').read().rpartition(')')[2].split()[0] != 'Z':\n"
        "        pass\n"
        "    print('ready', flush=True); input()\n"
        "libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p\n"
        "threading.Thread(target=other).start(); libc.syscall(60, 0)"
    )
    hold(clean, program, f"/dev/{disk_of(DISK)}")
    refused(DISK, "open-file")


def test_registers_that_are_mapped_as_memory_are_open(clean: ExitStack) -> None:
    start = int((PCI / EDU / "resource").read_text().split()[0], 16)
    program = (
        "import mmap, os, sys\n"
        "try:\n"
        "    file = os.open('/dev/mem', os.O_RDWR | os.O_SYNC)\n"
        "    window = mmap.mmap(file, 4096, offset=int(sys.argv[1]))\n"
        "except OSError as error:\n"
        "    print('skip: this kernel gives no memory', error)"
    )
    hold(clean, program, str(start))
    refused(EDU, "/dev/mem")


def test_a_function_that_is_open_in_proc_is_open(clean: ExitStack) -> None:
    hold(clean, "file = open('/proc/bus/pci/00/01.0', 'rb')")
    refused(EDU, "/proc/bus/pci/00/01.0")


def test_processes_outside_of_the_pid_namespace_are_unseen(clean: ExitStack) -> None:
    hold(clean, "import sys; file = open(sys.argv[1], 'rb')", f"/dev/{disk_of(DISK)}")
    own = ["unshare", "--pid", "--fork", "--mount-proc"]
    command = [*own, sys.executable, "-m", "vfiotool", "bind", DISK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "outside of this PID namespace" in done.stderr


def test_exports_of_a_target_whose_configfs_was_unmounted_are_unseen(clean: ExitStack) -> None:
    need("nvmet")
    base = Path("/sys/kernel/config")
    if not os.path.ismount(base):
        # It stays: with nvmet there and configfs not mounted no disk is known to be free.
        run("mount", "-t", "configfs", "none", str(base))
    space = base / "nvmet/subsystems/kept/namespaces/1"
    space.mkdir(parents=True)
    clean.callback(space.parent.parent.rmdir)
    clean.callback(space.rmdir)
    (space / "device_path").write_text(f"/dev/{disk_of(DISK)}")
    (space / "enable").write_text("1")
    clean.callback((space / "enable").write_text, "0")
    run("umount", str(base))
    clean.callback(run, "mount", "-t", "configfs", "none", str(base))
    refused(DISK, "configfs not mounted")
    # What `why` offers, typed as it stands, shows who uses it and changes nothing else.
    mounting, again = why(DISK)[1]["next"]
    assert again == f"vfiotool why {DISK}"
    run("sh", "-c", mounting)
    assert [entry["subject"] for entry in blockers(DISK, "storage-member")] == ["kept"]
    run("umount", str(base))


def configured(folder: Path, stack: ExitStack) -> Path:
    """A folder of configfs, made for the test."""
    if not os.path.ismount("/sys/kernel/config"):
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")
    folder.mkdir(parents=True)
    stack.callback(folder.rmdir)
    return folder


def test_a_disk_that_the_scsi_target_opened_as_a_file_is_exported(
    clean: ExitStack, tmp_path: Path
) -> None:
    """It has no claim, no process has it open, and its path says nothing."""
    need("target_core_mod", "target_core_file")
    node = node_elsewhere(clean, tmp_path, "disk")
    core = Path("/sys/kernel/config/target/core")
    configured(core / "fileio_0", clean)
    store = configured(core / "fileio_0/x", clean)
    (store / "control").write_text(f"fd_dev_name={node},fd_dev_size=1048576")
    (store / "enable").write_text("1")
    refused(DISK, "fileio_0")


def test_a_disk_that_a_usb_gadget_opened_is_exported(clean: ExitStack, tmp_path: Path) -> None:
    need("libcomposite", "usb_f_mass_storage")
    node = node_elsewhere(clean, tmp_path, "disk")
    gadget = configured(Path("/sys/kernel/config/usb_gadget/g"), clean)
    storage = configured(gadget / "functions/mass_storage.0", clean)
    (storage / "lun.0/file").write_text(str(node))
    refused(DISK, "USB gadget")
    (entry,) = blockers(DISK, "storage-member")
    assert entry["evidence"] == f"{storage}/lun.0/file"
    run("sh", "-c", why(DISK)[1]["next"][0])
