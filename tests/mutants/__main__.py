"""Turns one thing wrong at a time, and asks the tests that need no guest whether they notice.

    python -m tests.mutants [--count 300] [--seed 1] [--files GLOB …] [--results FILE] [--again]

The mutants are those of the packages that decide and change (`DEFAULT_FILES`); which ones are taken
depends on the seed alone. Each is put in a copy of the checkout, in a mount, process and network
namespace of its own where everything but a memory file system is read-only: a mutant may have lost
a guard. Only the tests that reach the mutated line are run, the fastest first, up to the first that
fails. What survives is printed with its place: each is a missing test or an equivalent mutant.

Results are kept in FILE, a line each: what was judged before is not judged again, and `--again`
judges the survivors anew. The exit code is 1 if fewer than `WANTED` of them were noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mutants.judge import Judge
from tests.mutants.mutant import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FILES = (
    "vfiotool/usage/*.py",
    "vfiotool/change/**/*.py",
    "vfiotool/policy/*.py",
    "vfiotool/devices/iommu.py",
)
TESTS = ("usage", "devices", "vm", "doctor", "field", "cli", "change", "policy", "boot")
# Sweeps and races: minutes each, and of little help to find one wrong line.
LONG = ("change/test_contention.py", "change/test_power_loss.py", "change/test_stateful.py")
WANTED = 0.95
INSIDE = "VFIOTOOL_MUTANTS_INSIDE"


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mutants of the code that decides and changes")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", nargs="+", default=DEFAULT_FILES)
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--map", type=Path, default=Path("mutants.map"))
    parser.add_argument("--skip", nargs="*", default=LONG, help="test files that take too long")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of tests a mutant")
    parser.add_argument("--again", action="store_true", help="judge the survivors anew")
    return parser.parse_args(arguments)


def chosen(root: Path, options: argparse.Namespace) -> tuple[list[str], list[Mutant], int]:
    """The files, the mutants (those of before where results are there already), how many are."""
    paths = sorted({path for pattern in options.files for path in root.glob(pattern)})
    every = [mutant for path in paths for mutant in mutants_of(root, path)]
    before = json.loads(os.environ.get("VFIOTOOL_MUTANTS_BEFORE", "null"))
    if before is None:
        before = list(known(options.results))
    if options.again:
        return (
            [str(path.relative_to(root)) for path in paths],
            [mutant for mutant in every if mutant.name in before],
            len(every),
        )
    some = random.Random(options.seed).sample(every, min(options.count, len(every)))
    return [str(path.relative_to(root)) for path in paths], some, len(every)


def known(results: Path) -> dict[str, dict[str, object]]:
    if not results.exists():
        return {}
    lines = results.read_text(encoding="utf-8").splitlines()
    return {one["name"]: one for one in map(json.loads, lines)}


def inside(options: argparse.Namespace) -> int:
    """In the namespaces: copies the checkout to memory and judges there."""
    for mount in (["-o", "remount,bind,ro", "/"], ["-o", "remount,bind,ro", "/sys"]):
        subprocess.run(["mount", *mount], check=True)
    descriptor, output = map(int, os.environ[INSIDE].split())
    reached = options.map.read_bytes()
    subprocess.run(["mount", "-t", "tmpfs", "mutants", "/tmp"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    root = Path("/tmp/checkout")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, root, ignore=ignored)
    Path("/tmp/t").mkdir()
    os.environ["TMPDIR"] = "/tmp/t"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(root)
    # The copy and not the checkout, in this process and in those that the tests start.
    os.environ["PYTHONPATH"] = str(root)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vfiotool", "tests")]:
        del sys.modules[name]
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT)))]
    from tests.mutants.judge import Judge as InsideJudge

    files, mutants, _ = chosen(root, options)
    wanted = set(json.loads(os.environ["VFIOTOOL_MUTANTS_WANTED"]))
    begun = time.monotonic()

    def found(mutant: Mutant, noticed: bool, by: str) -> None:
        one = {"name": mutant.name, "line": mutant.line, "noticed": noticed, "by": by}
        one["seconds"] = round(time.monotonic() - begun)
        os.write(descriptor, (json.dumps(one) + "\n").encode())
        if not noticed:
            print(f"survived  {mutant.file}:{mutant.line}  {mutant.what}  ({by})", flush=True)

    judge: Judge = InsideJudge(
        root,
        files,
        [mutant for mutant in mutants if mutant.name in wanted],
        reached,
        output,
        options.budget,
        found,
    )
    arguments = ["-q", "-s", "-m", "not lab", "-p", "no:cacheprovider", "--no-header"]
    arguments += [f"--ignore=tests/{name}" for name in options.skip]
    return pytest.main([*arguments, *(f"tests/{name}" for name in TESTS)], plugins=[judge])


def main() -> int:
    options = options_of()
    if INSIDE in os.environ:
        return inside(options)
    _, mutants, count = chosen(ROOT, options)
    before = known(options.results)
    wanted = [
        mutant.name
        for mutant in mutants
        if mutant.name not in before or (options.again and not before[mutant.name]["noticed"])
    ]
    print(f"{len(mutants)} of {count} mutants, {len(wanted)} to judge", flush=True)
    if wanted:
        with options.results.open("ab") as output, options.map.open("ab") as reached:
            descriptors = [output.fileno(), reached.fileno()]
            environment = {
                **os.environ,
                INSIDE: " ".join(map(str, descriptors)),
                "VFIOTOOL_MUTANTS_WANTED": json.dumps(wanted),
                "VFIOTOOL_MUTANTS_BEFORE": json.dumps(list(before)),
            }
            command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net"]
            command += [sys.executable, "-m", "tests.mutants", *sys.argv[1:]]
            subprocess.run(command, cwd=ROOT, env=environment, pass_fds=descriptors, check=False)
    results = known(options.results)
    judged = [results[mutant.name] for mutant in mutants if mutant.name in results]
    noticed = sum(bool(one["noticed"]) for one in judged)
    for mutant in mutants:
        if mutant.name in results and not results[mutant.name]["noticed"]:
            print(f"survived  {mutant.file}:{mutant.line}  {mutant.what}")
    share = noticed / len(judged) if judged else 0.0
    print(f"noticed {noticed} of {len(judged)} ({share:.1%})")
    return 0 if share >= WANTED and len(judged) == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
