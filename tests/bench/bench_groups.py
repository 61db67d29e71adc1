"""How fast and how big: listing laid-out hosts, against lspci on the same trees in the same run.

    python -m tests.bench.bench_groups [--sizes 512 4096 16384] [--runs 7] [--folder FOLDER]

Whole processes, run in turn, medians: wall time, processor time (of all processes together) and
peak memory. Prints the ratios that docs/benchmarks.md records; asserts nothing. Byte code is
cached, as it is where vfiotool is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURE = ROOT / "fixtures" / "hosts" / "shared-group"
PYTHON = [sys.executable]
SCRIPT = Path(sys.executable).parent / "vfiotool"
VFIOTOOL = [str(SCRIPT)] if SCRIPT.exists() else [*PYTHON, "-m", "vfiotool"]


@dataclass
class Series:
    """One command's runs: seconds of wall time and of processor time, and kilobytes at most."""

    command: list[str]
    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    peak_kib: int = 0

    @property
    def wall(self) -> float:
        return statistics.median(self.wall_s)

    @property
    def processor(self) -> float:
        return statistics.median(self.processor_s)


def run_once(series: Series, environment: dict[str, str]) -> None:
    begin = time.perf_counter()
    process = subprocess.Popen(
        series.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    series.wall_s.append(time.perf_counter() - begin)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(series.command)} failed with {process.returncode}")
    series.processor_s.append(usage.ru_utime + usage.ru_stime)
    series.peak_kib = max(series.peak_kib, usage.ru_maxrss)


def measure(commands: dict[str, list[str]], runs: int, cache: str) -> dict[str, Series]:
    """Every command `runs` times, in turn, after one unmeasured run of each."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    found = {name: Series(command) for name, command in commands.items()}
    for name in found:
        run_once(Series(commands[name]), environment)
    for _ in range(runs):
        for series in found.values():
            run_once(series, environment)
    return found


def report(found: dict[str, Series], pairs: list[tuple[str, str, str]]) -> None:
    for name, series in found.items():
        print(
            f"  {name:<24} wall {series.wall * 1e3:8.1f} ms   processor "
            f"{series.processor * 1e3:8.1f} ms   peak {series.peak_kib / 1024:6.1f} MiB"
        )
    for ours, theirs, aim in pairs:
        wall = statistics.median(
            a / b for a, b in zip(found[ours].wall_s, found[theirs].wall_s, strict=True)
        )
        processor = found[ours].processor / found[theirs].processor
        print(f"  {ours} / {theirs}: wall {wall:.2f}, processor {processor:.2f}   ({aim})")


def lay_out_apart(root: Path, functions: int, *options: str) -> None:
    """In a process of its own: the peak that the kernel gives a child begins with its parent's."""
    command = [*PYTHON, "-m", "tests.bench.bighost", str(root), str(functions), *options]
    subprocess.run(command, check=True)


def bench_size(folder: Path, functions: int, runs: int, cache: str) -> dict[str, Series]:
    root = folder / str(functions)
    lay_out_apart(root, functions)
    lspci = ["lspci", "-O", f"sysfs.path={root}/sys/bus/pci"]
    ours = [*VFIOTOOL, "--root", str(root)]
    found = measure(
        {
            "groups --json": [*ours, "groups", "--json"],
            "lspci -nnk": [*lspci, "-nnk"],
            "devices --json": [*ours, "devices", "--json"],
            "lspci -vvv": [*lspci, "-vvv"],
        },
        runs,
        cache,
    )
    report(
        found,
        [
            ("groups --json", "lspci -nnk", "aim 0.5, at most 1.0"),
            ("devices --json", "lspci -vvv", "at most 2.0"),
        ],
    )
    return found


def bench_distinct(folder: Path, functions: int, runs: int, cache: str) -> None:
    """Where no configuration space is like another: nothing that was decoded helps twice."""
    root = folder / "distinct"
    print("all configuration spaces different:", end=" ", flush=True)
    lay_out_apart(root, functions, "--distinct")
    found = measure(
        {
            "devices --json": [*VFIOTOOL, "--root", str(root), "devices", "--json"],
            "lspci -vvv": ["lspci", "-O", f"sysfs.path={root}/sys/bus/pci", "-vvv"],
        },
        runs,
        cache,
    )
    report(found, [("devices --json", "lspci -vvv", "at most 2.0")])


def bench_start(folder: Path, runs: int, cache: str) -> None:
    """What it costs to start at all, in bare Pythons."""
    small = folder / "small"
    print("start-up, and a host of")
    lay_out_apart(small, 64)
    found = measure(
        {
            "python -c pass": [*PYTHON, "-c", "pass"],
            "--version": [*VFIOTOOL, "--version"],
            "groups, 64 functions": [*VFIOTOOL, "--root", str(small), "groups"],
            "groups, a fixture": [*VFIOTOOL, "--root", str(FIXTURE), "groups"],
        },
        runs,
        cache,
    )
    report(
        found,
        [
            ("--version", "python -c pass", "at most 4"),
            ("groups, 64 functions", "python -c pass", "at most 9"),
            ("groups, a fixture", "python -c pass", "at most 9"),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 4096, 16384])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to lay the hosts out (a tmpfs is best)")
    arguments = parser.parse_args()
    if shutil.which("lspci") is None:
        raise SystemExit("lspci is needed to compare with: install pciutils")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        cache = str(folder / "bytecode")
        print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} processors")
        bench_start(folder, max(arguments.runs, 15), cache)
        sizes = {}
        for functions in arguments.sizes:
            sizes[functions] = bench_size(folder, functions, arguments.runs, cache)
        bench_distinct(folder, 4096, arguments.runs, cache)
        print("microseconds a function (wall, start-up included)")
        for functions, found in sizes.items():
            each = "   ".join(
                f"{name} {series.wall / functions * 1e6:.1f}" for name, series in found.items()
            )
            print(f"  {functions:>6}: {each}")


if __name__ == "__main__":
    main()
