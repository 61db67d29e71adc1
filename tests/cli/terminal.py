"""A command on a terminal of its own: a pseudo-terminal, as wide and high as wanted."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence


def on_terminal(
    *arguments: str,
    columns: int = 80,
    lines: int = 24,
    env: Mapping[str, str] | None = None,
    typed: bytes = b"",
    timeout_s: float = 60.0,
    program: Sequence[str] = ("-m", "vfiotool"),
) -> tuple[int, str]:
    """The exit code and all that appears on the terminal; `typed` is typed once it has begun."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    # The size is the terminal's; a worker of pytest-xdist has COLUMNS set.
    mine = ("NO_COLOR", "PAGER", "COLUMNS", "LINES")
    kept = {key: value for key, value in os.environ.items() if key not in mine}
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**kept, "TERM": "xterm", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", **(env or {})},
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    try:
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            seen += piece
            if typed:
                os.write(master, typed)
                typed = b""
        return process.wait(timeout_s), seen.decode("utf-8", "replace").replace("\r\n", "\n")
    finally:
        process.kill()
        process.wait()
        os.close(master)
