"""Runs the tests once to see which lines each reaches, and then, for each mutant, those that reach
its line: each time in a fork of the one process that has imported and collected everything.

The code of the mutated function is replaced in the fork, so that nothing is imported again; the
file is changed too, for tests that start programs of their own. A mutant outside of every function
needs a process of its own (`by_itself`).
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from tests.mutants.mutant import Mutant

# How much longer than measured the tests of a mutant may take before it counts as noticed because
# it hangs. The machine may be busy.
SLOWER = 12
LEAST_S = 40.0


@dataclass
class Reached:
    """What one test reaches: `lines` of the files that are mutated."""

    test: str
    seconds: float
    lines: dict[str, list[int]] = field(default_factory=dict)


class Judge:
    """A pytest plugin that judges `mutants` instead of running the tests once.

    `found(mutant, noticed, by)` is told of each; `by` is the test that noticed, or the number of
    tests that ran and of those for which the time did not last.
    """

    def __init__(
        self,
        root: Path,
        files: Iterable[str],
        mutants: list[Mutant],
        reached: bytes,
        output: int,
        budget_s: float,
        found: Callable[[Mutant, bool, str], None],
    ) -> None:
        self.root = root
        self.files = {str(root / file): file for file in files}
        self.mutants = mutants
        self.known = [Reached(**json.loads(line)) for line in reached.splitlines()]
        self.output = output
        self.budget_s = budget_s
        self.found = found

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        known = {one.test for one in self.known}
        missing = [item for item in session.items if item.nodeid not in known]
        if missing:
            with tempfile.TemporaryFile() as file:
                _in_fork(lambda report: self._measure(session, missing, file.fileno()), None)
                file.seek(0)
                self.known += [Reached(**json.loads(line)) for line in file]
        reached = sorted(self.known, key=lambda one: one.seconds)
        for mutant in self.mutants:
            path = self.root / mutant.file
            source = path.read_bytes()
            path.write_bytes(mutant.applied(source))
            try:
                self.found(mutant, *self._judged(session, items, reached, mutant, source))
            finally:
                path.write_bytes(source)
        return True

    def _judged(
        self,
        session: pytest.Session,
        items: dict[str, pytest.Item],
        reached: list[Reached],
        mutant: Mutant,
        source: bytes,
    ) -> tuple[bool, str]:
        patches = _patches(self.root / mutant.file, source, mutant)
        if patches is None:
            return by_itself(self.root, mutant)
        chosen, left_out, budget = [], 0, self.budget_s
        # Those of its own package first: nearly always one of them notices.
        own = f"tests/{Path(mutant.file).parts[1]}/"
        for one in sorted(reached, key=lambda one: not one.test.startswith(own)):
            if one.test in items and mutant.line in one.lines.get(mutant.file, ()):
                if one.seconds > budget:
                    left_out += 1
                    continue
                budget -= one.seconds
                chosen.append(items[one.test])

        def run(report: Callable[[str], None]) -> None:
            for function, code in patches:
                function.__code__ = code
            for item, following in zip(chosen, [*chosen[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    report(item.nodeid)
                    os._exit(1)

        limit = LEAST_S + SLOWER * (self.budget_s - budget)
        code, said = _in_fork(run, limit, session)
        if code == 0:
            return False, f"{len(chosen)} tests, {left_out} too long"
        return True, said or ("hangs" if code is None else "ends the process")

    def _measure(self, session: pytest.Session, items: list[pytest.Item], own: int) -> None:
        sizes, begins, total = {}, {}, 0
        for path in self.files:
            begins[path] = total
            sizes[path] = len(Path(path).read_bytes().splitlines()) + 2
            total += sizes[path]
        # Shared with forks of the tests, as those that write are.
        seen = mmap.mmap(-1, total)

        def lines(frame: FrameType, event: str, _: object) -> Any:
            seen[begins[frame.f_code.co_filename] + frame.f_lineno] = 1
            return lines

        def calls(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code.co_filename not in begins:
                return None
            seen[begins[frame.f_code.co_filename] + frame.f_lineno] = 1
            return lines

        for item, following in zip(items, [*items[1:], None], strict=True):
            seen[:] = bytes(total)
            failed, begun = session.testsfailed, time.perf_counter()
            threading.settrace(calls)
            sys.settrace(calls)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            found = {}
            for path, begin in begins.items():
                part = seen[begin : begin + sizes[path]]
                if any(part):
                    found[self.files[path]] = [n for n, hit in enumerate(part) if hit]
            if session.testsfailed != failed:
                print(f"fails without a mutant: {item.nodeid}", flush=True)
                found = {}
            one = {"test": item.nodeid, "seconds": time.perf_counter() - begun, "lines": found}
            for output in (own, self.output):
                os.write(output, (json.dumps(one) + "\n").encode())


def _in_fork(
    run: Callable[[Callable[[str], None]], None],
    limit_s: float | None,
    session: pytest.Session | None = None,
) -> tuple[int | None, str]:
    """Runs `run` in a fork that is the head of its own process group; returns its exit code, or
    None if it took too long, and what it reported."""
    reader, writer = os.pipe()
    folder = Path(os.environ["TMPDIR"], "tests")
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            if session is not None:
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, 1)
                os.dup2(nothing, 2)
                folder.mkdir()
                factory = session.config._tmp_path_factory  # type: ignore[attr-defined]
                factory._basetemp = folder
            run(lambda text: void(os.write(writer, text.encode())))
            os._exit(0)
        except BaseException as error:
            os.write(writer, repr(error).encode()[:500])
            os._exit(2)
    os.close(writer)
    try:
        # The pipe may stay open in what the tests started; the fork's end is what counts.
        handle = os.pidfd_open(child)
        ready, _, _ = select.select([handle], [], [], limit_s)
        os.close(handle)
        if not ready:
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        _end_group(child)
        os.set_blocking(reader, False)
        try:
            said = os.read(reader, 4096).decode(errors="replace")
        except BlockingIOError:
            said = ""
    finally:
        os.close(reader)
        shutil.rmtree(folder, ignore_errors=True)
    return (os.waitstatus_to_exitcode(status) if ready else None), said


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def void(_: object) -> None:
    return None


def _patches(
    path: Path, source: bytes, mutant: Mutant
) -> list[tuple[FunctionType, CodeType]] | None:
    """The living functions whose code is another with the mutant, and the code that each gets.

    Those inside functions too: some were made when their module was imported. None if the mutant
    is in no function, or changes which there are.
    """
    old = list(_functions(compile(source, str(path), "exec")))
    new = list(_functions(compile(mutant.applied(source), str(path), "exec")))
    if [code.co_qualname for code in old] != [code.co_qualname for code in new]:
        return None
    changed = {
        (before.co_qualname, before.co_firstlineno): after
        for before, after in zip(old, new, strict=True)
        if before.replace(co_filename="", co_firstlineno=1)
        != after.replace(co_filename="", co_firstlineno=1)
    }
    pairs = []
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == str(path):
            code = function.__code__
            after = changed.get((code.co_qualname, code.co_firstlineno))
            if after is not None and after.co_freevars == code.co_freevars:
                pairs.append((function, after))
    return pairs or None


def _functions(code: CodeType) -> Iterator[CodeType]:
    """All functions of a module, those inside classes and functions too; no comprehensions."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            # A class's body keeps no fast locals.
            if constant.co_flags & inspect.CO_OPTIMIZED and constant.co_name not in _INLINE:
                yield constant
            yield from _functions(constant)


_INLINE = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def by_itself(root: Path, mutant: Mutant) -> tuple[bool, str]:
    """Asks the tests of the mutant's own package, in a process of their own."""
    package = Path(mutant.file).parts[1]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not lab", "--no-header"]
    command += ["-p", "no:cacheprovider", f"tests/{package}", "tests/field", "tests/cli/change"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, timeout=600)
    except subprocess.TimeoutExpired:
        return True, "hangs"
    last = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode not in (0, 5), f"by itself: {last[-1] if last else ''}"
