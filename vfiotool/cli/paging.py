"""Long output on a terminal goes through `less`, as git's and systemd's does.

Nothing is started for what fits on the screen: output is held until it does not.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen

_LESS = ("/usr/bin/less", "/bin/less")


class _Screen:
    """What is held back until it is longer than the screen; then a pager's input."""

    def __init__(self, command: list[str], lines: int) -> None:
        self.command = command
        self.lines = lines
        self.held: list[str] = []
        self.count = 0
        self.pager: Popen[str] | None = None

    def write(self, text: str) -> None:
        if self.pager is None:
            self.held.append(text)
            self.count += text.count("\n")
            if self.count < self.lines or not self._start():
                return
            text, self.held = "".join(self.held), []
        if self.pager is not None and self.pager.stdin is not None:
            self.pager.stdin.write(text)

    def _start(self) -> bool:
        from subprocess import PIPE, Popen

        # LESSSECURE: no shell and no editor out of the pager of somebody who may run vfiotool only.
        environment = {**os.environ, "LESS": "FRSX", "LESSSECURE": "1", "LESSCHARSET": "utf-8"}
        try:
            self.pager = Popen(
                self.command, stdin=PIPE, env=environment, encoding="utf-8", errors="replace"
            )
        except OSError:
            self.count = -sys.maxsize
            return False
        return True

    def end(self) -> None:
        """Write what was held, or wait until the reader has left the pager."""
        if self.pager is None:
            sys.stdout.write("".join(self.held))
            sys.stdout.flush()
            return
        try:
            if self.pager.stdin is not None:
                self.pager.stdin.close()
        except BrokenPipeError:
            pass
        while True:
            try:
                self.pager.wait()
                return
            except KeyboardInterrupt:
                continue


_screen: _Screen | None = None


def begin() -> None:
    """Page what is printed from here on, if standard output is a terminal that can."""
    global _screen
    command = _command()
    if command is not None and sys.stdin.isatty() and sys.stdout.isatty():
        _screen = _Screen(command, os.get_terminal_size(sys.stdout.fileno()).lines - 1)


def target() -> Callable[[str], None] | None:
    """Where output goes if it is paged."""
    return None if _screen is None else _screen.write


def end() -> None:
    """Show what is left, and wait for the pager."""
    global _screen
    screen, _screen = _screen, None
    if screen is not None:
        screen.end()


def _command() -> list[str] | None:
    """`less`, or what PAGER names; root does not run what its caller's environment names."""
    wanted = os.environ.get("PAGER")
    if wanted in ("", "cat") or os.environ.get("TERM", "dumb") == "dumb":
        return None
    if wanted is not None and os.geteuid() != 0:
        from shlex import split

        return split(wanted)
    return next(([path] for path in _LESS if os.access(path, os.X_OK)), None)
