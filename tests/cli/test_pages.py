"""Manual pages, completion scripts and the command reference: complete, fresh, and rendered."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.draw_pages import ROOT, texts
from vfiotool.cli.commands import COMMANDS
from vfiotool.cli.pages import man_pages, read_page, reference, roff


def test_the_generated_files_are_what_the_commands_declare() -> None:
    for path, text in texts().items():
        name = path.relative_to(ROOT)
        assert path.is_file(), f"{name} is missing: python -m tests.draw_pages"
        assert path.read_text() == text, f"{name} is out of date: python -m tests.draw_pages"
    kept = {
        path for folder in ("man", "completions") for path in (ROOT / "docs" / folder).iterdir()
    }
    assert kept <= texts().keys(), "a page of a command that is gone: python -m tests.draw_pages"


def test_every_command_and_every_option_stands_in_its_page_and_in_the_reference() -> None:
    pages, whole = man_pages(), reference()
    for name in COMMANDS:
        text = pages[f"vfiotool-{name}.1"]
        page = read_page(name)
        for leaf in page.below or (page,):
            assert (roff(leaf.name) in text and f"### {leaf.name}" in whole) or leaf.below
            for typed, meaning in (*leaf.arguments, *leaf.options):
                assert f".B {roff(typed)}\n" in text, (name, typed)
                assert meaning and roff(meaning) in text, (name, typed)
        assert f"vfiotool\\-{name}(1)" in pages["vfiotool.1"]


def test_the_pages_name_every_variable_of_the_environment_that_changes_what_is_printed() -> None:
    read: set[str] = set()
    for path in (ROOT / "vfiotool/cli").rglob("*.py"):
        read |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', path.read_text()))
    # How Python itself is told what its streams take.
    read -= {"PYTHONIOENCODING", "PYTHONUTF8"}
    whole, page = reference(), man_pages()["vfiotool.1"]
    assert read and all(f"| `{name}` |" in whole and f".B {name}\n" in page for name in read)


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man here")
def test_man_renders_every_page_without_a_warning(tmp_path: Path) -> None:
    for name, text in man_pages().items():
        page = tmp_path / name
        page.write_text(text)
        done = subprocess.run(
            ["man", "--warnings", "-l", str(page)],
            capture_output=True,
            text=True,
            env={"MANWIDTH": "80", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "PAGER": "cat"},
        )
        assert done.returncode == 0 and not done.stderr, f"{name}: {done.stderr}"
        assert "NAME" in done.stdout and "EXIT STATUS" in done.stdout


def test_what_roff_would_take_for_its_own_is_escaped() -> None:
    assert roff("--a \\b…") == "\\-\\-a \\eb..."
    assert roff(".hidden") == "\\&.hidden" and roff("'x") == "\\&'x"
