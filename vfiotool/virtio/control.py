"""The control socket of a server: JSON objects, one a line, from users who may change it.

Whoever connects asks one thing at a time and gets one object back. Nothing here waits for a peer:
what does not come whole, or is not taken, ends its connection. Only the server's own user and root
are answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from vfiotool.errors import (
    KernelError,
    NotPermitted,
    Refused,
    UsageError,
    VfiotoolError,
    described,
    from_oserror,
)
from vfiotool.virtio.folders import runtime_folder
from vfiotool.virtio.listener import Spare, listen, unlink_socket

_LARGEST = 1 << 16
_MOST_CLIENTS = 16
_ANSWER_S = 10.0
_CREDENTIALS = struct.Struct("3i")

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def control_folder() -> str | None:
    """Where control sockets are by default; None without a runtime folder."""
    folder = runtime_folder()
    return None if folder is None else f"{folder}/serve"


def control_path(file: str) -> str | None:
    """The control socket of the server of an exports file, unless it is told another."""
    folder = control_folder()
    if folder is None:
        return None
    real = os.path.realpath(file)
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(real).stem)[:32]
    return f"{folder}/{name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}.sock"


class Watcher(Protocol):
    """A loop that calls back when a socket has something to read: a server's, a VDUSE device's."""

    def watch(self, source: socket.socket, action: Callable[[], None]) -> None:
        """Call `action` whenever the socket can be read."""

    def unwatch(self, source: socket.socket) -> None:
        """Do so no more."""


class Control:
    """The control socket of a running server. `requests` is what can be asked.

    `take_over` gets the connection that asks for it, for itself.
    """

    def __init__(
        self,
        server: Watcher,
        requests: dict[str, Answer],
        take_over: Callable[[socket.socket], None],
        *,
        path: str,
        listener: socket.socket | None = None,
    ) -> None:
        self._server = server
        self._requests = requests
        self._take_over = take_over
        self.path = path
        self.listener = listen_private(path) if listener is None else listener
        self.listener.setblocking(False)
        self._clients: dict[socket.socket, bytes] = {}
        self._spare = Spare()
        server.watch(self.listener, self._accept)

    def close(self, *, unlink: bool = True) -> None:
        """Answer nobody any more; the socket stays for a process that took over."""
        self._server.unwatch(self.listener)
        self.listener.close()
        for client in list(self._clients):
            self._drop(client)
        self._spare.close()
        if unlink:
            unlink_socket(self.path)

    def _accept(self) -> None:
        # Whoever asks sees that it is not answered.
        with suppress(OSError, Refused):
            client = self._spare.accept(self.listener)
            if client is None:
                return
            if len(self._clients) >= _MOST_CLIENTS or not _is_ours(client):
                client.close()
                return
            client.setblocking(False)
            self._clients[client] = b""
            self._server.watch(client, lambda: self._read(client))

    def _drop(self, client: socket.socket) -> None:
        if self._clients.pop(client, None) is not None:
            self._server.unwatch(client)
            client.close()

    def _read(self, client: socket.socket) -> None:
        if client not in self._clients:
            return
        try:
            data = client.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        text = self._clients[client] + data
        if not data or len(text) > _LARGEST:
            self._drop(client)
            return
        line, end, rest = text.partition(b"\n")
        self._clients[client] = text if not end else rest
        if end:
            self._answer(client, line)

    def _answer(self, client: socket.socket, line: bytes) -> None:
        try:
            asked = json.loads(line)
            if not isinstance(asked, dict) or not isinstance(asked.get("ask"), str):
                raise UsageError("a request is an object with a key 'ask'")
            if asked["ask"] == "take-over":
                self._clients.pop(client)
                self._server.unwatch(client)
                self._take_over(client)
                return
            if asked["ask"] not in self._requests:
                raise UsageError(f"{asked['ask'][:40]!r} cannot be asked")
            answer = self._requests[asked["ask"]](asked)
        except VfiotoolError as error:
            answer = {"error": error.message}
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            answer = {"error": f"not a request: {error}"[:200]}
        except Exception as error:
            # A fault of ours, which is told to who met it; the disks are served on.
            answer = {"error": described(error)}
        with suppress(OSError):
            data = json.dumps(answer).encode() + b"\n"
            client.setblocking(True)
            client.settimeout(1.0)
            client.sendall(data)
            client.setblocking(False)
            return
        self._drop(client)


def listen_private(path: str) -> socket.socket:
    """A listening socket that its user alone may connect to, in a folder made for it."""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
    except OSError as error:
        raise from_oserror(f"make {folder}", error) from error
    return listen(path, private=True)


def _is_ours(client: socket.socket) -> bool:
    data = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(data)[1] in (0, os.geteuid())


def connect(path: str) -> socket.socket:
    """A connection to a server's control socket. Raises NotPermitted or KernelError."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(_ANSWER_S)
        client.connect(path)
    except OSError as error:
        client.close()
        raise from_oserror(f"connect to {path}", error) from error
    if not _is_ours(client):
        client.close()
        raise NotPermitted(f"{path} is served by another user")
    return client


def ask(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """One request to a server and its answer. Raises what `connect` does, UsageError for what the
    server says is wrong, KernelError if it does not answer."""
    with connect(path) as client:
        try:
            client.sendall(json.dumps(request).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                piece = client.recv(1 << 16)
                if not piece:
                    raise KernelError(f"{path}: the server ended the connection")
                data += piece
            answer = json.loads(data)
        except (OSError, ValueError) as error:
            if isinstance(error, VfiotoolError):
                raise
            raise KernelError(f"{path}: no answer: {error}") from error
    if "error" in answer:
        raise UsageError(f"{path}: {answer['error']}")
    return dict(answer)
