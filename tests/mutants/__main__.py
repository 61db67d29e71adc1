"""Turns one thing wrong at a time, and asks the tests that need no guest whether they notice.

    python -m tests.mutants [--count 300] [--seed 1] [--jobs 2] [--files GLOB …]

A mutant is one comparison turned, one condition dropped, one `and` made an `or`, one refusal taken
out or one answer negated in the packages that decide and change (`DEFAULT_FILES`). Each is put in a
copy of the checkout; the tests of its own package run first, then those of the packages above it.
What survives is printed with its place: each survivor is a missing test or an equivalent mutant.
The exit code is 1 if fewer than `WANTED` of them were noticed.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FILES = (
    "vfiotool/usage/*.py",
    "vfiotool/change/**/*.py",
    "vfiotool/policy/*.py",
    "vfiotool/devices/iommu.py",
)
# The tests that may notice, by package; those of the package itself come first.
NOTICED_BY = {
    "usage": ("usage", "vm", "doctor", "field", "cli", "change"),
    "change": ("change", "policy", "devices", "boot", "cli"),
    "policy": ("policy", "change", "boot", "cli"),
    "devices": ("devices", "usage", "cli", "policy"),
}
TIMEOUT_S = 300.0
WANTED = 0.95
_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


@dataclass(frozen=True)
class Mutant:
    """`text` replaces the source from `start` to `end` (character offsets) of a file."""

    file: str
    line: int
    what: str
    start: int
    end: int
    text: str


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of one file, in the order of its lines."""
    source = path.read_text(encoding="utf-8")
    encoded = [line.encode() for line in source.splitlines(keepends=True)]
    starts = [0]
    for line in encoded:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    def mutant(node: ast.expr | ast.stmt, what: str, text: str) -> Mutant:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = place(node.lineno, node.col_offset)
        end = place(node.end_lineno, node.end_col_offset)
        return Mutant(str(path.relative_to(ROOT)), node.lineno, what, start, end, text)

    for node in _code(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            turned = ast.Compare(node.left, [_TURNED[type(node.ops[0])]()], node.comparators)
            yield mutant(node, f"turned: {ast.unparse(node)}", f"({ast.unparse(turned)})")
        elif isinstance(node, ast.BoolOp):
            other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            text = ast.unparse(ast.BoolOp(other, node.values))
            yield mutant(node, f"and/or: {ast.unparse(node)}", f"({text})")
        elif isinstance(node, ast.If | ast.IfExp):
            yield mutant(node.test, f"never: {ast.unparse(node.test)}", "False")
            yield mutant(node.test, f"always: {ast.unparse(node.test)}", "True")
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield mutant(node, f"no longer raised: {ast.unparse(node)[:60]}", "pass")
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Compare | ast.BoolOp):
            text = f"return not ({ast.unparse(node.value)})"
            yield mutant(node, f"negated: {ast.unparse(node)}", text)


def _code(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees, and those inside f-strings, whose places
    Python 3.11 does not know."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.JoinedStr):
            continue
        yield node
        pending += reversed(list(ast.iter_child_nodes(node)))


def apply(mutant: Mutant, folder: Path) -> None:
    source = (ROOT / mutant.file).read_bytes()
    changed = source[: mutant.start] + mutant.text.encode() + source[mutant.end :]
    (folder / mutant.file).write_bytes(changed)


def is_noticed(mutant: Mutant, folder: Path) -> bool:
    """Whether a test fails, or one stands still, with the mutant in `folder`."""
    package = Path(mutant.file).parts[1]
    for tests in NOTICED_BY[package]:
        if not (folder / "tests" / tests).is_dir():
            continue
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not lab", "--no-header"]
        command += ["-p", "no:cacheprovider", f"tests/{tests}"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return True
        if done.returncode not in (0, 5):
            return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--files", nargs="+", default=DEFAULT_FILES)
    options = parser.parse_args()
    paths = sorted({path for pattern in options.files for path in ROOT.glob(pattern)})
    every = [mutant for path in paths for mutant in mutants_of(path)]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(chosen)} of {len(every)} mutants of {len(paths)} files", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(options.jobs):
            folder = Path(parent, str(number))
            ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache")
            shutil.copytree(ROOT, folder, ignore=ignored)
            folders.put(folder)

        def examine(mutant: Mutant) -> bool:
            folder = folders.get()
            try:
                apply(mutant, folder)
                return is_noticed(mutant, folder)
            finally:
                shutil.copyfile(ROOT / mutant.file, folder / mutant.file)
                folders.put(folder)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            noticed = 0
            for mutant, found in zip(chosen, pool.map(examine, chosen), strict=True):
                noticed += found
                if not found:
                    print(f"survived  {mutant.file}:{mutant.line}  {mutant.what}", flush=True)
    share = noticed / len(chosen)
    seconds = time.monotonic() - begun
    print(f"noticed {noticed} of {len(chosen)} ({share:.1%}) in {seconds:.0f} s")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
