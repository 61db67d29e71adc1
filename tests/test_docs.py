"""The documentation: every command in a block is one that the program takes; links lead somewhere;
what it lists is all there is; a site builds from it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tests.cli.test_help import check

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(console|sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPERATORS = {"|", ">", "<", ";", "&&", "||", "&", ">>", "2>"}


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page's blocks, continued lines joined."""
    for kind, text in BLOCK.findall(page.read_text()):
        lines = text.replace("\\\n", " ").splitlines()
        for line in lines:
            if kind == "console" and not line.startswith(("$ ", "# ")):
                continue
            yield line.removeprefix("$ ").removeprefix("# ") if kind == "console" else line


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of each call of vfiotool in a line."""
    line = re.sub(r"(\$|<)\(", " ", line)
    words = shlex.split(line.replace(";", " ; "), comments=True)
    words = [word.rstrip(")") if word.count(")") > word.count("(") else word for word in words]
    for number, word in enumerate(words):
        before = words[number - 1] if number else ";"
        starts = before in OPERATORS or before in ("sudo", "--", "env", "source", "qemu", "nice")
        if word.rpartition("/")[2] != "vfiotool" or not (starts or "=" in before):
            continue
        rest = words[number + 1 :]
        end = next((i for i, word in enumerate(rest) if word in OPERATORS), len(rest))
        yield rest[:end]


def cases() -> Iterator[object]:
    for page in PAGES:
        for line in dict.fromkeys(commands(page)):
            for words in calls(line):
                yield pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(cases()))
def test_a_command_in_a_block_is_one_that_the_program_takes(words: list[str]) -> None:
    if not words or words[0].startswith("COMMAND"):
        return
    try:
        check(words)
    except typer.Exit:
        pass
    except Exception as error:
        pytest.fail(f"vfiotool {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_troubleshooting_has_every_kind_of_error_with_its_exit_code() -> None:
    listed = json.loads((ROOT / "docs/schemas/error.json").read_text())
    kinds = listed["properties"]["error"]["properties"]["kind"]["enum"]
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for kind in kinds:
        assert f"`{kind}`" in text, kind
    from vfiotool.errors import VfiotoolError

    def branches(base: type[VfiotoolError]) -> Iterator[type[VfiotoolError]]:
        yield base
        for branch in base.__subclasses__():
            yield from branches(branch)

    for branch in branches(VfiotoolError):
        if branch.__module__ == "vfiotool.errors":
            assert re.search(rf"\| `{branch.kind}` \| {branch.exit_code} \|", text), branch.kind


def test_the_findings_that_troubleshooting_names_are_those_of_vm_check() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "vfiotool").glob("*/*.py"))
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for name in re.findall(r"finding `([a-z0-9-]+)`", text):
        assert f'"{name}"' in sources, name


def test_the_site_lists_every_page() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.name for page in PAGES[1:]} <= listed


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages if f"({page})" not in readme} == set()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="there is no mkdocs here: make site"
)
def test_a_site_builds_from_the_pages(tmp_path: Path) -> None:
    places = ["-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", *places],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "recipes" / "index.html").is_file()
