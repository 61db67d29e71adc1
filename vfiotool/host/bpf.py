"""BPF programs that see an interface's packets without a filter of tc's (tcx).

Source: include/uapi/linux/bpf.h, BPF_PROG_QUERY; kernel/bpf/tcx.c and mprog.c, since Linux 6.6.
They stay attached while a link of theirs is open in a process or pinned to a file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from vfiotool.host.processes import libc

# bpf(2) by machine.
_BPF = {
    "x86_64": 321,
    "i686": 357,
    "aarch64": 280,
    "armv7l": 386,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
    "ppc64": 361,
    "s390x": 351,
}
_PROG_QUERY = 16
# BPF_TCX_INGRESS, BPF_TCX_EGRESS.
_HOOKS = (46, 47)
# The interface, the hook; then, at _COUNT_AT, how many there are. Nothing is asked about each.
_QUERY = struct.Struct("=II120x")
_COUNT_AT = 24
_COUNT = struct.Struct("=I")
# No such hook (before 6.6), no BPF, nothing attached, no interface any more.
_NOTHING = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOENT, errno.ENODEV})


def has_tcx(index: int) -> bool:
    """Whether a program is attached to the interface of that index, either way of its packets.

    Raises OSError where that cannot be told: EPERM without CAP_NET_ADMIN, ENOSYS on a machine whose
    number of the system call is not known.
    """
    return any(_attached(index, hook) for hook in _HOOKS)


def _attached(index: int, hook: int) -> bool:
    number = _BPF.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    query = ctypes.create_string_buffer(_QUERY.pack(index, hook), _QUERY.size)
    if libc().syscall(number, _PROG_QUERY, query, _QUERY.size) == 0:
        return bool(_COUNT.unpack_from(query, _COUNT_AT)[0])
    failed = ctypes.get_errno()
    if failed in _NOTHING:
        return False
    raise OSError(failed, os.strerror(failed))
