"""Servers that answer wrongly, late, half or never: the client says which device and what, in time,
and holds nothing of them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.models.served import open_files
from vfiotool.errors import KernelError, TimedOut, UsageError, VfiotoolError
from vfiotool.models import ModelServer
from vfiotool.models.edu import EduModel
from vfiotool.vfio import Device, UserCommand, UserMessage, user_connect, user_message

# What a server does with a command: bytes are sent, None is the honest answer, b"" none at all.
Answer = Callable[[socket.socket, UserMessage], bytes | None]
LIMIT_S = 0.3
REPLY, ERROR = user_message.REPLY, user_message.ERROR


def reply(message: UserMessage, payload: bytes = b"", flags: int = REPLY, number: int = 0) -> bytes:
    return user_message.format_message(message.number, message.command, flags, payload, number)


def honest(message: UserMessage) -> bytes:
    """What the server of a card with one BAR of 4096 bytes says."""
    payload = b""
    if message.command == UserCommand.VERSION:
        payload = user_message.format_version(user_message.UserCapabilities())
    elif message.command == UserCommand.DEVICE_GET_INFO:
        payload = user_message.DEVICE_INFO.pack(16, 3, 9, 5)
    elif message.command == UserCommand.DEVICE_GET_REGION_INFO:
        index = message.unpack(user_message.REGION_INFO)[2]
        size = 4096 if index in (0, 7) else 0
        payload = user_message.format_region(index, 3 * bool(size), size, (), 4096)
    elif message.command == UserCommand.DEVICE_GET_IRQ_INFO:
        index = message.unpack(user_message.IRQ_INFO)[2]
        payload = user_message.IRQ_INFO.pack(16, 1, index, 4 * (index == 1))
    elif message.command == UserCommand.REGION_READ:
        payload = message.payload + bytes(message.unpack(user_message.REGION_ACCESS)[2])
    return reply(message, payload)


class Liar:
    """A server that gives `command` the `answer`, and is honest otherwise."""

    def __init__(self, path: str, command: int, answer: Answer) -> None:
        self.path, self._command, self._answer = path, command, answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, EOFError, VfiotoolError):
            connection, _ = self._listener.accept()
            with connection:
                while True:
                    message = user_message.receive(connection)
                    message.close()
                    given = None
                    if message.command == self._command:
                        given = self._answer(connection, message)
                    connection.sendall(honest(message) if given is None else given)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@contextmanager
def lying(command: int, answer: Answer) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        server = Liar(f"{folder}/s", command, answer)
        try:
            yield f"vfio-user:{server.path}"
        finally:
            server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_connect, "_LIMIT_S", LIMIT_S)


def use(name: str) -> None:
    """All kinds of commands that a driver gives."""
    with Device.open(name) as device:
        device.irqs.msi(1)
        device.region(0).read32(0)
        with device.dma.alloc(4096):
            pass
        device.reset()


def other_number(_: socket.socket, message: UserMessage) -> bytes:
    return user_message.format_message(message.number ^ 0x8000, message.command, REPLY, b"")


def version(text: bytes, major: int = 0) -> Answer:
    return lambda _, message: reply(message, struct.pack("=HH", major, 1) + text + b"\0")


def fails(number: int) -> Answer:
    return lambda _, message: reply(message, b"", REPLY | ERROR, number)


def says(payload: bytes) -> Answer:
    return lambda _, message: reply(message, payload)


def test_an_honest_server_of_this_test_is_driven() -> None:
    with lying(0, fails(0)) as name:
        use(name)


C = UserCommand
TWIN = b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}'


@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        (C.VERSION, says(b"\xff" * 50), "speaks version 65535|not JSON"),
        (C.VERSION, says(b""), "VERSION with 0 bytes"),
        (C.VERSION, version(b"{}", 7), "version 7"),
        (C.VERSION, version(TWIN), "second socket"),
        (C.VERSION, fails(errno.EINVAL), "agree with .* on a version"),
        (C.DEVICE_GET_INFO, says(b"\0" * 4), "DEVICE_GET_INFO with 4 bytes, not 16"),
        (C.DEVICE_GET_INFO, lambda _, m: reply(m)[:2] + b"\5\0" + reply(m)[4:],
         "DEVICE_GET_INFO was answered as DEVICE_GET_REGION_INFO"),
        (C.DEVICE_GET_REGION_INFO, says(user_message.REGION_INFO.pack(32, 3, 7, 0, 1 << 63, 0)),
         "region 7 of 9223372036854775808 bytes"),
        (C.DEVICE_GET_REGION_INFO, fails(errno.EIO), "EIO"),
        (C.DEVICE_GET_REGION_INFO, fails(0), "EIO"),
        (C.DEVICE_GET_REGION_INFO, fails(0xFFFFFFF0), "EIO"),
        (C.REGION_READ, lambda _, m: reply(m, m.payload + b"a" * 5000), "5000 bytes came"),
        (C.REGION_READ, lambda _, m: struct.pack("=HHIII", m.number, m.command, 1 << 31, 1, 0),
         "a message of 2147483648 bytes"),
        (C.DMA_MAP, fails(errno.ENOMEM), "ENOMEM"),
        (C.DEVICE_RESET, fails(errno.EIO), "reset .*EIO"),
    ],
)  # fmt: skip
def test_what_a_server_says_wrongly_is_one_error(command: int, answer: Answer, said: str) -> None:
    before = open_files()
    with lying(command, answer) as name, pytest.raises(VfiotoolError, match=said) as caught:
        use(name)
    if command != UserCommand.DMA_MAP:  # that concerns memory that several devices may share
        assert "vfio-user:" in caught.value.message
    assert open_files() == before


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_second_socket_that_is_none_is_refused_and_closed(kind: str, tmp_path: Path) -> None:
    def answer(connection: socket.socket, message: UserMessage) -> bytes:
        given, other = os.pipe() if kind == "pipe" else (os.open(tmp_path, os.O_RDONLY),) * 2
        text = reply(message, struct.pack("=HH", 0, 1) + TWIN + b"\0")
        socket.send_fds(connection, [text], [given])
        for descriptor in {given, other}:
            os.close(descriptor)
        return b""

    before = open_files()
    with (
        lying(UserCommand.VERSION, answer) as name,
        pytest.raises(VfiotoolError, match="offers a second socket, and it is none"),
    ):
        use(name)
    assert open_files() == before


@pytest.mark.parametrize(
    "command",
    [
        C.VERSION, C.DEVICE_GET_INFO, C.DEVICE_GET_REGION_INFO, C.DEVICE_GET_IRQ_INFO,
        C.REGION_READ, C.DEVICE_SET_IRQS, C.DMA_MAP, C.DMA_UNMAP, C.DEVICE_RESET,
    ],
)  # fmt: skip
def test_a_command_without_an_answer_ends_in_time_and_is_named(command: UserCommand) -> None:
    before, begun = open_files(), time.monotonic()
    with (
        lying(command, lambda *_: b"") as name,
        pytest.raises(TimedOut, match=f"vfio-user:.*: no reply to {command.name} in 0.3 s") as told,
    ):
        use(name)
    assert told.value.hint is not None and "one client at a time" in told.value.hint
    assert time.monotonic() - begun < 10 * LIMIT_S + 5
    if command != C.DMA_UNMAP:  # memory that a device may still have is kept
        assert open_files() == before


def flood(piece: Callable[[UserMessage], bytes], pause: threading.Event) -> Answer:
    """Never the answer, but something all the time."""

    def answer(connection: socket.socket, message: UserMessage) -> bytes:
        with contextlib.suppress(OSError):
            while not pause.is_set():
                connection.sendall(piece(message))
                pause.wait(0.01)
        return b""

    return answer


@pytest.mark.parametrize("kind", ["replies", "commands", "bytes"])
def test_what_comes_instead_of_the_answer_does_not_put_it_off(kind: str) -> None:
    ended = threading.Event()
    begun = [struct.pack("=HHIII", 7, UserCommand.DEVICE_GET_INFO, 1 << 20, REPLY, 0)]
    pieces: dict[str, Callable[[UserMessage], bytes]] = {
        "replies": lambda message: other_number(None, message),  # type: ignore[arg-type]
        "commands": lambda message: user_message.format_message(
            3, UserCommand.DMA_READ, 0, user_message.DMA_ACCESS.pack(0, 4)
        ),
        # Of one message that is never whole.
        "bytes": lambda message: begun.pop() if begun else b"\0",
    }
    started = time.monotonic()
    with lying(UserCommand.DEVICE_GET_INFO, flood(pieces[kind], ended)) as name:
        try:
            with pytest.raises(KernelError, match=r"no reply to DEVICE_GET_INFO|in time"):
                use(name)
        finally:
            ended.set()
    assert time.monotonic() - started < 10 * LIMIT_S + 5


def test_commands_that_nobody_answers_do_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(user_connect, "_LIMIT_S", 60.0)
    piece = user_message.format_message(3, UserCommand.DMA_READ, 0, bytes(1 << 20))
    sent: list[int] = []

    def answer(connection: socket.socket, _: UserMessage) -> bytes:
        with contextlib.suppress(OSError):
            while len(sent) < 200:
                connection.sendall(piece)
                sent.append(1)
        return b""

    with (
        lying(UserCommand.DEVICE_GET_INFO, answer) as name,
        pytest.raises(KernelError, match="commands come faster than they are answered"),
    ):
        use(name)
    assert len(sent) < 30


def test_closing_a_device_that_does_not_answer_ends_however_much_is_to_be_given_back() -> None:
    model = EduModel()
    with tempfile.TemporaryDirectory() as folder, ModelServer(model, f"{folder}/s") as server:
        device = Device.open(server.name)
        for _ in range(30):
            device.dma.alloc(4096)
        model.faults.mute = True
        begun = time.monotonic()
        with pytest.raises(KernelError):
            device.close()
        assert time.monotonic() - begun < 20 * LIMIT_S


def test_a_server_with_a_full_line_is_waited_for_with_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(user_connect, "_CONNECT_S", 1)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(f"{folder}/s")
            with pytest.raises(TimedOut, match="not let in within 1 s"):
                Device.open(f"vfio-user:{folder}/s")
            # Who would serve there finds out that somebody does.
            model = EduModel()
            with pytest.raises(KernelError, match="it is served already"):
                ModelServer(model, f"{folder}/s")
            model.close()


def test_what_is_no_socket_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a socket"):
        Device.open(f"vfio-user:{tmp_path}")
    with pytest.raises(UsageError, match="at most 107 bytes"):
        Device.open(f"vfio-user:/{'a' * 120}")
