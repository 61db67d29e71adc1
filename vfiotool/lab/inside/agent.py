"""The lab's process in the guest: runs commands for the host over a virtio-serial port.

Started by guest-second.sh with the host's interpreter and the standard library alone; it is never
imported by vfiotool. Frames both ways: length of the payload (u32), kind (u8), command (u32),
little endian, then the payload. `vfiotool.lab.channel` is the other end and says what each means.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import selectors
import signal
import struct
import sys
import termios
from typing import Any

HEADER = struct.Struct("<IBI")
RUN, INPUT, CLOSE_INPUT, SIGNAL, RESIZE = 1, 2, 3, 4, 5
HELLO, OUTPUT, ERROR, EXIT, REFUSED = 65, 66, 67, 68, 69
CHUNK = 65536


class Command:
    """One child: its process, and what is still open of its streams."""

    def __init__(self, number: int, pid: int, stdin: int) -> None:
        self.number = number
        self.pid = pid
        self.stdin = stdin
        self.pending = bytearray()
        self.close_when_empty = False
        self.outputs: set[int] = set()
        self.status: int | None = None


class Agent:
    def __init__(self, port: int) -> None:
        self.port = port
        self.received = bytearray()
        self.selector = selectors.DefaultSelector()
        self.commands: dict[int, Command] = {}
        self.later: set[Command] = set()
        self.waker, waking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waking)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        data = memoryview(HEADER.pack(len(payload), kind, number) + payload)
        while data:
            data = data[os.write(self.port, data) :]

    def serve(self) -> None:
        self.selector.register(self.port, selectors.EVENT_READ, self.read_port)
        self.selector.register(self.waker, selectors.EVENT_READ, self.reap)
        self.send(HELLO, 0, json.dumps({"release": os.uname().release}).encode())
        while True:
            for key, _ in self.selector.select():
                # An earlier handler of this round may have closed this one's descriptor.
                if self.selector.get_map().get(key.fd) is key:
                    key.data(key.fd)
            for command in list(self.later):
                self.finish(command)

    def read_port(self, fd: int) -> None:
        data = os.read(fd, CHUNK)
        if not data:
            sys.exit("the host closed the channel")
        self.received += data
        while len(self.received) >= HEADER.size:
            length, kind, number = HEADER.unpack_from(self.received)
            if len(self.received) < HEADER.size + length:
                return
            payload = bytes(self.received[HEADER.size : HEADER.size + length])
            del self.received[: HEADER.size + length]
            self.handle(kind, number, payload)

    def handle(self, kind: int, number: int, payload: bytes) -> None:
        if kind == RUN:
            try:
                self.run(number, json.loads(payload))
            except OSError as error:
                self.send(REFUSED, number, f"{error.strerror}: {error.filename}".encode())
            return
        command = self.commands.get(number)
        if command is None:
            return
        if kind == INPUT:
            command.pending += payload
            self.feed(command)
        elif kind == CLOSE_INPUT:
            command.close_when_empty = True
            self.feed(command)
        elif kind == SIGNAL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, struct.unpack("<I", payload)[0])
        elif kind == RESIZE and command.stdin >= 0:
            fcntl.ioctl(command.stdin, termios.TIOCSWINSZ, payload)

    def run(self, number: int, request: dict[str, Any]) -> None:
        if request["terminal"]:
            self.run_in_terminal(number, request)
            return
        stdin, child_stdin = reversed(os.pipe2(os.O_CLOEXEC))
        outputs = [os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)]
        if request["merge"]:
            os.dup2(outputs[0][1], outputs[1][1], inheritable=False)
        try:
            pid = self.spawn(request, [child_stdin, outputs[0][1], outputs[1][1]])
        except OSError:
            for fd in (stdin, outputs[0][0], outputs[1][0]):
                os.close(fd)
            raise
        finally:
            for fd in (child_stdin, outputs[0][1], outputs[1][1]):
                os.close(fd)
        command = self.commands[number] = Command(number, pid, stdin)
        os.set_blocking(stdin, False)
        for kind, (reader, _) in zip((OUTPUT, ERROR), outputs, strict=True):
            self.watch(command, reader, kind)

    def watch(self, command: Command, fd: int, kind: int) -> None:
        command.outputs.add(fd)

        def forward(fd: int) -> None:
            try:
                data = os.read(fd, CHUNK)
            except OSError:  # a terminal whose last user is gone answers EIO
                data = b""
            if data:
                self.send(kind, command.number, data)
            else:
                self.forget(command, fd)
                self.finish(command)

        self.selector.register(fd, selectors.EVENT_READ, forward)

    def forget(self, command: Command, fd: int) -> None:
        self.selector.unregister(fd)
        command.outputs.discard(fd)
        os.close(fd)

    def spawn(self, request: dict[str, Any], streams: list[int]) -> int:
        os.stat(request["cwd"])  # names the missing folder in the refusal
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(streams)]
        here = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.chdir(request["cwd"])
            # posix_spawnp searches the PATH of this process, not that of the child.
            os.environ["PATH"] = request["env"].get("PATH", os.environ.get("PATH", ""))
            return os.posix_spawnp(
                request["argv"][0],
                request["argv"],
                request["env"],
                file_actions=actions,
                setsid=True,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        finally:
            os.fchdir(here)
            os.close(here)

    def run_in_terminal(self, number: int, request: dict[str, Any]) -> None:
        pid, terminal = pty.fork()
        if pid == 0:
            try:
                os.chdir(request["cwd"])
                os.environ["PATH"] = request["env"].get("PATH", "")
                os.execvpe(request["argv"][0], request["argv"], request["env"])
            except OSError as error:
                os.write(2, f"{request['argv'][0]}: {error.strerror}\r\n".encode())
            os._exit(127)
        os.set_inheritable(terminal, False)
        rows, columns = request["terminal"]
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("<4H", rows, columns, 0, 0))
        command = self.commands[number] = Command(number, pid, os.dup(terminal))
        os.set_blocking(command.stdin, False)
        self.watch(command, terminal, OUTPUT)

    def feed(self, command: Command) -> None:
        """Write what the child takes now; the rest when its pipe can take it."""
        if command.stdin < 0:
            return
        try:
            while command.pending:
                del command.pending[: os.write(command.stdin, command.pending)]
        except BlockingIOError:
            pass
        except OSError:  # the child closed its input: what is left has no reader
            command.pending.clear()
            command.close_when_empty = True
        watched = command.stdin in self.selector.get_map()
        if command.pending and not watched:
            self.selector.register(
                command.stdin, selectors.EVENT_WRITE, lambda _fd: self.feed(command)
            )
        elif watched and not command.pending:
            self.selector.unregister(command.stdin)
        if command.close_when_empty and not command.pending:
            self.close_input(command)

    def close_input(self, command: Command) -> None:
        if command.stdin < 0:
            return
        if command.stdin in self.selector.get_map():
            self.selector.unregister(command.stdin)
        os.close(command.stdin)
        command.stdin = -1

    def reap(self, waker: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(waker, 512):
                pass
        for command in list(self.commands.values()):
            if command.status is None:
                with contextlib.suppress(ChildProcessError):
                    pid, status = os.waitpid(command.pid, os.WNOHANG)
                    if pid:
                        command.status = os.waitstatus_to_exitcode(status)
                        self.finish(command)

    def finish(self, command: Command) -> None:
        """Report the end once: the process is gone and what it wrote has been forwarded.

        A daemon that the command left behind may hold the pipes open for ever; so what can be
        read when the process has gone counts as its output, and the streams are dropped then.
        """
        if command.status is None or command.number not in self.commands:
            return
        if command.outputs:
            with selectors.DefaultSelector() as ready:
                for fd in command.outputs:
                    ready.register(fd, selectors.EVENT_READ)
                if ready.select(0):
                    self.later.add(command)
                    return
        for fd in list(command.outputs):
            self.forget(command, fd)
        self.close_input(command)
        self.later.discard(command)
        del self.commands[command.number]
        self.send(EXIT, command.number, struct.pack("<i", command.status))


def main() -> None:
    port = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
    Agent(port).serve()


main()
