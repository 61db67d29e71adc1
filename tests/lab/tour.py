"""The README's tours as data: the commands of a section's console blocks and what they print.

A line `…` in a block stands for any lines, `…` within a line for any text, `N s` for any seconds.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vfiotool.cli.main import main

README = Path(__file__).resolve().parents[2] / "README.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SECONDS = re.compile(r"\b\d+ s\b")


@dataclass(frozen=True)
class Shown:
    """One command as a page has it, and the lines that it is said to print."""

    command: str
    lines: tuple[str, ...]


def section(title: str, page: Path = README) -> list[Shown]:
    """The commands of the section `title` in their order. Raises AssertionError without one."""
    _, found, rest = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    assert found, f"{page.name} has no section {title}"
    text = rest.partition("\n## ")[0]
    result: list[Shown] = []
    for block in _BLOCK.findall(text):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, lines = part.partition("\n")
            result.append(Shown(command, tuple(lines.splitlines())))
    return result


def pattern(lines: tuple[str, ...]) -> re.Pattern[str]:
    """What matches the whole output of a command that prints these lines."""
    parts = []
    for line in lines:
        if line == "…":
            parts.append(r"(?:.*\n)*")
            continue
        words = [re.escape(_SECONDS.sub("N s", piece)) for piece in line.split("…")]
        parts.append(".*".join(words).replace(r"N\ s", r"\d+ s") + r"[ \t]*\n")
    return re.compile("".join(parts))


def differs(shown: Shown, printed: str) -> str | None:
    """None where `printed` is what the page shows, or else both of them, in words."""
    text = "\n".join(line.rstrip() for line in printed.splitlines())
    if pattern(shown.lines).fullmatch(text + "\n" if text else ""):
        return None
    expected = "\n".join(shown.lines)
    return f"$ {shown.command}\n--- the page says\n{expected}\n--- it printed\n{text}"


def run(command: str, limit_s: float = 300.0) -> str:
    """All that the command prints, errors among it; vfiotool's own run in this process."""
    first, *words = shlex.split(command)
    if first != "vfiotool":
        done = subprocess.run(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )
        return done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main(words)
    return printed.getvalue()
