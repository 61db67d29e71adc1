"""What starting costs: processor time of whole processes, against `python -c pass` in the same run.

    python -m tests.bench.bench_startup [--runs 15] [--before CHECKOUT]

With --before, `why` and `bind --dry-run` are measured in another checkout too, by the same Python.
Prints the figures that docs/benchmarks.md records; asserts nothing. What is imported is held in
tests/cli/test_startup.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURE = str(ROOT / "fixtures" / "hosts" / "shared-group")
COMMANDS = {
    "--version": ["--version"],
    "--help": ["--help"],
    "groups": ["--root", FIXTURE, "groups"],
    "groups --json": ["--root", FIXTURE, "groups", "--json"],
    "why": ["--root", FIXTURE, "why", "02:01.0"],
    "bind --dry-run": ["--root", FIXTURE, "bind", "02:02.0", "--dry-run"],
}


def processor_ms(command: list[str], folder: Path) -> float:
    """User and system time of one process, with its byte code cached."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=15)
    options.add_argument("--before", type=Path)
    chosen = options.parse_args()
    python = [sys.executable, "-m", "vfiotool"]
    cases = {"python -c pass": ([sys.executable, "-c", "pass"], ROOT)}
    for name, arguments in COMMANDS.items():
        cases[name] = ([*python, *arguments], ROOT)
        if chosen.before is not None and name in ("why", "bind --dry-run"):
            cases[f"{name} before"] = ([*python, *arguments], chosen.before)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(chosen.runs):
        for name, (command, folder) in cases.items():
            times[name].append(processor_ms(command, folder))
    least = min(times["python -c pass"])
    for name, found in times.items():
        print(f"{name:<24} {min(found):7.1f} ms   {min(found) / least:5.2f} times python -c pass")


if __name__ == "__main__":
    main()
