"""One end of a vfio-user connection: commands sent and answered, by any thread.

Whoever waits for a reply reads the socket, if nobody else does, and hands what is not his to
whom it belongs: so a call of one thread never waits for a thread that waits for something else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence

from vfiotool.errors import KernelError, TimedOut, VfiotoolError
from vfiotool.vfio.user_message import (
    ERROR,
    NO_REPLY,
    REPLY,
    UserMessage,
    UserProtocolError,
    called,
    format_message,
    receive,
)

# Seconds for a peer that did not answer before, and how many calls in a row it may leave open.
_AGAIN_S, _MOST_SILENT = 1.0, 5
# What commands that wait to be answered may take, in bytes: their payloads, and some room for each
# and for each of their descriptors.
_MOST_HELD, _ROOM = 16 << 20, 4096


class UserFailure(VfiotoolError):
    """A command was answered with an error; `number` is its errno, or 0."""

    def __init__(self, command: int, number: int) -> None:
        super().__init__(f"{called(command)} was answered with errno {number}")
        self.number = number


def _cost(message: UserMessage) -> int:
    return _ROOM * (1 + 16 * len(message.descriptors)) + len(message.payload)


class UserChannel:
    """A connected socket, which it owns. `limit_s` bounds each wait for the peer: for a reply, for
    the rest of a message, and for room to send. After a call without reply the next ones wait a
    second at most until the peer says something, and the fifth in a row ends the connection: who
    closes a device asks much of it. `name` is what errors call the peer; `hint` is what they say
    of one that does not reply."""

    def __init__(
        self,
        connection: socket.socket,
        limit_s: float = 10.0,
        *,
        name: str = "",
        hint: str | None = None,
    ) -> None:
        self._name = f"{name}: " if name else ""
        self._hint = hint
        connection.setblocking(True)
        self._connection = connection
        self._sending = threading.Lock()
        # The lock is taken by itself, in C alone: an interrupt (Ctrl-C) between a condition's own
        # methods could leave it with nobody.
        self._lock = threading.Lock()
        self._state = threading.Condition(self._lock)
        self._reading = False
        self._waiting: dict[int, UserMessage | None] = {}
        self._commands: deque[UserMessage] = deque()
        self._held = 0
        self._next = 0
        self.failure: VfiotoolError | None = None
        self.set_limit(limit_s)

    def set_limit(self, limit_s: float) -> None:
        """Bound waits from now on."""
        self.limit_s = limit_s
        self._bound(socket.SO_SNDTIMEO, limit_s)
        self._set_silent(0)

    def _set_silent(self, calls: int) -> None:
        self._silent_calls = calls
        self._patience_s = min(self.limit_s, _AGAIN_S) if calls else self.limit_s
        self._bound(socket.SO_RCVTIMEO, self._patience_s)

    def _bound(self, option: int, limit_s: float) -> None:
        whole = int(limit_s)
        limit = struct.pack("@ll", whole, max(int((limit_s - whole) * 1e6), 0 if whole else 1))
        # Another thread may have closed it.
        with contextlib.suppress(OSError):
            self._connection.setsockopt(socket.SOL_SOCKET, option, limit)

    @property
    def number(self) -> int:
        """The socket's descriptor, for looking only."""
        return self._connection.fileno()

    def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        with self._sending:
            if self.failure is not None:
                raise self._gone()
            try:
                if descriptors:
                    sent = socket.send_fds(self._connection, [data], list(descriptors))
                else:
                    sent = self._connection.send(data)
                while sent < len(data):
                    sent += self._connection.send(data[sent:])
            except OSError as error:
                # Half a message may be out: nothing can follow it.
                raise self._end(f"send to the peer: {error.strerror}") from error

    def _end(self, reason: str) -> VfiotoolError:
        with self._lock:
            if self.failure is None:
                self.failure = KernelError(
                    f"{self._name}the vfio-user connection has ended: {reason}",
                    errno_name="ECONNRESET",
                )
            self._state.notify_all()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        return self._gone()

    def _gone(self) -> VfiotoolError:
        assert self.failure is not None
        return KernelError(str(self.failure), errno_name="ECONNRESET")

    def call(
        self, command: int, payload: bytes = b"", descriptors: Sequence[int] = ()
    ) -> UserMessage:
        """Send a command and wait for its reply, whose descriptors are the caller's.

        Raises UserFailure for an error of the peer's, TimedOut, and KernelError (ECONNRESET) once
        the connection has ended.
        """
        with self._lock:
            number = self._next
            while number in self._waiting:
                number = number + 1 & 0xFFFF
            self._next = number + 1 & 0xFFFF
            self._waiting[number] = None
        try:
            deadline = time.monotonic() + self._patience_s
            self._send(format_message(number, command, 0, payload), descriptors)
            reply = self._await(number, command, deadline)
        finally:
            with self._lock:
                late = self._waiting.pop(number, None)
        if late is not None and late is not reply:
            late.close()
        if reply.failed or reply.command != command:
            reply.close()
            if reply.command != command:
                raise self._end(f"{called(command)} was answered as {called(reply.command)}")
            raise UserFailure(command, reply.error)
        return reply

    def _await(self, number: int, command: int, deadline: float) -> UserMessage:
        # Other messages that come meanwhile do not put the deadline off.
        while True:
            late = False
            with self._lock:
                while True:
                    reply = self._waiting[number]
                    if reply is not None:
                        return reply
                    if self.failure is not None:
                        raise self._gone()
                    if late:
                        break
                    if not self._reading:
                        self._reading = True
                        break
                    self._state.wait(max(deadline - time.monotonic(), 0))
                    late = time.monotonic() >= deadline
            if late or not self._read() or time.monotonic() >= deadline:
                # It may have come at the last moment.
                with self._lock:
                    reply = self._waiting[number]
                if reply is not None:
                    return reply
                if self.failure is not None:
                    raise self._gone()
                raise self._silent(command)

    def _silent(self, command: int) -> TimedOut:
        limit_s = self._patience_s
        self._set_silent(self._silent_calls + 1)
        said = f"{self._name}no reply to {called(command)} in {limit_s:g} s"
        if self._silent_calls >= _MOST_SILENT:
            self._end(f"{_MOST_SILENT} commands in a row were not answered")
        return TimedOut(said, hint=self._hint, errno_name="ETIMEDOUT")

    def _read(self) -> bool:
        """Take one message off the socket, as the only reader; False when none came in time."""
        message: UserMessage | None = None
        try:
            message = receive(self._connection, self.limit_s)
        except BlockingIOError:
            return False
        except EOFError:
            self._end("the peer has closed it")
        except (OSError, UserProtocolError) as error:
            self._end(str(error))
        finally:
            with self._lock:
                self._reading = False
                if message is not None:
                    message.sender = self._name
                    self._deliver(message)
                self._state.notify_all()
        if self._held > _MOST_HELD:
            self._end("commands come faster than they are answered")
        return True

    def _deliver(self, message: UserMessage) -> None:
        if self._silent_calls:
            self._set_silent(0)
        if not message.is_reply:
            self._commands.append(message)
            self._held += _cost(message)
        elif message.number in self._waiting and self._waiting[message.number] is None:
            self._waiting[message.number] = message
        else:
            # Nobody waits for it any more, or nobody ever did.
            message.close()

    def next_command(self) -> UserMessage:
        """The next command of the peer's, without a limit of time. Raises KernelError
        (ECONNRESET) once the connection has ended."""
        while True:
            with self._lock:
                while True:
                    if self._commands:
                        message = self._commands.popleft()
                        self._held -= _cost(message)
                        return message
                    if self.failure is not None:
                        raise self._gone()
                    if not self._reading:
                        self._reading = True
                        break
                    self._state.wait(self.limit_s)
            self._read()

    def reply(
        self, message: UserMessage, payload: bytes = b"", descriptors: Sequence[int] = ()
    ) -> None:
        """Answer a command, unless it wants no reply."""
        if not message.flags & NO_REPLY:
            data = format_message(message.number, message.command, REPLY, payload)
            self._send(data, descriptors)

    def fail(self, message: UserMessage, number: int) -> None:
        """Answer a command with an errno."""
        if not message.flags & NO_REPLY:
            data = format_message(message.number, message.command, REPLY | ERROR, b"", number)
            self._send(data, ())

    def end(self, reason: str) -> None:
        """End the connection: every call under way and to come fails. `close` must follow."""
        self._end(reason)

    def close(self) -> None:
        """End the connection and close its socket and the descriptors of what nobody took."""
        self._end("it was closed here")
        with self._lock:
            # Whoever reads is woken by the shutdown; the number is closed when he has left.
            while self._reading:
                self._state.wait(0.05)
            while self._commands:
                self._commands.popleft().close()
        self._connection.close()

    def abandon(self) -> None:
        """In a child of the process that opened it: let go of the descriptor."""
        with contextlib.suppress(OSError):
            os.close(self._connection.detach())
