"""What `vm check` says, and what a QEMU in the guest says when it is started with the devices."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab.commands import vfiotool

LIMIT_S = 1200.0
# QEMU's and Linux's, both for x86: PCI configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2).
_CONFIG_ADDRESS, _CONFIG_DATA = 0xCF8, 0xCFC


def run(*words: str, code: int | None = None, prefix: Sequence[str] = ()) -> str:
    """A command's output; in this process, but behind a `prefix`."""
    if not prefix:
        ran = vfiotool(*words)
        assert code in (None, ran.code), ran.out + ran.err
        return ran.out
    line = [*prefix, sys.executable, "-m", "vfiotool", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done.stdout


def findings(*words: str, prefix: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What `vm check` says of the devices, by its kind."""
    found = json.loads(run("--json", "vm", "check", *words, prefix=prefix))["findings"]
    return {item["kind"]: item for item in found}


def options(*words: str) -> list[str]:
    """What `vm qemu` prints of devices that are ready."""
    found: list[str] = json.loads(run("--json", "vm", "qemu", *words, code=0))["arguments"]
    return found


def line_of(words: Sequence[str]) -> list[str]:
    """QEMU's command line without a display; skips where this guest has no QEMU."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 in the guest's PATH")
    return [qemu, "-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", *words]


def start(
    words: Sequence[str],
    prefix: Sequence[str] = (),
    *,
    commands: str = "quit\n",
    prepare: Callable[[], None] | None = None,
) -> str:
    """Start QEMU, stopped, and end it: what it says on its standard error; empty if it worked.

    `commands` are its monitor's, `prepare` runs in the process that becomes QEMU.
    """
    code, said, _ = started(words, prefix, commands=commands, prepare=prepare)
    return said if code else ""


def started(
    words: Sequence[str],
    prefix: Sequence[str] = (),
    *,
    commands: str = "quit\n",
    prepare: Callable[[], None] | None = None,
) -> tuple[int, str, str]:
    """As `start`: the exit code, standard error and what its monitor printed."""
    done = subprocess.run(
        [*prefix, *line_of(words), "-S", "-monitor", "stdio"],
        input=commands,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        preexec_fn=prepare,
    )
    said = done.stderr.strip()
    print(done.returncode, said)
    return done.returncode, said, done.stdout


class BareMachine:
    """A QEMU whose processor stands still, and whose devices this process programs in place of a
    firmware (QEMU: docs/devel/testing/qtest.rst)."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self._process = process
        self._link = link.makefile("rw", encoding="ascii")

    def do(self, line: str) -> None:
        """One command of qtest's protocol, done when this returns."""
        self._link.write(f"{line}\n")
        self._link.flush()
        answer = self._link.readline()
        assert answer.startswith("OK"), (line, answer)

    def config(self, slot: int, register: int, value: int) -> None:
        """Write 32 bits of a function's configuration space on the root bus."""
        self.do(f"outl {_CONFIG_ADDRESS:#x} {1 << 31 | slot << 11 | register:#x}")
        self.do(f"outl {_CONFIG_DATA:#x} {value:#x}")

    def write64(self, address: int, value: int) -> None:
        self.do(f"writeq {address:#x} {value:#x}")

    def write32(self, address: int, value: int) -> None:
        self.do(f"writel {address:#x} {value:#x}")


@contextmanager
def bare_machine(words: Sequence[str], said: Path) -> Iterator[BareMachine]:
    """A bare machine until the end of the block; what it says is then in the file `said`."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(said, "wb") as errors:
        number = theirs.fileno()
        chardev = ("-chardev", f"socket,id=qtest,fd={number}", "-qtest", "chardev:qtest")
        process = subprocess.Popen(
            [*line_of(words), "-S", *chardev, "-qtest-log", os.devnull],
            stdin=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(number,),
        )
        theirs.close()
        try:
            ours.settimeout(LIMIT_S)
            yield BareMachine(process, ours)
        finally:
            process.kill()
            process.wait()
            print(said.read_text())
