"""One command in one guest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vfiotool.lab import machines
from vfiotool.lab.guest import Guest, Sink
from vfiotool.lab.kernels import catalogue as kernels


@dataclass(frozen=True)
class Result:
    """What a command gave: its exit code, and its output (both streams in order) if captured."""

    exit_code: int
    output: str


def run(
    command: Sequence[str],
    *,
    machine: str = machines.DEFAULT,
    kernel: str = kernels.DEFAULT,
    timeout_s: float | None = 600.0,
    capture: bool = True,
    sink: Sink | None = None,
    **options: Any,
) -> Result:
    """Boot a guest, run `command` in it from the current folder, end the guest.

    With `capture` the output is returned, otherwise it goes to `sink` as it arrives. Further
    options are those of `guest.Options`. Raises what `Guest` and `Guest.exec` raise.
    """
    with Guest(machine, kernel, **options) as guest:
        done = guest.exec(
            command, timeout_s=timeout_s, merge=capture, sink=None if capture else sink
        )
        return Result(done.exit_code, done.text)
