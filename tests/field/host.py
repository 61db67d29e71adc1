"""Hosts that people reported trouble with, as snapshots in fixtures/field, and what is asked there.

Each folder holds the part of a machine that matters for one report, under the report's number:
`root.txt`, or several. They are partial on purpose: what they do not hold is unknown.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from vfiotool.cli.main import main

FIELD = Path(__file__).resolve().parents[2] / "fixtures" / "field"


@dataclass(frozen=True)
class Answer:
    """A command's exit code, and all that it printed."""

    code: int
    text: str

    @property
    def steps(self) -> list[str]:
        """The commands that `why` offers."""
        _, found, below = self.text.partition("\nnext\n")
        return [line.strip() for line in below.splitlines()] if found else []

    def lines(self, word: str) -> list[str]:
        """The lines that begin with a word such as `note:`, without it."""
        lines = (line.strip() for line in self.text.splitlines())
        return [line.removeprefix(word).strip() for line in lines if line.startswith(word)]


def folder(case: str) -> Path:
    """The folder of a case by its number."""
    (found,) = FIELD.glob(f"{case}-*")
    return found


def ask(case: str, *command: str, root: str = "root") -> Answer:
    """What a command prints for people on a case's host, standard error included."""
    out = io.StringIO()
    path = str(folder(case) / f"{root}.txt")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["--root", path, *command])
    return Answer(code, out.getvalue())
