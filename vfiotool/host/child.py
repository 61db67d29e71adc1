"""The disposable processes that write for their parent, and read what can block.

Unbind, remove, reset and a change of VFs block for as long as a user holds the device, and the
first signal only moves the writer to an uninterruptible wait. So each such access is made by a
child that can be left behind (see `Host.write_attribute`).
"""

from __future__ import annotations

import errno
import os
import pickle
import select
import signal
import struct
import subprocess
import time
from collections.abc import Sequence

from vfiotool.errors import KernelError, Stuck, VfiotoolError

# Most that needs a child sends nothing over netlink.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfiotool.netlink.codec import Message, Request

# What programs that root calls are found and run with: nothing of the caller's.
CALLOUT_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}

_READ_BYTES = 1 << 16
_REPLY = struct.Struct("=ii")
# The lengths of the path, of the nodes to claim meanwhile and of the data (negative: so many bytes
# are to be read), and from where.
_REQUEST = struct.Struct("=iiiq")
# Between the nodes to claim: no path holds it.
_NEXT = "\0"
# The reply of a child that ended without one.
_LOST = (errno.EIO, 0)
# In the place of how many bytes were written: a block device to claim has another holder.
_CLAIMED = -1
# Errors of opening that say nothing of what is opened.
_OPENS_NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def write_in_child(path: str, data: bytes, timeout_s: float) -> None:
    """One `write(2)` in a child process. Raises OSError, KernelError (short write) or Stuck."""
    child = WriterProcess()
    try:
        child.write_attribute(path, data, timeout_s)
    finally:
        child.close()


class WriterProcess:
    """A disposable process that writes, and reads what can block, for its parent.

    It holds nothing of the parent's and ends when the parent does, after the access in hand. An
    access that misses its deadline costs the child: it is left alone until the kernel lets it go.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        requests, self._requests = os.pipe2(os.O_CLOEXEC)
        self._replies, replies = os.pipe2(os.O_CLOEXEC)
        self._open = True
        self._answer = b""
        self.pid = os.fork()
        if self.pid == 0:
            # Whatever happens, the child must never run on in the parent's code.
            try:
                leave_parent(requests, replies)
                _serve(requests, replies)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)

    def usable(self) -> bool:
        """Whether it can do an access: not closed, not inherited by a fork, not dead."""
        if self._owner != os.getpid() or not self._open:
            return False
        return not select.select([self._replies], [], [], 0)[0]

    def write_attribute(
        self, path: str, data: bytes, timeout_s: float, claim: tuple[str, ...] = ()
    ) -> bool:
        """One `write(2)`, during which the block devices `claim` are claimed: nobody can mount one,
        swap to it or build on it.

        False, and nothing is written, if somebody has one of them claimed. Raises OSError,
        KernelError (short write) or Stuck (no answer).
        """
        what = f"write {data.decode().strip()!r} to {path}"
        where, nodes = path.encode(), _NEXT.join(claim).encode()
        request = _REQUEST.pack(len(where), len(nodes), len(data), 0) + where + nodes + data
        written = self._ask(what, path, request, timeout_s, reads=False)
        if written not in (len(data), _CLAIMED):
            raise KernelError(f"write to {path}: the kernel took {written} of {len(data)} bytes")
        return written != _CLAIMED

    def read(
        self, path: str, timeout_s: float, offset: int = 0, length: int = _READ_BYTES
    ) -> bytes:
        """At most `length` bytes (64 KiB or less) of a file, in one read.

        Raises OSError or Stuck (no answer).
        """
        where = path.encode()
        request = _REQUEST.pack(len(where), 0, -length, offset) + where
        self._ask(f"read {path}", path, request, timeout_s, reads=True)
        return self._answer

    def _ask(self, what: str, path: str, request: bytes, timeout_s: float, *, reads: bool) -> int:
        """The number of bytes written, or read and left in `_answer`."""
        try:
            os.write(self._requests, request)
            if not select.select([self._replies], [], [], timeout_s)[0]:
                raise Stuck(
                    f"{what}: no answer after {timeout_s:g} s",
                    hint="end what holds the device, then: vfiotool recover",
                )
            # Header and data come in one piece, but for files larger than a pipe takes at once.
            reply = os.read(self._replies, _REPLY.size + _READ_BYTES)
            number, count = _REPLY.unpack_from(reply) if len(reply) >= _REPLY.size else _LOST
            if reads and not number:
                self._answer = reply[_REPLY.size :]
                self._answer += _read_exactly(self._replies, count - len(self._answer))
        except BaseException:
            # Timed out or interrupted: its late answer must not be taken for that of the next.
            self.close()
            raise
        if number:
            raise OSError(number, os.strerror(number), path)
        return int(count)

    def close(self) -> None:
        """Let the child go. It ends at once, or when the kernel lets go of it."""
        if not self._open:
            return
        self._open = False
        os.close(self._requests)
        os.close(self._replies)
        if self._owner == os.getpid():
            abandon(self.pid)

    def __del__(self) -> None:
        # A host that is dropped must not keep its child: nothing else would end it. The
        # attributes are missing where making it failed half-way.
        if getattr(self, "_open", False) and hasattr(self, "pid"):
            self.close()


def _serve(requests: int, replies: int) -> None:
    while header := _read_exactly(requests, _REQUEST.size):
        where, nodes, length, offset = _REQUEST.unpack(header)
        path = _read_exactly(requests, where).decode()
        claim = _read_exactly(requests, nodes).decode()
        if length >= 0:
            data = _read_exactly(requests, length)
            claimed = claim.split(_NEXT) if claim else []
            os.write(replies, _REPLY.pack(*_write_once(path, data, claimed)))
            continue
        try:
            data = _read_once(path, offset, -length)
        except OSError as error:
            os.write(replies, _REPLY.pack(error.errno or errno.EIO, 0))
        else:
            _write_all(replies, _REPLY.pack(0, len(data)) + data)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_exactly(descriptor: int, length: int) -> bytes:
    """That many bytes of a pipe; fewer if its other end closed."""
    data = b""
    while len(data) < length and (piece := os.read(descriptor, length - len(data))):
        data += piece
    return data


def send_in_child(request: Request, timeout_s: float) -> list[Message]:
    """One netlink request in a child: the answers to it.

    The kernel runs a request inside `sendmsg`, under locks that a stuck device can hold for ever,
    so a time limit on the answer alone would not help (net/core/rtnetlink.c, rtnetlink_rcv_msg).
    Raises as `netlink.Socket.request`, and Stuck after `timeout_s`.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must never run on in the parent's code.
        try:
            leave_parent(writer)
            data = pickle.dumps(_attempt(request, timeout_s))
            while data:
                data = data[os.write(writer, data) :]
        finally:
            os._exit(0)
    os.close(writer)
    try:
        data = _read_all(reader, timeout_s, request)
    finally:
        os.close(reader)
        abandon(child)
    try:
        # Our own child's words; one that was killed may have left half of them.
        outcome = pickle.loads(data)
    except (pickle.UnpicklingError, EOFError):
        outcome = _lost(request)
    if isinstance(outcome, VfiotoolError):
        raise outcome
    answers: list[Message] = outcome
    return answers


def _attempt(request: Request, timeout_s: float) -> list[Message] | VfiotoolError:
    from vfiotool.netlink.codec import send

    try:
        return send(request, timeout_s)
    except VfiotoolError as error:
        return error


def _lost(request: Request) -> KernelError:
    return KernelError(f"{request.what}: the process that sent it ended without an answer")


def _read_all(reader: int, timeout_s: float, request: Request) -> bytes:
    deadline = time.monotonic() + timeout_s
    parts: list[bytes] = []
    while True:
        left = max(deadline - time.monotonic(), 0)
        if not select.select([reader], [], [], left)[0]:
            raise Stuck(
                f"{request.what}: no answer after {timeout_s:g} s",
                hint="end what holds the device, then: vfiotool recover",
            )
        piece = os.read(reader, 1 << 16)
        if not piece:
            return b"".join(parts)
        parts.append(piece)


def run_modprobe(name: str, timeout_s: float) -> None:
    command = ["modprobe", "--", name]
    try:
        child = subprocess.Popen(
            command,
            env=CALLOUT_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise KernelError(
            f"load module {name}: there is no modprobe", errno_name="ENOENT"
        ) from error
    try:
        said = child.communicate(timeout=timeout_s)[1]
    except subprocess.TimeoutExpired as error:
        child.kill()
        raise Stuck(
            f"load module {name}: no answer after {timeout_s:g} s", hint="vfiotool recover"
        ) from error
    if child.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        raise KernelError(f"load module {name}: {lines[-1] if lines else 'modprobe failed'}")


def _read_once(path: str, offset: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def _write_once(path: str, data: bytes, claim: Sequence[str]) -> tuple[int, int]:
    """The errno (0 if none) and the bytes that the kernel took.

    The block devices `claim` are claimed meanwhile. One that cannot be opened by anybody (it has no
    node, no medium) is nobody's to mount either; where it is this process that can open no more,
    nothing is written.
    """
    held = []
    try:
        for node in claim:
            flags = os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                held.append(os.open(node, flags))
            except OSError as error:
                if error.errno == errno.EBUSY:
                    return 0, _CLAIMED
                if error.errno in _OPENS_NO_MORE:
                    return error.errno, 0
        return _write(path, data)
    finally:
        for descriptor in held:
            os.close(descriptor)


def _write(path: str, data: bytes) -> tuple[int, int]:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO, 0
    try:
        return 0, os.write(descriptor, data)
    except OSError as error:
        return error.errno or errno.EIO, 0
    finally:
        os.close(descriptor)


def leave_parent(*keep: int) -> None:
    """In a child: hold nothing of the parent's (locks, pipes, terminal) but descriptors `keep`."""
    os.setsid()
    os.chdir("/")
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    first = 0
    for descriptor in sorted(keep):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, 1 << 16)


# Children of this process that were left behind; what they wait for may end long afterwards.
_left: set[int] = set()


def abandon(child: int) -> None:
    """Reap the child if it ends at once; otherwise leave it: a signal could not free it anyway.

    A child that ends later is reaped when the next one is abandoned, so that none stays a zombie.
    """
    for earlier in list(_left):
        if _has_ended(earlier):
            _left.discard(earlier)
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        if _has_ended(child):
            return
        time.sleep(0.0005)
    _left.add(child)


def _has_ended(child: int) -> bool:
    """Whether the child has ended and is reaped; what is no child of this process has ended."""
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True
