"""Record the README's way of a disk to a machine that boots twice, in a guest of the lab.

`python -m tests.record_first_vm` runs the commands of that section on a terminal of the guest and
writes what came, and when, to docs/first-vm.cast (asciinema, version 2:
https://docs.asciinema.org/manual/asciicast/v2/; `asciinema play docs/first-vm.cast`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.lab import tour
from vfiotool.lab.channel import Kind
from vfiotool.lab.guest import Guest

ROOT = Path(__file__).resolve().parent.parent
CAST = ROOT / "docs" / "first-vm.cast"
SECTION = "A disk for a virtual machine"
ROWS, COLUMNS = 40, 100
KEY_S = 0.04
PAUSE_S = 1.0
# As a shell of the guest shows itself.
PROMPT = "\x1b[1mroot@lab\x1b[0m:~# "


class Cast:
    """The events of one recording; typing takes no time of its own but on the recording."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str]] = []
        self._now = self._base = 0.0
        self._began = time.monotonic()

    def begin(self) -> None:
        """What comes from now on is timed from here."""
        self._began, self._base = time.monotonic(), self._now

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self._began

    def take(self, _kind: Kind, data: bytes) -> None:
        """A piece of output, now."""
        self._now = self._base + self.seconds
        self.events.append((self._now, data.decode(errors="replace")))

    def type(self, line: str) -> None:
        """A prompt, and a command as somebody types it."""
        self.events.append((self._now, PROMPT))
        self._now += PAUSE_S
        for letter in line:
            self._now += KEY_S
            self.events.append((self._now, letter))
        self.events.append((self._now, "\r\n"))

    def text(self, title: str) -> str:
        head = {
            "version": 2,
            "width": COLUMNS,
            "height": ROWS,
            "title": title,
            # Emulated within an emulation a start takes a minute in which nothing is said.
            "idle_time_limit": 3,
            "env": {"TERM": "xterm-256color", "SHELL": "/bin/sh"},
        }
        rows = [json.dumps([round(at, 3), "o", data]) for at, data in self.events]
        return "\n".join([json.dumps(head), *rows, ""])


def main() -> int:
    steps = tour.section(SECTION)
    cast = Cast()
    with Guest("full", "6.12", env={"TERM": "xterm-256color"}) as guest:
        for step in steps:
            cast.type(step.command)
            cast.begin()
            print(f"$ {step.command}", file=sys.stderr, flush=True)
            done = guest.exec(
                ["sh", "-c", step.command],
                timeout_s=7200,
                sink=cast.take,
                terminal=(ROWS, COLUMNS),
            )
            print(f"  {cast.seconds:.0f} s", file=sys.stderr, flush=True)
            if done.exit_code:
                print(f"  ended with {done.exit_code}: nothing is written", file=sys.stderr)
                return 1
    CAST.write_text(cast.text("vfiotool: an NVMe disk for a virtual machine"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
