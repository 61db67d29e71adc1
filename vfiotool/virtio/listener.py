"""Sockets that front ends and operators find by a path: one server at each, and nobody else's is
removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vfiotool.errors import Refused, UsageError, from_oserror

# How long another server's socket in the same folder is waited for.
_LOCK_S = 2.0


def listen(path: str, *, private: bool = False) -> socket.socket:
    """A listening socket at `path`, which with `private` its user alone may connect to. A socket
    there that nobody listens on any more is replaced; of several servers that begin there at once,
    one listens.

    Raises Refused if somebody does, UsageError for what is no socket or cannot be one's path,
    NotPermitted or KernelError as bind does.
    """
    if not path or "\0" in path:
        # The kernel would listen under a name that is no path, for everybody.
        raise UsageError(f"{path!r} is not a socket's path")
    if len(os.fsencode(path)) > 107:
        raise UsageError(f"{path}: a socket's path has at most 107 bytes")
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise from_oserror(f"listen on {path}", error) from error
    try:
        with _alone(path):
            _remove_dead(path)
            if private:
                # Not by the umask: it is all threads', and two that put it back leave it changed.
                # Source: net/unix/af_unix.c, unix_bind_bsd.
                os.fchmod(listener.fileno(), 0o600)
            listener.bind(path)
            listener.listen(8)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise _taken(path) from error
        raise from_oserror(f"listen on {path}", error) from error
    except BaseException:
        listener.close()
        raise
    return listener


def unlink_socket(path: str) -> None:
    """Remove a socket of ours, once it is closed. One that another server has put there meanwhile
    stays."""
    with suppress(OSError, Refused, UsageError), _alone(path):
        _remove_dead(path)


class Spare:
    """A descriptor that is given up for a moment to take, and end, a connection when there are no
    descriptors left: its listening socket would be ready for ever. Close it."""

    def __init__(self) -> None:
        self._held: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def accept(self, listener: socket.socket) -> socket.socket | None:
        """A connection; None if it went again before it was taken, which is nobody's fault. Raises
        Refused if there was no descriptor for it."""
        try:
            return listener.accept()[0]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                return None
        self.close()
        with suppress(OSError):
            listener.accept()[0].close()
        with suppress(OSError):
            # Where the whole machine has none left, another program may have been faster.
            self._held = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        raise Refused("no descriptor is left for a connection")

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            os.close(held)


def _taken(path: str) -> Refused:
    return Refused(f"{path}: another program listens there", hint="stop it, or choose another path")


def _remove_dead(path: str) -> None:
    """Remove a socket that nobody listens on. Raises Refused if somebody does, UsageError for what
    is no socket."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is there and is not a socket")
        if _is_listened_on(path):
            raise _taken(path)
        os.unlink(path)


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Between looking at a path and listening there, no other server does; as far as its folder can
    be locked."""
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    ends = time.monotonic() + _LOCK_S
    try:
        with suppress(OSError):
            while not _locked(folder) and time.monotonic() < ends:
                time.sleep(0.01)
        yield
    finally:
        os.close(folder)


def _locked(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_listened_on(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
