"""The demonstration: a guest with everything in it, and the scenes played there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vfiotool.lab.channel import Kind
from vfiotool.lab.guest import Guest
from vfiotool.lab.inside import scenes

MACHINE = "full"
LIMIT_S = 1800.0


def main(kernel: str) -> int:
    """Boot the demonstration's guest, play the scenes; 0 if all of them passed, 1 if not.

    Raises what `Guest` raises when there can be no guest.
    """
    guest = Guest(MACHINE, kernel)
    for note in guest.kernel.notes:
        print(f"The kernel {guest.kernel.name} comes with {note}", flush=True)
    print(f"A guest boots: {guest.describe()}", flush=True)
    command = [str(Path(sys.prefix) / "bin/python"), "-m", scenes.__name__]
    with guest:
        if not sys.stdout.isatty():
            return guest.exec(command, timeout_s=LIMIT_S, merge=True, sink=_print).exit_code
        size = os.get_terminal_size(sys.stdout.fileno())
        return guest.exec(
            command, timeout_s=LIMIT_S, sink=_print, terminal=(size.lines, size.columns)
        ).exit_code


def _print(_kind: Kind, data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
