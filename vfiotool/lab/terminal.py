"""A command in a guest on this terminal: raw mode, its size, and back to what it was."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import struct
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from types import FrameType

from vfiotool.errors import NotFound
from vfiotool.lab.channel import ChannelClosed, Kind
from vfiotool.lab.guest import Guest

NUMBER = 1


def attach(guest: Guest, command: Sequence[str]) -> int:
    """Run `command` in the guest on this process's terminal; returns its exit code.

    Raises GuestLost when the guest ends first and NotFound when there is no such program.
    """
    channel = guest.channel
    size = os.get_terminal_size(sys.stdout.fileno())
    environment = {**guest.environment(), "PS1": "lab \\w # "}
    channel.run(
        NUMBER,
        command,
        cwd=str(guest.cwd),
        env=environment,
        merge=True,
        terminal=(size.lines, size.columns),
    )

    def resized(_number: int, _frame: FrameType | None) -> None:
        now = os.get_terminal_size(sys.stdout.fileno())
        channel.resize(NUMBER, now.lines, now.columns)

    try:
        with raw_terminal(sys.stdin.fileno()), on_resize(resized):
            return _pump(guest, command)
    except ChannelClosed:
        raise guest.lost("ended while the shell was open") from None


def _pump(guest: Guest, command: Sequence[str]) -> int:
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(stdin, selectors.EVENT_READ)
        selector.register(guest.channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == stdin:
                    guest.channel.input(NUMBER, os.read(stdin, 4096))
                    continue
                while True:
                    frame = guest.channel.receive(None)
                    assert frame is not None
                    kind, _number, payload = frame
                    if kind is Kind.OUTPUT:
                        os.write(stdout, payload)
                    elif kind is Kind.REFUSED:
                        raise NotFound(f"the guest cannot run {command[0]}: {payload.decode()}")
                    elif kind is Kind.EXIT:
                        code = int(struct.unpack("<i", payload)[0])
                        return 128 - code if code < 0 else code
                    if not guest.channel.buffered():
                        break


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Pass every key through, Ctrl-C too; the terminal's settings come back afterwards."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def on_resize(handler: object) -> Iterator[None]:
    before = signal.signal(signal.SIGWINCH, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
