"""Runs tests/lab in guests for test_in_guests.py: who needs which guest, and what came out.

Files that share a kernel and a machine share a boot, but for proofs: each of these is long, and has
one of its own. Boots run side by side as far as there are processors, but one by one while `make
test` has this machine's tests run beside, and one fewer while tests around guests of their own run
in the main thread; each file's host test waits for its rows. A file that
takes the guest down is reported as such and not tried again: that a test can do so is a finding.
The files after it get a guest of their own. A guest that never came up, as happens on a machine
with too much to do, is started once more, and the summary says so.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.guests import yardstick
from vfiotool.errors import VfiotoolError
from vfiotool.lab import qemu
from vfiotool.lab.channel import Kind
from vfiotool.lab.guest import Guest, GuestLost, GuestTimeout
from vfiotool.lab.kernels import catalogue as kernels

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "lab"
KERNELS = ("6.1", "6.12", "iommufd")
# Set by `make proofs`.
PROOFS_WANTED = "VFIOTOOL_PROOFS"
# Set by `make test`: a file that is gone when this machine's own tests are over.
BESIDE = "VFIOTOOL_LAB_BESIDE"
# For all files of one boot together, unless a proof says LIMIT_S: a hanging test fails here and not
# never.
BOOT_AND_TESTS_S = 1800.0
BOOTS = 2


@dataclass(frozen=True, order=True)
class Place:
    """A guest: what a file's tests run in."""

    machine: str
    kernel: str


@dataclass
class Outcome:
    """What became of one file in one place. `lost` says why there may be rows missing, `again` why
    its guest had to be started twice."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    lost: str | None = None
    again: str | None = None
    unavailable: str | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def of(self, outcome: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["outcome"] == outcome]


def need_lab(kernel: str) -> None:
    """Skip, saying why, where this machine cannot boot a guest on this kernel."""
    try:
        kernels.prepare(kernel)
        qemu.find()
    except VfiotoolError as error:
        pytest.skip(f"no lab here: {error.message}; {error.hint}")


def constants(path: Path) -> dict[str, Any]:
    """The literal module constants of a test file, read without running it.

    MACHINE and KERNELS say where it runs, ALWAYS_ON, on which of these kernels `make test` runs it
    too, where that is not all; PROOF, why it runs in `make proofs` alone, and LIMIT_S, how many
    seconds it may take there.
    """
    found: dict[str, Any] = {
        "MACHINE": "basic",
        "KERNELS": KERNELS,
        "ALWAYS_ON": None,
        "PROOF": "",
        "LIMIT_S": BOOT_AND_TESTS_S,
    }
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target, value = node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            target, value = node.target.id, node.value
        else:
            continue
        if target in found:
            found[target] = ast.literal_eval(value)
    return found


def places(folder: Path = FOLDER) -> list[tuple[Place, str]]:
    """Every (guest, file) that there is to run, files by their path from the root."""
    result = []
    for path in sorted(folder.glob("test_*.py")):
        read = constants(path)
        machines = read["MACHINE"] if isinstance(read["MACHINE"], tuple) else (read["MACHINE"],)
        for machine in machines:
            for kernel in read["KERNELS"]:
                result.append((Place(machine, kernel), str(path.relative_to(ROOT))))
    return sorted(result)


def left_out(place: Place, file: str) -> str:
    """Why a file is left to `make proofs` in this place; empty if it is not, or if proofs were
    asked for."""
    if os.environ.get(PROOFS_WANTED):
        return ""
    read = constants(ROOT / file)
    always = read["KERNELS"] if read["ALWAYS_ON"] is None else read["ALWAYS_ON"]
    return read["PROOF"] or ("" if place.kernel in always else f"always on {', '.join(always)}")


class GuestRuns:
    """Starts the guests for the files that were chosen and hands out their outcomes.

    With `around`, the caller boots guests of its own, one at a time, until it first asks for an
    outcome: one guest fewer is at work until then.
    """

    def __init__(self, chosen: Iterable[tuple[Place, str]], *, around: bool = False) -> None:
        self._around = around
        self.outcomes: dict[tuple[Place, str], Outcome] = {}
        groups: dict[Place, list[str]] = defaultdict(list)
        for place, file in chosen:
            self.outcomes[place, file] = Outcome()
            groups[place].append(file)
        self._queue: queue.SimpleQueue[tuple[Place, list[str]]] = queue.SimpleQueue()
        # Those with most to do first, so that no long one is left over for the end.
        for item in sorted(groups.items(), key=lambda item: len(item[1]), reverse=True):
            self._queue.put(item)
        cpus = len(os.sched_getaffinity(0))
        self._jobs = int(os.environ.get("VFIOTOOL_LAB_JOBS", "0")) or max(1, min(cpus, 4))
        for number in range(min(self._jobs, len(groups))):
            threading.Thread(
                target=self._work, args=(number,), name=f"guest-{number}", daemon=True
            ).start()

    def outcome(self, place: Place, file: str) -> Outcome:
        """Wait for what becomes of `file` in `place`; every path of the work below sets it."""
        self._around = False
        outcome = self.outcomes[place, file]
        outcome.done.wait()
        return outcome

    def _at_a_time(self) -> int:
        """How many guests may be at work here now; one leaves a processor to tests beside."""
        jobs = 1 if os.path.exists(os.environ.get(BESIDE, "")) else self._jobs
        return jobs - self._around

    def _work(self, number: int) -> None:
        while True:
            while number >= self._at_a_time():
                time.sleep(0.2)
            try:
                place, files = self._queue.get_nowait()
            except queue.Empty:
                return
            try:
                self._run_place(place, files)
            except VfiotoolError as error:
                hint = f"; {error.hint}" if error.hint else ""
                for file in files:
                    self.outcomes[place, file].unavailable = error.message + hint
            except Exception as error:
                for file in files:
                    self.outcomes[place, file].lost = f"{type(error).__name__}: {error}"
            finally:
                for file in files:
                    self.outcomes[place, file].done.set()

    def _run_place(self, place: Place, files: list[str]) -> None:
        for boot in boots(files):
            left = boot
            while left:
                left = self._run_boot(place, left)

    def _run_boot(self, place: Place, files: list[str]) -> list[str]:
        """One guest for these files; those that are left when it was lost on the way."""
        with contextlib.ExitStack() as stack:
            for boot in range(1, BOOTS + 1):
                guest = Guest(place.machine, place.kernel, cwd=ROOT)
                try:
                    stack.enter_context(guest)
                    break
                except GuestLost as error:
                    for file in files:
                        self.outcomes[place, file].again = error.message
                    if boot == BOOTS:
                        for file in files:
                            self.outcomes[place, file].lost = error.message
                        return []
            run = _OneBoot(self, place, files)
            try:
                run.go(guest)
            except (GuestLost, GuestTimeout) as error:
                run.lost(error.message)
            return run.left


def boots(files: Iterable[str]) -> list[list[str]]:
    """The files of each guest: all that are not proofs together, and each proof by itself."""
    proofs = {file for file in files if constants(ROOT / file)["PROOF"]}
    together = [file for file in files if file not in proofs]
    return [group for group in (together, *([file] for file in sorted(proofs))) if group]


class _OneBoot:
    """One guest that runs the files in `left` in order; rows arrive line by line."""

    def __init__(self, runs: GuestRuns, place: Place, left: list[str]) -> None:
        self.runs = runs
        self.place = place
        self.left = list(left)
        self.text = b""
        self.noise = bytearray()
        self.finished = False

    def go(self, guest: Guest) -> None:
        python = Path(sys.prefix) / "bin/python"
        command = f"exec 3>&1 1>&2; exec {python} -m pytest -p tests.lab.guest_report"
        options = ["-p", "no:cacheprovider", "-q", "--no-header", "--tb=short"]
        options += ["--import-mode=importlib", "-o", "addopts=", *self.left]
        done = guest.exec(
            ["sh", "-c", f'{command} "$@"', "sh", *options],
            timeout_s=max(constants(ROOT / file)["LIMIT_S"] for file in self.left),
            sink=self.take,
            env={
                "PYTHONPATH": str(ROOT),
                # Plug-ins of this machine's tests: their import is two thirds of pytest's start.
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                yardstick.HOST_S: str(yardstick.measure()),
            },
        )
        if not self.finished:
            self.lost(f"pytest ended with {done.exit_code} in the guest:\n{self.tail()}")
        for file in list(self.left):
            self.end(file)

    def take(self, kind: Kind, data: bytes) -> None:
        if kind is not Kind.OUTPUT:
            self.noise += data
            return
        *lines, self.text = (self.text + data).split(b"\n")
        for line in lines:
            self.row(json.loads(line))

    def row(self, row: dict[str, Any]) -> None:
        if row["outcome"] == "finished":
            self.finished = True
            return
        file = row["file"]
        # pytest runs file by file: with the first test of the next one, the last one is complete.
        while row["outcome"] == "started" and self.left and self.left[0] != file:
            self.end(self.left[0])
        if outcome := self.runs.outcomes.get((self.place, file)):
            outcome.rows.append(row)

    def end(self, file: str) -> None:
        self.left.remove(file)
        self.runs.outcomes[self.place, file].done.set()

    def lost(self, why: str) -> None:
        """The file at work takes the blame; those after it are left for another guest."""
        if self.left:
            outcome = self.runs.outcomes[self.place, self.left[0]]
            started = outcome.of("started")
            at = f" in {started[-1]['test']}" if started else ""
            outcome.lost = f"{why}{at}\n{self.tail()}"
            self.end(self.left[0])

    def tail(self) -> str:
        return self.noise.decode(errors="replace")[-3000:]
