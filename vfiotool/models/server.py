"""A model served on a socket: clients one after the other, until it is stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable

import vfiotool
from vfiotool.errors import (
    KernelError,
    TimedOut,
    UsageError,
    VfiotoolError,
    described,
    from_oserror,
)
from vfiotool.models.device import Model
from vfiotool.models.session import Session

# A client that is connected and waits its turn; more are refused by the kernel.
_BACKLOG = 4
_LONGEST_PATH = 107
# How long a handler may go on after the end, and how many lines are said of those that raise.
_LET_GO_S = 5.0
_OURS = os.path.dirname(vfiotool.__file__) + os.sep
_MOST_TOLD = 100


class ModelServer:
    """Serves `model` at the path `socket_path`: a socket of mode 0600, which a server that has
    ended left is replaced. `with` runs it in a thread; `run` in the caller's. A client that goes
    leaves the device as it is; his memory and interrupts are let go.

    What a handler raises is answered with EIO; the device is served on. `report` is handed one
    line for each place that raised, and one for each client that goes. Without it the end of
    `with` raises what was raised first, or notes it on the exception under way. That end raises
    TimedOut where a handler does not return, and KernelError where serving ended by itself.

    Raises UsageError for a path that cannot be a socket's, KernelError (EADDRINUSE) while another
    process serves it.
    """

    def __init__(
        self,
        model: Model,
        socket_path: str,
        *,
        twin: bool = True,
        report: Callable[[str], object] | None = None,
    ) -> None:
        if not isinstance(model, Model):
            what = f"the class {model.__name__}" if isinstance(model, type) else repr(model)[:80]
            raise UsageError(f"{what} is not a model: what is served is an instance of one")
        if "lock" not in vars(model):
            kind = type(model).__name__
            raise UsageError(f"{kind}: its __init__ does not call super().__init__()")
        self.model = model
        self.path = socket_path
        self.sessions = 0
        self.session: Session | None = None
        self._twin = twin
        self._report = report
        self._told: set[str] = set()
        self._first: BaseException | None = None
        self._broken: VfiotoolError | None = None
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
            except OSError as error:
                if not self._ending:
                    self._broken = from_oserror(f"accept a client at {self.path}", error)
                return
            with self._lock:
                if self._ending:
                    connection.close()
                    return
                session = self.session = Session(
                    self.model, connection, twin=self._twin, failed=self._failed
                )
                self.sessions += 1
            reason = ""
            try:
                reason = session.run()
            except Exception as error:  # of the model's `start` or `stop`
                self._failed(error)
            with self._lock:
                self.session = None
            if reason and not self._ending and self._report is not None:
                self._report(f"the client has gone: {reason}")

    def _failed(self, error: BaseException) -> None:
        """The model's own code has raised."""
        told = f"{type(self.model).__name__}: {described(error)}"
        if self._first is None:
            self._first = error
        # A client can have it raised as often as it likes.
        if self._report is not None and told not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(told)
            self._report(f"{told}: answered with EIO; said once")

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

    def __exit__(self, _kind: object, under_way: BaseException | None, _trace: object) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join(_LET_GO_S)
            if self._thread.is_alive():
                raise TimedOut(
                    f"{type(self.model).__name__}: a handler has not returned for "
                    f"{_LET_GO_S:g} s: {self._place()}",
                    errno_name="ETIMEDOUT",
                )
        self.model.close()
        self._raise_what_failed(under_way)

    def _raise_what_failed(self, under_way: BaseException | None) -> None:
        failed = self._broken or (self._first if self._report is None else None)
        if failed is None or failed is under_way:
            return
        if under_way is None and isinstance(failed, Exception):
            raise failed
        if under_way is None:
            raise UsageError(f"{type(self.model).__name__}: {described(failed)}") from failed
        under_way.add_note(f"in the model: {type(self.model).__name__}: {described(failed)}")

    def _place(self) -> str:
        """Where in the handler the thread is."""
        assert self._thread is not None
        frame = sys._current_frames().get(self._thread.ident or 0)
        place = "in vfiotool's own code"
        while frame is not None and frame.f_code is not ModelServer.run.__code__:
            code = frame.f_code
            if not code.co_filename.startswith(_OURS):
                place = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}, {code.co_name}"
            frame = frame.f_back
        return place


def _listen(path: str) -> socket.socket:
    if not path or len(os.fsencode(path)) > _LONGEST_PATH or "\0" in path:
        said = f"{path[:80]!r}{'…' * (len(path) > 80)} of {len(os.fsencode(path))} bytes"
        raise UsageError(f"{said}: a socket's path has 1 to {_LONGEST_PATH} bytes")
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"{path} exists and is not a socket")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
        _appear(listener, path)
    except FileExistsError as error:
        listener.close()
        raise _taken(path) from error
    except OSError as error:
        listener.close()
        folder = os.path.dirname(path) or "."
        hint = None if os.path.isdir(folder) else f"there is no folder {folder}"
        raise from_oserror(f"listen at {path}", error, hint=hint) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _appear(listener: socket.socket, path: str) -> None:
    """Listen at `path`, which is there once it listens and not before: until then the socket would
    be as one that a dead server left, to clients and to the next server. It replaces nothing."""
    hidden = os.path.join(os.path.dirname(path), f".{os.urandom(3).hex()}")
    if len(os.fsencode(hidden)) > _LONGEST_PATH:
        hidden = path
    # Its user's alone; not by the umask, which is all threads' (net/unix/af_unix.c, unix_bind_bsd).
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(hidden)
    listener.listen(_BACKLOG)
    if hidden == path:
        return
    try:
        os.link(hidden, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links.
        os.rename(hidden, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)


def _taken(path: str) -> KernelError:
    return KernelError(f"listen at {path}: it is served already", errno_name="EADDRINUSE")


def _remove_dead(path: str) -> None:
    """Remove a socket that nobody listens at; anything else stays, and binding fails."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A server that has as many clients as it lets wait is one as well.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise _taken(path)
