"""How a client comes to a vfio-user server: the connection, and what it says of one that fails."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct

from vfiotool.errors import NotFound, TimedOut, UsageError
from vfiotool.vfio.space import open_failure
from vfiotool.vfio.user_channel import UserChannel, UserFailure
from vfiotool.vfio.user_message import UserProtocolError

_LONGEST_PATH, _MOST_ERRNO = 107, 4095
# Seconds that a server may take until it lets a client in, and for each answer.
_CONNECT_S, _LIMIT_S = 10, 10.0
# What may be wrong where a server does not answer in time.
_BUSY = "its server serves one client at a time: another may have it; or the device does not answer"


def errno_of(failure: UserFailure) -> int:
    """A negative errno, whatever number the server sent."""
    return -(failure.number if 0 < failure.number <= _MOST_ERRNO else errno.EIO)


def channel_of(descriptor: int, name: str) -> UserChannel:
    """The channel of a socket that the server called `name` sent, which owns it from then on.
    Raises UserProtocolError for what is not a socket."""
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError as error:
        raise UserProtocolError(f"{name} offers a second socket, and it is none") from error
    return UserChannel(connection, _LIMIT_S, name=name, hint=_BUSY)


def is_sealed(descriptor: int) -> bool:
    """Whether nobody can shorten the file (F_SEAL_SHRINK of fcntl(2), for good): touching what is
    mapped of one that was shortened is a bus error. False for files that have no seals."""
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def always_holds(descriptor: int, size: int) -> bool:
    """Whether the file has `size` bytes, and keeps them."""
    # In this order: it could be shortened between the two.
    return is_sealed(descriptor) and os.fstat(descriptor).st_size >= size


def _is_something_else(path: str) -> bool:
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def connect(path: str, name: str) -> UserChannel:
    """A connection to the server at `path`. Raises NotFound, UsageError for what is not a socket's
    path, TimedOut while others are waiting, and what opening a device's node raises."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(f"{path[:80]!r}…: a socket's path has at most {_LONGEST_PATH} bytes")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A server with as many clients in line as it lets wait is waited for with a limit.
        limit = struct.pack("@ll", _CONNECT_S, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.connect(path)
    except BlockingIOError as error:
        connection.close()
        raise TimedOut(
            f"{name}: not let in within {_CONNECT_S} s", hint=_BUSY, errno_name="ETIMEDOUT"
        ) from error
    except OSError as error:
        connection.close()
        if error.errno == errno.ECONNREFUSED and _is_something_else(path):
            raise UsageError(f"{name}: {path} is not a socket", device=name) from error
        if error.errno == errno.ENOENT:
            raise NotFound(f"{name}: there is no such socket", device=name) from error
        hint = "is its server still running?" if error.errno == errno.ECONNREFUSED else None
        failure = open_failure(-(error.errno or errno.EINVAL), path, name)
        failure.hint = hint or failure.hint
        raise failure from error
    return UserChannel(connection, _LIMIT_S, name=name, hint=_BUSY)
