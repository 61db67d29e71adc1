"""A model served on a socket: clients one after the other, until it is stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable

from vfiotool.errors import KernelError, UsageError, from_oserror
from vfiotool.models.device import Model
from vfiotool.models.session import Session

# A client that is connected and waits its turn; more are refused by the kernel.
_BACKLOG = 4
_LONGEST_PATH = 107


class ModelServer:
    """Serves `model` at the path `socket_path`: a socket of mode 0600, which a server that has
    ended left is replaced. `with` runs it in a thread; `run` in the caller's. A client that goes
    leaves the device as it is; his memory and interrupts are let go.

    Raises UsageError for a path that cannot be a socket's, KernelError (EADDRINUSE) while another
    process serves it.
    """

    def __init__(
        self,
        model: Model,
        socket_path: str,
        *,
        twin: bool = True,
        report: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.model = model
        self.path = socket_path
        self.sessions = 0
        self.session: Session | None = None
        self._twin = twin
        self._report = report
        self._ending = False
        self._lock = threading.Lock()
        self._listener = _listen(socket_path)
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """What `Device.open` calls the device."""
        return f"vfio-user:{self.path}"

    @property
    def serving(self) -> bool:
        """Whether the thread of `with` is at work."""
        return self._thread is not None and self._thread.is_alive()

    def run(self) -> None:
        """Serve until `stop`, which another thread calls."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._ending:
                    connection.close()
                    return
                session = self.session = Session(self.model, connection, twin=self._twin)
                self.sessions += 1
            reason = session.run()
            with self._lock:
                self.session = None
            if not self._ending:
                self._report(f"the client has gone: {reason}")

    def drop_client(self) -> None:
        """End the connection of the client that there is: the device vanishes from it."""
        with self._lock:
            if self.session is not None:
                self.session.end("the device was taken away")

    def stop(self) -> None:
        """End the client's connection and serve no more; the socket's path is removed."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
            self.model.faults.released.set()
            if self.session is not None:
                self.session.end("the server stops")
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener.close()

    def __enter__(self) -> ModelServer:
        self._thread = threading.Thread(target=self.run, daemon=True, name=f"model {self.path}")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self.model.close()


def _listen(path: str) -> socket.socket:
    if not path or len(os.fsencode(path)) > _LONGEST_PATH or "\0" in path:
        raise UsageError(f"{path[:80]!r} is not a socket's path of at most {_LONGEST_PATH} bytes")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
        old = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(old)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise from_oserror(f"listen at {path}", error) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_dead(path: str) -> None:
    """Remove a socket that nobody listens at; anything else stays, and binding fails."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise KernelError(f"listen at {path}: it is served already", errno_name="EADDRINUSE")
