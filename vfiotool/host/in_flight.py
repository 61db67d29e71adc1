"""Files on their way through a Unix socket: sent (SCM_RIGHTS), and not yet taken by anybody.

No table of open files shows them. The kernel counts them for each socket, and a look at the first
message that leaves it there (MSG_PEEK) gives descriptors of what it carries; what stands behind
it, or waits for accept(2), is counted and cannot be looked at.
Source: net/unix/af_unix.c, unix_show_fdinfo and unix_peek_fds; pidfd_getfd(2).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterator

from vfiotool.host.paths import PROC
from vfiotool.host.probe import answer_of
from vfiotool.host.processes import libc

_COUNT = "scm_fds:"
# One number on all machines (scripts/syscall.tbl).
_PIDFD_GETFD = 438
# include/uapi/linux/pidfd.h: a thread that is no leader of its process.
_PIDFD_THREAD = os.O_EXCL
# include/net/scm.h, SCM_MAX_FD; and room for the sender's ids.
_ANCILLARY_BYTES = socket.CMSG_SPACE(253 * 4) + 4096
_INT = struct.Struct("=i")
# A socket in a socket in a socket: unix_inflight allows a sender more, nobody means it.
_DEPTH = 4

# Yields the lines of one descriptor of the child's own.
Look = Callable[[str], Iterator[str]]


def waiting(info: list[str]) -> int:
    """How many files wait in a socket, by the lines of its fdinfo; 0 for what is none."""
    told = [line.partition(":")[2].strip() for line in info if line.startswith(_COUNT)]
    return int(told[0]) if told and told[0].isdecimal() else 0


def files_in_flight(pid: int, task: int, number: int, look: Look) -> list[str]:
    """What `look` says of each file that waits in descriptor `number` of a thread's table.

    `task` is the thread whose table it is. Asked in a child with a deadline, which takes nothing
    out of the socket. A line `!` counts those that could not be looked at. Raises OSError if the
    child did not answer.
    """

    def ask() -> str:
        try:
            own = _take(pid, task, number)
        except OSError as error:
            return f"!\tfiles ({error.strerror})\n"
        return "".join(f"{line}\n" for line in _behind(own, look, _DEPTH))

    return answer_of(ask).splitlines()


def _take(pid: int, task: int, number: int) -> int:
    process = os.pidfd_open(task, 0 if task == pid else _PIDFD_THREAD)
    taken = int(libc().syscall(_PIDFD_GETFD, process, number, 0))
    if taken < 0:
        wrong = ctypes.get_errno()
        raise OSError(wrong, os.strerror(wrong))
    return taken


def _behind(number: int, look: Look, depth: int) -> Iterator[str]:
    """The files that wait in a socket of this child's own, and in those that are sockets too."""
    with open(f"{PROC}/self/fdinfo/{number}", encoding="ascii") as file:
        count = waiting(file.read().splitlines())
    if not count:
        return
    found = _peek(number) if depth else []
    for descriptor in found:
        yield from look(str(descriptor))
        yield from _behind(descriptor, look, depth - 1)
    if len(found) < count:
        yield f"!\t{count - len(found)} of its {count} files"


def _peek(number: int) -> list[int]:
    try:
        with socket.socket(fileno=os.dup(number)) as end:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            _, parts, _, _ = end.recvmsg(1, _ANCILLARY_BYTES, flags)
    except OSError:
        return []
    return [
        descriptor
        for level, kind, data in parts
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (descriptor,) in _INT.iter_unpack(data[: len(data) // 4 * 4])
    ]
