"""docs/preflight.md lists every kind of finding, with a test that makes it happen or a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.findings_page import KINDS, PAGE, ROOT, with_kinds

MAKERS = ("finding", "_finding")


def kinds_in(path: Path) -> Iterator[str]:
    """The kinds that a module makes findings of: the second argument."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            second = node.args[1] if node.func.id in MAKERS and len(node.args) > 1 else None
            if isinstance(second, ast.Constant):
                yield second.value


def test_every_kind_of_finding_is_in_the_table_and_no_other() -> None:
    found = {kind for path in (ROOT / "vfiotool/vm").glob("*.py") for kind in kinds_in(path)}
    assert len(found) > 20 and found == set(KINDS)


def test_the_table_is_as_the_tests_have_it() -> None:
    assert with_kinds(PAGE.read_text()) == PAGE.read_text(), "python -m tests.vm.findings_page"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_seen_has_a_test_and_what_was_not_has_a_reason(kind: str) -> None:
    seen = KINDS[kind]
    assert seen.words and bool(seen.file) == bool(seen.tests)
    if seen.file:
        tree = ast.parse((ROOT / seen.file).read_text())
        there = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not set(seen.tests) - set(there)
        bodies = "\n".join(ast.unparse(there[name]) for name in seen.tests)
        assert f"'{kind}'" in bodies, "the test looks at another finding"
