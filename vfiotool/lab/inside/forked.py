"""Commands of vfiotool, and other programs in Python, in forks of one process, which has imported
what they need.

In a guest that is emulated a command's imports take it longer than its work.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import runpy
import select
import subprocess
import sys
import traceback
from typing import BinaryIO

# Whose help imports what the commands of a rehearsal need.
_NEEDED = (("plan",), ("undo",), ("recover",), ("vm", "check"))
COMMAND_LINE, _LIBRARY = "vfiotool", "vfiotool.vfio"
_INTERNAL = 70


class ForkedCommand:
    """`python -m MODULE WORDS` with its output in two files: of Popen's interface what is used
    here. It is in a session of its own."""

    def __init__(
        self, words: list[str], out: BinaryIO, error: BinaryIO, module: str = COMMAND_LINE
    ) -> None:
        _import_once()
        self.args = words
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _become(module, words, out, error)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        if self.poll() is None:
            end = os.pidfd_open(self.pid)
            try:
                select.select([end], [], [], timeout)
            finally:
                os.close(end)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def kill(self) -> None:
        """Kill it, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, 9)


@functools.cache
def _import_once() -> None:
    own = sys.argv
    importlib.import_module(_LIBRARY)
    for words in _NEEDED:
        with (
            open(os.devnull, "w", encoding="utf-8") as nothing,
            contextlib.redirect_stdout(nothing),
            contextlib.suppress(SystemExit),
        ):
            sys.argv = [COMMAND_LINE, *words, "--help"]
            runpy.run_module(COMMAND_LINE, run_name="__main__")
    sys.argv = own


def _become(module: str, words: list[str], out: BinaryIO, error: BinaryIO) -> None:
    """The command, in a fork; it does not come back."""
    code = _INTERNAL
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, out.fileno(), error.fileno())):
            os.dup2(file, number)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
