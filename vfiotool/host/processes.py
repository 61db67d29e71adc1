"""What the observations share: processes and their threads, and names as text.

Here too, what is gone, what may not be looked at and what failed are told apart: the first is
passed over, the second counted, the third raised.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

from vfiotool.host.paths import PROC

# What the kernel answers of a process that has ended or is ending.
GONE = frozenset({errno.ENOENT, errno.ESRCH})
DENIED = frozenset({errno.EACCES, errno.EPERM})
# kcmp(2) by machine: whether two threads share their table of open files.
_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "loongarch64": 272, "s390x": 343}
_KCMP_FILES = 2


# include/linux/sched.h, PF_KTHREAD; the place of `flags` behind the name (man 5 proc_pid_stat).
_KERNEL_THREAD = 0x00200000
_FLAGS_AT = 6
_FIRST_KERNEL_THREAD = 2


def processes() -> list[int]:
    """The ids of all processes that can have files, maps or namespaces of their own.

    Of kernel threads, of which a large host has thousands, only the first is one: the others share
    its tables, which are empty (kernel/kthread.c). Raises OSError if they cannot be listed.
    """
    found = sorted(int(name) for name in os.listdir(PROC) if name.isdecimal())
    return [pid for pid in found if pid == _FIRST_KERNEL_THREAD or not _is_kernel_thread(pid)]


def _is_kernel_thread(pid: int) -> bool:
    try:
        with open(f"{PROC}/{pid}/stat", "rb", buffering=0) as file:
            words = file.read(1024).rpartition(b")")[2].split()
        return bool(int(words[_FLAGS_AT]) & _KERNEL_THREAD)
    except (OSError, ValueError, IndexError):
        # Whoever looks into it meets the reason again.
        return False


def threads(pid: int) -> list[int]:
    """A process's threads; none if it has ended. Raises OSError otherwise."""
    try:
        return sorted(int(name) for name in os.listdir(f"{PROC}/{pid}/task"))
    except OSError as error:
        if error.errno in GONE:
            return []
        raise


def living(pid: int) -> int:
    """The thread that stands for a process: its first, unless that has ended before the others.

    A process whose first thread is gone shows no files, maps or namespaces in its own folder; it
    is in its other threads' (the kernel keeps the first as a zombie). Raises OSError.
    """
    if os.path.exists(f"{PROC}/{pid}/ns/mnt"):
        return pid
    return next(
        (one for one in threads(pid) if os.path.exists(f"{PROC}/{pid}/task/{one}/ns/mnt")), pid
    )


# include/linux/proc_ns.h: the first PID namespace has this number on every host.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"


def unlisted() -> list[str]:
    """Why this host may have processes that /proc does not list, in words.

    It belongs to a PID namespace, and shows no process outside that; and `hidepid` hides those
    that a program without CAP_SYS_PTRACE may not look into. Raises OSError.
    """
    why = []
    if not all(_is_of_the_host(pid) for pid in ("self", "1")):
        why.append("the processes outside of this PID namespace")
    with open(f"{PROC}/self/mountinfo", encoding="utf-8", errors="backslashreplace") as file:
        own = [line.split() for line in file if " - proc " in line]
    options = {part for words in own if words[4] == PROC for part in words[-1].split(",")}
    if options & _HIDING and not _may_trace():
        why.append("the processes that hidepid hides")
    return why


def _is_of_the_host(pid: str) -> bool:
    try:
        return os.readlink(f"{PROC}/{pid}/ns/pid") == _FIRST_PID_NAMESPACE
    except OSError as error:
        # One that may not be looked into is counted where it is; a /proc without it is no host's.
        if error.errno in DENIED:
            return True
        if error.errno in GONE:
            return False
        raise


# Documentation/filesystems/proc.rst, 4: by number before Linux 5.8.
_HIDING = frozenset({"hidepid=invisible", "hidepid=ptraceable", "hidepid=2", "hidepid=4"})
_CAP_SYS_PTRACE = 19


def _may_trace() -> bool:
    with open(f"{PROC}/self/status", encoding="ascii", errors="replace") as file:
        told = [line.split()[1] for line in file if line.startswith("CapEff:")]
    return bool(told) and bool(int(told[0], 16) >> _CAP_SYS_PTRACE & 1)


def tables_of(pid: int) -> Iterator[str]:
    """The folders of the process's tables of open files: one, unless threads have their own."""
    yield f"{PROC}/{pid}/fd"
    for thread in threads(pid):
        if thread != pid and not _share_files(pid, thread):
            yield f"{PROC}/{pid}/task/{thread}/fd"


def _share_files(first: int, second: int) -> bool:
    number = _KCMP.get(os.uname().machine)
    if number is None:
        return False
    zero = ctypes.c_ulong(0)
    return bool(libc().syscall(number, first, second, _KCMP_FILES, zero, zero) == 0)


_loaded: list[ctypes.CDLL] = []


def libc() -> ctypes.CDLL:
    """The C library, for system calls that Python does not have."""
    if not _loaded:
        _loaded.append(ctypes.CDLL(None, use_errno=True))
    return _loaded[0]


def enter_namespace(descriptor: int) -> None:
    """Move this process, a child of its own, into the namespace behind a descriptor."""
    if libc().setns(descriptor, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# include/uapi/linux/stat.h, fcntl.h: struct statx, of which a file's type never needs a server.
_STATX_BYTES = 256
_STATX_TYPE = 1
_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_MODE_AT, _RDEV_AT = 28, 128
_MODE = struct.Struct("=H")
_RDEV = struct.Struct("=II")


def type_and_number(path: str) -> tuple[int, int, int]:
    """A file's mode and, for a device node, its major and minor number, without asking a server.

    A descriptor may lead to a network mount whose server is gone: stat(2) would wait for it.
    Raises OSError.
    """
    buffer = (ctypes.c_ubyte * _STATX_BYTES)()
    if libc().statx(_AT_FDCWD, path.encode(), _AT_STATX_DONT_SYNC, _STATX_TYPE, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    mode, *_ = _MODE.unpack_from(buffer, _MODE_AT)
    major, minor = _RDEV.unpack_from(buffer, _RDEV_AT)
    return mode, major, minor


def command(pid: int) -> str:
    """A process's name, `?` where it has none (any more)."""
    try:
        with open(f"{PROC}/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
            return plain(file.read().rstrip("\n")) or "?"
    except OSError:
        return "?"


def plain(text: str) -> str:
    """Without control characters, so that a name cannot break the format."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(processes: int) -> str:
    """A number of processes in words."""
    return "1 process" if processes == 1 else f"{processes} processes"
