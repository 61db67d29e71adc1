"""What stands in the pages' blocks besides calls of vfiotool: Python, TOML, make, the tree's own
files, summaries of commands. Calls are in test_docs.py, the README's tours in tests/lab."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_help import LEAVES
from tests.test_docs import PAGES, ROOT, commands
from vfiotool.virtio.exports import parse_exports

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[Path, str]]:
    """Page and text of every block that is marked so."""
    return [
        (page, text)
        for page in PAGES
        for mark, text in BLOCK.findall(page.read_text(encoding="utf-8"))
        if mark == language
    ]


def python_blocks() -> list[tuple[Path, str]]:
    unmarked = [(page, text) for page, text in blocks("") if text.startswith(("from ", "class "))]
    return [*blocks("python"), *unmarked]


@pytest.mark.parametrize(
    ("page", "text"), python_blocks(), ids=lambda value: getattr(value, "name", "")
)
def test_python_compiles_and_takes_what_there_is(page: Path, text: str) -> None:
    for node in ast.walk(ast.parse(text, page.name)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vfiotool"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


def test_the_exports_files_are_ones_that_serve_takes() -> None:
    texts = [text for page, text in blocks("toml") if page.name == "serve.md"]
    assert len(texts) == 2
    whole, part = texts
    assert parse_exports(whole, "vm1").exports
    filled = part.replace("# …", 'name = "vm2"\nram = "1M"\nsocket_path = "/run/vm2.sock"')
    assert "vm2" in filled
    assert parse_exports(f"version = 1\n{filled}", "vm2").groups


def test_toml_stands_in_no_other_page_unseen() -> None:
    assert {page.name for page, _ in blocks("toml")} == {"serve.md"}


def other_lines() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line, comments=True)
            if words[:1] == ["sudo"]:
                words = [word for word in words[1:] if not re.match(r"[A-Z_]+=", word)]
            if words:
                yield page.name, words


def test_what_make_is_asked_for_is_a_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = {words[1] for _, words in other_lines() if words[0] == "make"}
    assert asked >= {"demo", "test", "dist"}
    for target in asked:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_of_the_tree_that_are_named_in_commands_are_there() -> None:
    folders = ("tests/", "ansible/", "fixtures/", "policies/", "requirements")
    named = {word for _, words in other_lines() for word in words if word.startswith(folders)}
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_summaries_name_commands_and_options_that_there_are() -> None:
    """Blocks such as `vfiotool boot enable POLICY [--early]`, which no shell could take."""
    known = dict(LEAVES)
    lines = [
        line for _, text in blocks("") for line in text.splitlines() if line.startswith("vfiotool ")
    ]
    assert lines
    for line in lines:
        words = re.findall(r"[\w-]+", line)[1:]
        name = next((name for count in (2, 1) if (name := " ".join(words[:count])) in known), None)
        assert name is not None, line
        options = {word for parameter in known[name].params for word in parameter.opts}
        asked = set(re.findall(r"--[a-z-]+", line)) - {"--root"}
        assert asked <= options, line
