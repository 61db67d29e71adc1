"""Questions to the kernel that can block or that only a probe answers: asked in a child.

A child that does not answer in time is left behind (see child.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import stat
import struct
import time
from collections.abc import Callable, Iterator
from glob import glob

from vfiotool.errors import errno_name
from vfiotool.host.child import abandon, leave_parent
from vfiotool.host.paths import (
    DEV,
    DEV_VFIO,
    NO_CONFIGFS,
    SYS_BLOCK,
    SYS_LIO_CORE,
    SYS_MODULE,
    SYS_NVME_TARGETS,
    SYS_USB_GADGETS,
)
from vfiotool.host.processes import plain

# A loaded host may be slow to fork; a use that was missed costs more than the wait.
DEADLINE_S = 10.0
_END = b"\0"
# include/uapi/linux/loop.h, struct loop_info64: lo_device, lo_inode, lo_rdevice, …
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("=QQQ")
_LOOP_INFO_BYTES = 232
_HIDDEN = {"nvmet": SYS_NVME_TARGETS, "usb_f_mass_storage": SYS_USB_GADGETS}
# What opening a loop device or asking it gives where it has no backing file (any more).
_UNUSED = (errno.ENXIO, errno.ENOENT, errno.ENODEV)


def ask_child(
    question: Callable[[], str], timeout_s: float = DEADLINE_S, keep: tuple[int, ...] = ()
) -> str | None:
    """What `question` answers in a child of its own; None if it fails or misses the deadline.

    An answer ends with a mark, so that an empty one is none of a child that died. Raises OSError
    if no child can be made.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if child == 0:
        # Whatever happens, the child must never run on in the parent's code.
        try:
            leave_parent(writer, *keep)
            data = question().encode("utf-8", "backslashreplace") + _END
            while data:
                data = data[os.write(writer, data) :]
        finally:
            os._exit(0)
    os.close(writer)
    parts: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([reader], [], [], left)[0]:
                return None
            piece = os.read(reader, 1 << 16)
            if not piece:
                whole = b"".join(parts)
                return whole.removesuffix(_END).decode() if whole.endswith(_END) else None
            parts.append(piece)
    finally:
        os.close(reader)
        abandon(child)


def answer_of(question: Callable[[], str], keep: tuple[int, ...] = ()) -> str:
    """`ask_child`, where no answer is a failure: raises OSError (ETIMEDOUT)."""
    answer = ask_child(question, keep=keep)
    if answer is None:
        raise OSError(errno.ETIMEDOUT, "no answer from the child that was to look")
    return answer


def block_claim(name: str) -> str:
    """Whether the kernel has claimed a block device, as mkfs and fdisk find out: O_EXCL is EBUSY.

    It tells of users that no table names: ZFS, kernel targets, external journals, lazily
    unmounted file systems. Opened for reading only, in a child with a deadline.
    """
    if "/" in name or name.startswith("."):
        return "unknown EINVAL\n"
    return _exclusive(f"{DEV}/{name.replace('!', '/')}", os.O_RDONLY | os.O_EXCL)


def vfio_claim(group: str) -> str:
    """Whether somebody has a VFIO group or a device of it: a group opens once.

    A device keeps its group's file even where that was closed (drivers/vfio/group.c,
    vfio_group_fops_open and vfio_device_fops_release). Asked only where a VFIO device is open of
    which the kernel does not tell which it is: a VM that starts in that moment would be refused.
    """
    if not group.isdecimal():
        return "unknown EINVAL\n"
    return _exclusive(f"{DEV_VFIO}/{group}", os.O_RDWR)


def _exclusive(path: str, flags: int) -> str:
    def probe() -> str:
        try:
            os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return "claimed\n"
            return f"unknown {errno_name(error.errno)}\n"
        return "free\n"

    return ask_child(probe) or "unknown ETIMEDOUT\n"


def loops() -> str:
    """Loop devices over block devices, by number: the backing file's path may lead elsewhere now.

    `loop0 <tab> 259:1`. In a child: opening one waits for whoever sets it up.
    """
    names = [name for name in os.listdir(SYS_BLOCK) if name.startswith("loop")]

    def look() -> str:
        return "".join(filter(None, map(_loop, sorted(names))))

    return answer_of(look) if names else ""


def _loop(name: str) -> str:
    try:
        # Set up or not: an idle one need not be opened.
        os.stat(f"{SYS_BLOCK}/{name}/loop")
        descriptor = os.open(f"{DEV}/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _UNUSED and not os.path.exists(f"{SYS_BLOCK}/{name}/loop"):
            return ""
        return f"!\twhat {name} stands on: {errno_name(error.errno)}\n"
    try:
        info = bytearray(_LOOP_INFO_BYTES)
        fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, info)
    except OSError as error:
        if error.errno in _UNUSED:
            return ""
        return f"!\twhat {name} stands on: {errno_name(error.errno)}\n"
    finally:
        os.close(descriptor)
    number = _LOOP_INFO.unpack_from(info)[2]
    return f"{name}\t{os.major(number)}:{os.minor(number)}\n" if number else ""


def targets() -> str:
    """Disks that targets of the kernel's own export, by number: they open them without a claim.

    `subsystem <tab> namespace <tab> path <tab> 259:1` of the NVMe target; of the SCSI target and of
    USB gadgets the export's folder and `file`. In a child: a path may lead anywhere.
    """

    def look() -> str:
        return "".join(_targets())

    try:
        os.listdir(SYS_NVME_TARGETS)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        if any(os.path.isdir(path) for path in (SYS_LIO_CORE, SYS_USB_GADGETS)):
            return answer_of(look)
        # They run on where configfs, their one face, is not mounted.
        return "".join(
            f"!\t{folder}: {name} is loaded, {NO_CONFIGFS}\n"
            for name, folder in _HIDDEN.items()
            if os.path.exists(f"{SYS_MODULE}/{name}/initstate")
        )
    return answer_of(look)


def _targets() -> list[str]:
    found = [line for base, path in _opened_files() for line in _file_line(base, path)]
    systems = os.listdir(SYS_NVME_TARGETS) if os.path.isdir(SYS_NVME_TARGETS) else []
    for system in sorted(systems):
        folder = f"{SYS_NVME_TARGETS}/{system}"
        exports = [f"namespaces/{number}" for number in sorted(os.listdir(f"{folder}/namespaces"))]
        # A whole controller (drivers/nvme/target/passthru.c), where the kernel can do that.
        exports += ["passthru"] * os.path.isdir(f"{folder}/passthru")
        for export in exports:
            base = f"{folder}/{export}"
            if _text(f"{base}/enable") != "1":
                continue
            number = export.rpartition("/")[2]
            path = _text(f"{base}/device_path")
            try:
                status = os.stat(path)
            except OSError as error:
                why = errno_name(error.errno)
                found.append(f"!\twhat {system} exports as {plain(path)}: {why}\n")
                continue
            if stat.S_ISBLK(status.st_mode) or number == "passthru":
                where = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
                found.append(f"{plain(system)}\t{number}\t{plain(path)}\t{where}\n")
    return found


def _opened_files() -> Iterator[tuple[str, str]]:
    """What the SCSI target's file back end and mass storage gadgets have open: no process shows it.

    Source: drivers/target/target_core_file.c, fd_show_configfs_dev_params;
    Documentation/ABI/testing/configfs-usb-gadget-mass-storage.
    """
    for folder in sorted(glob(f"{SYS_LIO_CORE}/fileio_*/*/")):
        told = re.search(r"File: (.*?)\s+Size: \d+", _text(f"{folder}info"))
        if told is not None:
            yield folder.rstrip("/"), told[1]
    for file in sorted(glob(f"{SYS_USB_GADGETS}/*/functions/mass_storage.*/lun.*/file")):
        path = _text(file)
        if path:
            yield os.path.dirname(file), path


def _file_line(base: str, path: str) -> Iterator[str]:
    try:
        status = os.stat(path)
    except OSError as error:
        yield f"!\twhat {plain(base)} exports as {plain(path)}: {errno_name(error.errno)}\n"
        return
    if stat.S_ISBLK(status.st_mode):
        where = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        yield f"{plain(base)}\tfile\t{plain(path)}\t{where}\n"


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="backslashreplace") as file:
        return file.read().strip()


def eswitch(address: str) -> str:
    """A PCI function's eswitch mode, asked in a child: devlink answers under the device's lock."""
    from vfiotool.errors import Unsupported, VfiotoolError
    from vfiotool.netlink.devlink import read_eswitch

    def ask() -> str:
        try:
            return f"{read_eswitch(address, DEADLINE_S) or 'none'}\n"
        except Unsupported:
            return "none\n"
        except VfiotoolError as error:
            return f"unknown {error.errno_name}\n"

    return ask_child(ask) or "unknown ETIMEDOUT\n"
